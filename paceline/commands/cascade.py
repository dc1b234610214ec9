"""The command that studies an adaptive cascade.

The command that simulates a cascade under traffic.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.terminal.progress import progress_bars, say, stage

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.cascade import CascadeFindings
    from simulator.cascade import CascadeScenario, ItemTable

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
    from analysis.cascade.reading import frontier_csv, runs_csv
    from analysis.cascade.rules import fit_rule
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
        texts = (found.to_json(), frontier_csv(found), to_json(rule))
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


@click.command("simulate-cascade")
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.option("--items", help="Table of items: a CSV file or a bundled name, in place of the scenario's own.")
@click.option("--out", required=True, help="Folder for scenario.toml, summary.json and requests.parquet.")
def simulate_cascade(scenario: str, items: str | None, out: str) -> None:
    """Run the cascade in SCENARIO (a TOML file) under its traffic and write its results.

    Every stage is a fleet of its own; who answers what, and how well, comes from the table of items.
    """
    from simulator.cascade import load_cascade
    from simulator.cascade import simulate_cascade as run

    loaded = load_cascade(scenario)
    table = None if items is None else _items(items, loaded)
    with progress_bars() as progress:
        result = run(loaded, items=table, progress=stage(progress, "simulate"))
    path = result.write(out)
    say(_answers(result.summary), _stages(result.summary))
    click.echo(f"{path}")


def _items(name: str, scenario: CascadeScenario) -> ItemTable:
    """Read a table of items by path, or a bundled one by name."""
    from calibration.common.errors import ScenarioError, did_you_mean
    from simulator.cascade import read_items
    from simulator.cascade.run import policy_signals

    bundled = resources.files("analysis.cascade") / "bundled"
    known = sorted(file.name.removesuffix(".csv") for file in bundled.iterdir() if file.name.endswith(".csv"))
    path = Path(name)
    if not path.is_file():
        if name not in known:
            raise ScenarioError(f"--items: no such file or bundled table, got '{name}'{did_you_mean(name, known)}")
        path = Path(str(bundled / f"{name}.csv"))
    return read_items(path, scenario.stages, policy_signals(scenario))


def _answers(summary: dict[str, Any]) -> Table:
    """Give the totals as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    title = escape(f"{summary['completed']} answers [simulated; {summary['distinct_items']} items]")
    table = Table(title=title, show_header=False)
    rows = {
        "answers a second": summary["request_throughput"],
        "quality (mean correct)": summary["quality"],
        "replica seconds an answer, busy": summary["busy_s_per_answer"],
        "replica seconds an answer, in all": summary["replica_s_per_answer"],
        "USD an answer": summary.get("usd_per_answer"),
        "cost an answer, by the table": summary.get("table_cost_per_answer"),
        "hand-overs an answer": summary["handovers_per_answer"],
        "TTFT of the answer, mean (ms)": summary["mean_ttft_ms"],
        "TTFT of the answer, p99 (ms)": summary["p99_ttft_ms"],
        "end to end, mean (ms)": summary["mean_e2el_ms"],
        "end to end, median (ms)": summary["median_e2el_ms"],
        "end to end, p99 (ms)": summary["p99_e2el_ms"],
        "answers a second that keep the SLO": summary.get("request_goodput"),
    }
    low, high = summary["quality_95"]
    table.add_row("quality, 95% interval over items", f"{low:.4g} .. {high:.4g}")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, f"{value:.4g}")
    return table


def _stages(summary: dict[str, Any]) -> Table:
    """Give what every stage did as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape("stages [simulated]"))
    for column in ("stage", "replicas", "ran", "answered", "utilisation", "busy s an answer"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, told in summary["stages"].items():
        shares = (f"{told[key]:.3f}" for key in ("ran", "answered", "utilisation"))
        table.add_row(name, str(told["replicas"]), *shares, f"{told['busy_s_per_answer']:.4g}")
    return table
