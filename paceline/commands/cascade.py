"""The command that studies an adaptive cascade."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from paceline.terminal.progress import say

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.cascade import CascadeFindings

FILES = ("cascade.json", "frontier.csv", "policy.json")
"""What the command writes: the findings, every point of every policy, and the fitted rule."""


@click.command("cascade")
@click.argument("table", required=False)
@click.option("--bundled", is_flag=True, help="Study the table that comes with the package.")
@click.option("--out", default="paceline-cascade", show_default=True, help="Folder for the findings and the rule.")
@click.option("--cost", "costs", multiple=True, metavar="STAGE=C", help="Cost of a stage per item; may be repeated.")
@click.option("--stages", default="", metavar="A,B,...", help="Only these stages, in this order.")
@click.option("--lambda", "lambdas", default="", metavar="L,L,...", help="Values of a correct answer, in cost units.")
@click.option("--known-domain", is_flag=True, help="The domain of an item is known before any stage runs.")
@click.option("--continued", is_flag=True, help="Stages go on from each other: a later one costs what it adds.")
@click.option("--runs-at", metavar="L", type=float, help="Also write the stages of every item at this lambda.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of folds and intervals.")
def cascade_command(
    table: str | None,
    bundled: bool,
    out: str,
    costs: tuple[str, ...],
    stages: str,
    lambdas: str,
    known_domain: bool,
    continued: bool,
    runs_at: float | None,
    seed: int,
) -> None:
    """When should a cascade of models stop? Learn it from TABLE, per-item correctness of every stage.

    TABLE is a CSV or Parquet file (a row per item and stage: item, domain, stage, correct, cost, then signals such
    as confidence; or a row per item with a column per stage, and --cost), or the name of a bundled table. Writes
    cascade.json, frontier.csv and policy.json; with --runs-at a runs-POLICY.csv for every learned policy, which a
    cascade scenario replays under traffic (policy "assigned").
    """
    from analysis.cascade import read_quality_table, study_cascade
    from analysis.cascade import study as studying
    from analysis.cascade.export import frontier_csv, runs_csv
    from analysis.cascade.rule import fit_rule
    from analysis.common.records import to_json
    from calibration.common.errors import ReportError
    from calibration.common.files import fresh_folder

    source = _source(table, bundled)
    order = [stage for stage in stages.split(",") if stage]
    read = read_quality_table(source, costs=_costs(costs), stages=order, continued=continued)
    found = study_cascade(read, _lambdas(lambdas), seed, known_domain=known_domain)
    rule = fit_rule(read, seed, known_domain=known_domain)
    runs = {} if runs_at is None else studying.runs_at(read, runs_at, seed, known_domain=known_domain)
    with fresh_folder(out, FILES[0], error=ReportError, what="cascade study") as folder:
        texts = (to_json(found), frontier_csv(found), to_json(rule))
        for name, text in zip(FILES, texts, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        for policy, choice in runs.items():
            (folder / f"runs-{policy}.csv").write_text(runs_csv(read, choice), encoding="utf-8")
    say(policies_table(found))
    click.echo(str(Path(out) / FILES[0]))


def _source(table: str | None, bundled: bool) -> str:
    from analysis.cascade import bundled_tables
    from calibration.common.errors import TraceError

    names = bundled_tables()
    if bundled and table is None:
        if not names:
            raise TraceError("cascade: no table comes with this installation; give TABLE")
        return names[0]
    if table is None or bundled:
        raise click.UsageError(f"give either TABLE or --bundled; bundled tables: {', '.join(names) or 'none'}")
    return table


def _costs(given: tuple[str, ...]) -> dict[str, float]:
    from calibration.common.errors import TraceError

    found = {}
    for text in given:
        stage, mark, cost = text.rpartition("=")
        try:
            found[stage] = float(cost)
        except ValueError:
            mark = ""
        if not mark or not stage:
            raise TraceError(f"--cost: must be STAGE=NUMBER, got '{text}'")
    return found


def _lambdas(text: str) -> list[float] | None:
    from calibration.common.errors import ReplayError

    try:
        return [float(one) for one in text.split(",") if one.strip()] or None
    except ValueError:
        raise ReplayError(f"--lambda: must be numbers between commas, got '{text}'") from None


def policies_table(found: CascadeFindings) -> Table:
    """Give utilities, gains (bounds that hold for all policies and lambdas) and shares of answers at up to five."""
    from rich.table import Table

    table = Table(title=f"{found.name}: {found.items} items, {len(found.stages)} stages [{found.label}]")
    for name in ("lambda", "policy", "quality", "cost", "gain over best single stage"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    table.add_column("answered by " + " / ".join(stage.name for stage in found.stages), justify="right")
    step = max(1, (len(found.lambdas) - 1) // 4)
    for at in sorted({*range(0, len(found.lambdas), step), len(found.lambdas) - 1}):
        for curve in found.policies:
            point = curve.points[at]
            shares = " / ".join(f"{100 * (share.value or 0):.0f}%" for share in point.answered)
            cells = (point.quality.text, point.cost.text, point.gain_together.text, shares)
            table.add_row(f"{point.lam:g}", curve.policy, *cells)
        table.add_section()
    return table
