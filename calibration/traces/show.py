"""A TraceSet on one screen: the pair, the device, the domains, and acceptance under its several definitions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calibration.traces.grades import GRADE_LIMITS, acceptance_grade
from calibration.traces.manifest import Manifest, ModelInfo
from calibration.traces.traceset import TraceSet


def show(traces: TraceSet) -> RenderableType:
    """Give a printable description of `traces`; every figure is computed from its tables."""
    return Group(
        _header(traces), _models(traces.manifest), _domains(traces), _acceptance(traces), *_remarks(traces.manifest)
    )


def _header(traces: TraceSet) -> RenderableType:
    manifest = traces.manifest
    decoding = manifest.decoding
    how = (
        "greedy"
        if decoding.mode == "greedy"
        else f"sampled (temperature {decoding.temperature:g}, top-p {decoding.top_p:g})"
    )
    threads = f", {manifest.device.threads} thread(s)" if manifest.device.threads else ""
    lines = Table.grid(padding=(0, 2))
    rows = [
        ("origin", manifest.kind + (f": {manifest.import_format}" if manifest.import_format else "")),
        ("acceptance", GRADE_LIMITS[acceptance_grade(manifest)]),
        ("decoding", how),
        ("device", f"{manifest.device.name} ({manifest.device.kind}{threads})"),
        ("software", ", ".join(f"{k} {v}" for k, v in manifest.software.items()) or "unknown"),
        ("seed", "unknown" if manifest.seed is None else str(manifest.seed)),
        ("command", manifest.command or "unknown"),
        (
            "rows",
            f"{traces.sequences.num_rows:,} sequences, {traces.positions.num_rows:,} positions, "
            f"{traces.rollouts.num_rows:,} rollout steps, {traces.timings.num_rows:,} timings",
        ),
        ("integrity", traces.integrity),
    ]
    for name, value in rows:
        lines.add_row(Text(name, style="dim"), Text(value))
    return lines


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:,.1f} M" if value >= 1_000_000 else f"{value:,}"


def _models(manifest: Manifest) -> Table:
    table = _table("Models")
    for name in ("name", "role"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "no embedding", "layers", "hidden", "dtype"):
        table.add_column(name, justify="right")
    models: list[tuple[ModelInfo, str]] = [(manifest.verifier, "verifier")]
    models += [(info, info.paradigm) for info in manifest.drafters]
    for info, role in models:
        table.add_row(
            Text(info.name),
            Text(role),
            _count(info.parameters),
            _count(info.parameters_non_embedding),
            _count(info.layers),
            _count(info.hidden_size),
            info.dtype or "-",
        )
    return table


def _domains(traces: TraceSet) -> Table:
    table = _table("Domains")
    table.add_column("domain")
    for name in ("sequences", "prompt tokens", "output tokens", "ended by itself"):
        table.add_column(name, justify="right")
    frame = traces.sequences
    for domain in sorted(set(frame["domain"].to_pylist())):
        mine = frame.filter(pc.equal(frame["domain"], domain))
        stopped = pc.sum(pc.equal(mine["finish_reason"], "stop")).as_py()
        unknown = pc.sum(pc.equal(mine["finish_reason"], "unknown")).as_py()
        table.add_row(
            Text(domain),
            f"{mine.num_rows:,}",
            f"{pc.sum(mine['prompt_tokens']).as_py():,}",
            f"{pc.sum(mine['output_tokens']).as_py():,}",
            "unknown" if unknown else f"{stopped / mine.num_rows:.0%}",
        )
    return table


def _acceptance(traces: TraceSet) -> Table:
    table = _table("Acceptance over all positions (bonus token excluded)")
    table.add_column("drafter", no_wrap=True)
    for name in ("positions", "match", "overlap", "run", "proposes", "confidence"):
        table.add_column(name, justify="right")
    positions = traces.positions
    for info in traces.manifest.drafters:
        mine = positions.filter(pc.equal(positions["drafter"], info.name))
        if mine.num_rows:
            table.add_row(Text(info.name), f"{mine.num_rows:,}", *_acceptance_cells(mine))
    table.caption = (
        "Means over positions. match: probability that a token drafted there is accepted; overlap: sum of min(p, q); "
        "run: drafted tokens that match when drafting goes on; proposes: positions with any proposal; confidence: "
        "largest probability of the drafter"
    )
    return table


def _acceptance_cells(mine: pa.Table) -> list[str]:
    def mean(column: str) -> float:
        value = pc.mean(mine[column]).as_py()
        return float("nan") if value is None else float(value)

    proposed = mine["proposal_length"].drop_null().to_numpy()
    cells = [mean("accept_probability"), mean("overlap"), mean("run_length")]
    text = ["-" if np.isnan(value) else f"{value:.3f}" for value in cells]
    text.append(f"{np.mean(proposed > 0):.0%}" if len(proposed) else "always")
    confidence = mean("drafter_confidence")
    return [*text, "-" if np.isnan(confidence) else f"{confidence:.3f}"]


def _remarks(manifest: Manifest) -> list[Text]:
    lines = [Text(f"note: {note}") for note in manifest.notes]
    return lines + [Text(f"unknown: {item}", style="dim") for item in manifest.unknown]
