"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.speedup.findings import Findings
from reports.page.text import estimate, sample, short
from reports.questions.answer import best_at, cell, judged, pays_at, verdict

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from analysis.fidelity.table import Fidelity
    from calibration.traces import TraceSet


def summary_table(findings: Findings) -> Table:
    """Give a rich table: every drafter at the smallest batch size, the verdict below it."""
    from rich.table import Table
    from rich.text import Text

    batch = findings.answer.headline.batch
    table = Table(
        title=f"Speculative decoding at batch {batch}, {sample(findings)}",
        caption=Text(f"{verdict(findings)}\n{_evidence(findings)}".strip().replace("\u200b", "")),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("drafter", no_wrap=True)
    for name in ("draft", "speed-up", "tokens", "break-even", "pays at"):
        table.add_column(name, justify="right", no_wrap=True)
    for drafter in findings.drafters:
        best = best_at(findings, drafter, batch)
        if best is None:
            continue
        got = cell(findings, best)
        crossover = next(c for c in findings.crossovers if c.drafter == drafter and c.domain is None)
        table.add_row(
            Text(short(drafter)),
            str(best.speculative_tokens),
            Text(estimate(judged(best)), style="bold" if best.pays else ""),
            "-" if got.tokens_per_round is None else f"{got.tokens_per_round:.2f}",
            "-" if got.break_even_tokens is None else f"{got.break_even_tokens:.2f}",
            pays_at(crossover),
        )
    return table


def _evidence(findings: Findings) -> str:
    from reports.page.document import evidence_line

    evidence = findings.provenance.evidence
    return "" if evidence is None else f"Stands on: {evidence_line([('', evidence)])}"


def acceptance_table(fidelity: Fidelity) -> Table | None:
    """Give a rich table: drafts, tokens and acceptance of every condition, predicted / counted; None without any."""
    from rich.table import Table
    from rich.text import Text

    from reports.page.text import COUNT_HEADER, count_cells, counted

    rows = counted(fidelity)
    if not rows:
        return None
    table = Table(title="Acceptance: predicted / counted by the engine", title_justify="left")
    for name in COUNT_HEADER:
        table.add_column(name, justify="left" if name == COUNT_HEADER[0] else "right", overflow="fold")
    for one in rows:
        style = "bold" if any(count.material for count in one.counts) else ""
        table.add_row(Text(f"{one.source}: {one.name}"), *count_cells(one), style=style)
    return table


def split_table(fidelity: Fidelity) -> Table | None:
    """Give a rich table: the error of the mean end-to-end time of every condition and whose it is; None without."""
    from rich.table import Table
    from rich.text import Text

    from reports.page.text import SPLIT_HEADER, SPLIT_NOTE, split_cells

    if not any(one.split for one in fidelity.conditions):
        return None
    table = Table(title="Whose error it is", caption=SPLIT_NOTE, caption_justify="left", title_justify="left")
    for name in SPLIT_HEADER:
        table.add_column(name, justify="left" if name == SPLIT_HEADER[0] else "right", overflow="fold")
    for one in fidelity.conditions:
        if one.split is not None:
            table.add_row(Text(f"{one.source}: {one.name}"), *split_cells(one.split))
    return table


def fidelity_table(fidelity: Fidelity) -> Table:
    """Give a rich table: errors over held-out conditions, a row for each source and quantity."""
    from rich.table import Table
    from rich.text import Text

    from analysis.fidelity.table import QUANTITIES, errors_of, missed
    from reports.page.text import SUMMARISED, error_cells

    late = {(source, name) for source, name, *_ in missed(fidelity)}
    table = Table(
        title="Predicted against measured: errors over held-out conditions",
        caption="bold: a target is missed; spread: of the engine's own repeats",
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("source")
    table.add_column("quantity")
    for name in ("n", "median", "worst", "bias", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for source in fidelity.sources:
        for name in SUMMARISED:
            errors = errors_of(name, fidelity.held_out(source.name))
            if errors is not None:
                style = "bold" if (source.name, name) in late else ""
                table.add_row(Text(source.name), QUANTITIES[name][0], *error_cells(errors), style=style)
    return table


def definitions_table(traces: TraceSet, draft_tokens: int = 4) -> Group:
    """Give rich tables: acceptance of every drafter under each definition in use, rounds of `draft_tokens`.

    Replayed from the recording, all domains pooled, 95% intervals over requests; see `analysis.speedup.acceptance`.
    """
    import numpy as np
    from rich.console import Group
    from rich.text import Text

    from analysis.common.bootstrap import ClusterBootstrap
    from analysis.common.rounds import recording, replay_rounds
    from analysis.speedup.acceptance import acceptance_rows, depth_points

    bootstrap = ClusterBootstrap(traces.sequences["domain"].to_pylist(), np.random.default_rng(0))
    rates = _plain_table(
        f"Acceptance by definition, rounds that draft {draft_tokens}; 95% intervals over requests",
        ("accepted/drafted", "position rate", "mean overlap", "geometric"),
    )
    depths = _plain_table(
        "Conditional acceptance by depth, and tokens per round (bonus token included there only)",
        (*(f"depth {depth}" for depth in range(1, draft_tokens + 1)), "tokens per round"),
    )
    for info in traces.manifest.drafters:
        recorded = recording(traces, info.name)
        length = min(draft_tokens, info.max_draft_tokens or draft_tokens)
        rounds = replay_rounds(recorded, length)
        (row,) = acceptance_rows(recorded, rounds, bootstrap, [None])
        name = Text(info.name if length == draft_tokens else f"{info.name} (drafts {length})")
        values = (row.accepted_per_drafted, row.position_rate, row.mean_overlap, row.geometric_rate)
        rates.add_row(name, *(estimate(value).replace("0.", ".") for value in values))
        points = [point.conditional.value for point in depth_points(recorded, rounds, bootstrap, [None])]
        cells = ["-" if value is None else f"{value:.2f}" for value in points]
        depths.add_row(name, *cells, *[""] * (draft_tokens - length), estimate(row.tokens_per_round))
    return Group(rates, depths)


def _plain_table(title: str, columns: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("drafter", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
