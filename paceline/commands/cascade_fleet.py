"""The command that simulates a cascade under traffic."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.terminal.progress import progress_bars, say, stage

if TYPE_CHECKING:
    from rich.table import Table

    from simulator.cascade import CascadeScenario, ItemTable


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
