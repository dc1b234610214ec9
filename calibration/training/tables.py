"""The results of a distillation job as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from calibration.training.run import StudentResult


def results_table(results: Sequence[StudentResult]) -> Table:
    """Show every student: size, training, and tokens per round of drafts of 4 on held-out text, by domain."""
    from rich.table import Table

    held_out = {domain: quality.held_out_tokens for result in results for domain, quality in result.quality.items()}
    domains = list(held_out)
    table = Table(
        title="Tokens per round of 4 drafts on held-out text, bonus included (expected given the text)",
        caption=f"measured on the verifier's stored states, n = {sum(held_out.values()):,} held-out tokens",
    )
    for name in ("student", "parameters", "of verifier", "learnt from", "tokens", *domains):
        table.add_column(name, justify="left" if name in ("student", "learnt from") else "right")
    for result in results:
        quality = [result.quality[d].tokens_per_round if d in result.quality else None for d in domains]
        table.add_row(
            result.name,
            f"{result.parameters / 1e6:.2f} M",
            f"{result.share:.1%}",
            ", ".join(result.learnt_from),
            f"{result.tokens:,}",
            *("-" if value is None else f"{value:.2f}" for value in quality),
        )
    return table
