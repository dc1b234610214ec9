"""The command that grades models: which stage of a cascade answers which item rightly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from paceline.terminal.progress import command_line, progress_bars, say

if TYPE_CHECKING:
    from rich.table import Table

    from calibration.grading.job import Grading


@click.command()
@click.option("--verifier", help="A model whose exits are graded: smollm2-135m, a local folder or a hub name.")
@click.option("--exits", help="Layers of its exits, as 20,24,28; the whole model is always the last stage.")
@click.option("--models", help="Several models as stages, the cheapest first, with commas: A,B,C.")
@click.option("--items", default="builtin", show_default=True, help="builtin, or a JSONL file of your own items.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Draws the built-in items.")
@click.option("--limit", "limit_per_domain", type=click.IntRange(1), help="Items per domain.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Items read at once.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8"]),
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The table to write (.csv).")
def grade(out: str, exits: str | None, models: str | None, **options: object) -> None:
    """Measure how often each stage of a cascade answers rightly.

    Stages are exits of one model (--verifier and --exits) or several models (--models). Writes a table with a row
    per item and stage, and a manifest beside it that says how it was made; both at the end, whole or not at all.
    """
    from calibration.common.errors import CalibrationError
    from calibration.grading.job import GradingSettings, run_grading, write_grading

    if not out.endswith(".csv"):
        raise CalibrationError(f"out: must end in .csv, got '{Path(out).name}'")
    settings = GradingSettings(
        exits=_layers(exits),
        models=tuple(name for name in (models or "").split(",") if name),
        command=command_line(),
        **options,  # type: ignore[arg-type]  # click has checked them
    )
    with progress_bars() as progress:
        grading = run_grading(settings, progress)
    target = write_grading(grading, out)
    say(_table(grading))
    click.echo(str(target))


def _layers(given: str | None) -> tuple[int, ...]:
    """Give the layers of ``20,24,28``."""
    from calibration.common.errors import CalibrationError

    try:
        return tuple(int(part) for part in (given or "").split(",") if part)
    except ValueError:
        raise CalibrationError(f"exits: must be numbers of layers with commas, as 20,24,28, got '{given}'") from None


def _table(grading: Grading) -> Table:
    """Give quality and cost of every stage as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape("graded quality [measured]"))
    for column in ("stage", "items", "quality", "95% interval", "chance", "greedy exact", "cost (s)"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, told in grading.manifest["stages"].items():
        low, high = told["quality_95"]
        table.add_row(
            name,
            str(told["items"]),
            f"{told['quality']:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{told['chance']:.3f}",
            f"{told['greedy_exact']:.3f}",
            f"{told['cost_s']:.4g}",
        )
    return table
