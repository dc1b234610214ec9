"""Validate: predict every measured run below a folder and compare."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from analysis.fidelity.counts import NOT_COUNTED, PARTS, Count, counts, split_error
from analysis.fidelity.measured import MeasuredCondition, find_conditions, summaries, text_note
from analysis.fidelity.predict import crossovers, own_steps, predict, predicted_scenario, price_notes
from analysis.fidelity.table import QUANTITIES, Compared, Condition, Fidelity, Source
from calibration.common.errors import PacelineError, ScenarioError, TraceError
from calibration.common.files import write_whole
from calibration.common.progress import Progress
from calibration.common.settings import FromList, Table
from calibration.common.toml import check, read_toml
from calibration.traces import TraceSet
from simulator.experiments.pool import Outcome
from simulator.running.run import read_traces
from simulator.scenario.scenario import Scenario
from simulator.scenario.workload import ClosedLoop

SOURCE_FILE = "source.toml"
FILES = ("fidelity.json", "conditions.csv")


class SourceInfo(Table):
    """``source.toml`` of a source, each key optional: how to call it and what to tell of it."""

    title: str | None = None
    fitted_on: str | None = None
    explained: Annotated[tuple[str, ...], FromList] = ()
    citation: Annotated[str, Field(min_length=1)] | None = None


def validate(folder: str | os.PathLike[str], *, workers: int = 2, progress: Progress | None = None) -> Fidelity:
    """Predict every measured run below `folder` from the scenario beside it, and compare.

    A sub-folder is a source: one engine on one device; its ``source.toml`` may name it. `progress` hears (conditions
    predicted, in all). The result depends on the files alone, not on `workers` or the clock.

    Raises `TraceError` or `ScenarioError` for what is damaged, missing or leaks from a held-out run into a
    prediction of another.
    """
    root = Path(folder)
    found = find_conditions(root)
    infos = _source_infos(root, found)
    outcomes = predict(found, workers=workers, progress=progress)
    texts = _Texts()
    conditions = [
        _condition(one, outcome, texts, predicted_scenario(one, found))
        for one, outcome in zip(found, outcomes, strict=True)
    ]
    pairs = [(condition, one.scenario) for condition, one in zip(conditions, found, strict=True)]
    names = dict.fromkeys(one.source for one in found)
    return Fidelity(
        sources=tuple(_source(name, [one for one in found if one.source == name], infos[name]) for name in names),
        conditions=tuple(conditions),
        crossovers=crossovers(pairs),
        created=max(one.run.manifest.created for one in found),
    )


# --- sources


def _source_infos(root: Path, found: Sequence[MeasuredCondition]) -> dict[str, SourceInfo]:
    """Read what is told of each source; `ScenarioError` for a file of a folder without measured runs."""
    infos = {one.source: SourceInfo() for one in found}
    for file in sorted((*root.glob(SOURCE_FILE), *root.glob(f"*/{SOURCE_FILE}"))):
        name = file.parent.name if file.parent != root else root.resolve().name
        if name not in infos:
            raise ScenarioError(f"{file}: no measured run lies beside it")
        infos[name] = check(SourceInfo, read_toml(file, ScenarioError), str(file), ScenarioError)
    return infos


def _source(name: str, found: Sequence[MeasuredCondition], info: SourceInfo) -> Source:
    manifests = [one.run.manifest for one in found]
    engines = (f"{m.engine.name} {m.engine.version or ''}".strip() for m in manifests)
    fit = [one.name for one in found if one.run.manifest.role == "fit"]
    return Source(
        name=name,
        title=info.title or _different(engines),
        kind="measured",
        device=_different(m.device.name for m in manifests),
        clock=_different(m.clock for m in manifests),
        fitted_on=info.fitted_on or ", ".join(fit) or "nothing that was measured here",
        explained=info.explained,
        citation=info.citation,
    )


def _different(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))


# --- conditions


class _Texts:
    """Recorded texts, read once for all conditions that replay the same TraceSet."""

    def __init__(self) -> None:
        self._kept: dict[str, TraceSet] = {}

    def note(self, one: MeasuredCondition) -> str | None:
        if one.run.requests["output_token_ids"].null_count == one.run.requests.num_rows:
            return None
        return text_note(one.run, self.of(one))

    def of(self, one: MeasuredCondition) -> TraceSet:
        """Give the TraceSet that `one` replays."""
        source = one.scenario.traces
        place = source.bundled or str(one.scenario.locate(source.path or "").resolve())
        if place not in self._kept:
            self._kept[place] = read_traces(one.scenario)
        return self._kept[place]


def _condition(one: MeasuredCondition, outcome: Outcome, texts: _Texts, scenario: Scenario) -> Condition:
    """Compare one condition, whose prediction `outcome` is that of `scenario`: acceptance first, then time."""
    manifest = one.run.manifest
    try:
        measured = summaries(one.run, one.scenario)
    except PacelineError as fault:
        raise type(fault)(f"{one.folder}: {fault}") from None
    notes = [note for note in (texts.note(one), *price_notes(outcome)) if note is not None]
    if own_steps(one):
        notes.append("in-sample: priced from its own steps")
    if manifest.scenario_hash != one.scenario.hash:
        notes.append("the scenario beside it was changed after the measurement")
    if one.run.unverified:
        notes.append(f"unverified: measured.json states no sha256 of {', '.join(one.run.unverified)}")
    notes += [f"{', '.join(told.tables)}: {told.reason}, sealed {told.sealed}" for told in manifest.sealed]
    return Condition(
        source=one.source,
        name=one.name,
        role=manifest.role,
        repeats=manifest.repeats,
        compared=compare(measured, outcome.summary),
        labels=labels_of(one.scenario),
        open_loop=not isinstance(one.scenario.workload, ClosedLoop),
        notes=tuple(notes),
        counts=counts(one.run, outcome.summary),
        split=split_error(one.run, measured, outcome.summary, scenario, texts.of(one)),
    )


def compare(measured: Sequence[dict[str, Any]], predicted: dict[str, Any]) -> tuple[Compared, ...]:
    """Compare the mean over repeats of every quantity that both sides have, none of them zero."""
    found = []
    for name in QUANTITIES:
        values = [summary[name] for summary in measured if name in summary]
        if len(values) < len(measured) or name not in predicted:
            continue
        mean = float(np.mean(values))
        if not (math.isfinite(mean) and mean > 0 and math.isfinite(predicted[name])):
            continue
        spread = (max(values) - min(values)) / 2 / mean if len(values) > 1 else None
        found.append(Compared(name, mean, float(predicted[name]), spread))
    return tuple(found)


def labels_of(scenario: Scenario) -> dict[str, str]:
    """Give what varies between conditions, as text: drafter, draft length, policy, batch, arrivals and domains."""
    stopping, load = scenario.stopping, scenario.workload
    longest = next((n for key in ("draft_tokens", "max_draft_tokens") if (n := getattr(stopping, key, None))), None)
    drafter = scenario.drafter.name if scenario.drafter is not None else "several"
    labels = {
        "drafter": drafter if scenario.speculates else "none",
        "policy": stopping.policy,
        "draft_tokens": "0" if not scenario.speculates else str(longest) if longest else "varies",
        "batch": str(scenario.engine.max_num_seqs),
        "arrivals": load.kind,
    }
    if isinstance(load, ClosedLoop):
        labels["concurrency"] = str(load.concurrency)
    elif (rate := getattr(load, "rate_rps", None)) is not None:
        labels["rate_rps"] = f"{rate:g}"
    domains = scenario.traces.domains or tuple(getattr(load, "mix", None) or ())
    return labels | ({"domain": ", ".join(domains)} if domains else {})


# --- files


def write(fidelity: Fidelity, folder: str | os.PathLike[str]) -> Path:
    """Write ``fidelity.json`` and ``conditions.csv`` (a row for each quantity of each condition) to `folder`."""
    target = Path(folder)
    text = TypeAdapter(Fidelity).dump_json(fidelity, indent=2).decode()
    write_whole(target / FILES[0], text + "\n")
    write_whole(target / FILES[1], to_csv(fidelity))
    return target


def read(folder: str | os.PathLike[str]) -> Fidelity:
    """Read what `write` wrote; `TraceError` where it is missing or damaged."""
    path = Path(folder) / FILES[0]
    try:
        return TypeAdapter(Fidelity).validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TraceError(f"{path}: not found; paceline validate writes it") from None
    except (ValidationError, UnicodeDecodeError) as fault:
        raise TraceError(f"{path}: not readable, truncated or damaged ({fault})") from None


def to_csv(fidelity: Fidelity) -> str:
    """Give all comparisons as CSV, fitted ones too: acceptance first, then times, then whose the errors are.

    Errors are predicted / measured - 1. Rows ``split_..`` have an error alone: the part of that of the mean
    end-to-end time (see `analysis.fidelity.counts`).
    """
    labels = list(dict.fromkeys(name for condition in fidelity.conditions for name in condition.labels))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    own = ("source", "condition", "role", "open_loop", "repeats", *labels)
    writer.writerow((*own, "quantity", "unit", "measured", "predicted", "error", "spread", "notes"))
    for rows in (_count_rows, _time_rows, _split_rows):
        for one in fidelity.conditions:
            told = (one.source, one.name, one.role, str(one.open_loop).lower(), one.repeats)
            varies = [one.labels.get(name, "") for name in labels]
            writer.writerows((*told, *varies, *row, "; ".join(one.notes)) for row in rows(one))
    return out.getvalue()


Cells = tuple[str, ...]


def _count_rows(one: Condition) -> list[Cells]:
    return [_count_cells(found) for found in one.counts]


def _count_cells(found: Count) -> Cells:
    counted = NOT_COUNTED if found.counted is None else f"{found.counted:.6g}"
    error = "" if found.error is None else f"{found.error:.6g}"
    return (found.name, found.unit, counted, f"{found.predicted:.6g}", error, "")


def _time_rows(one: Condition) -> list[Cells]:
    rows: list[Cells] = []
    for found in one.compared:
        spread = "" if found.spread is None else f"{found.spread:.6g}"
        numbers = (f"{found.measured:.6g}", f"{found.predicted:.6g}", f"{found.error:.6g}", spread)
        rows.append((found.name, QUANTITIES[found.name][1], *numbers))
    return rows


def _split_rows(one: Condition) -> list[Cells]:
    if one.split is None:
        return []
    parts = ((name, getattr(one.split, name)) for name in PARTS)
    return [(f"split_{name}", "", "", "", f"{part:.6g}", "") for name, part in parts if part is not None]
