"""The summary for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.findings import Findings
from reports.answer import best_at, cell, verdict
from reports.text import estimate, sample, short

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(findings: Findings) -> Table:
    """Give a rich table: every drafter at the smallest batch size, the verdict below it."""
    from rich.table import Table
    from rich.text import Text

    batch = findings.answer.headline.batch
    table = Table(
        title=f"Speculative decoding at batch {batch}, {sample(findings)}",
        caption=Text(verdict(findings).replace("\u200b", "")),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("drafter", no_wrap=True)
    for name in ("draft", "speed-up", "tokens", "needed", "pays up to"):
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
            Text(estimate(best.speedup), style="bold" if best.pays else ""),
            "-" if got.tokens_per_round is None else f"{got.tokens_per_round:.2f}",
            "-" if got.break_even_tokens is None else f"{got.break_even_tokens:.2f}",
            "-" if crossover.last_paying is None else str(crossover.last_paying),
        )
    return table
