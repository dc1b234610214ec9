"""Commands that simulate: simulate, compare and sweep."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.terminal.progress import progress_bars, say, stage

_WORKERS = click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes; results do not depend on it."
)


@click.command("simulate")
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.option("--out", required=True, help="Folder for summary.json, requests.parquet and iterations.parquet.")
@click.option("--replications", type=click.IntRange(2), help="Run that many seeds; give means with intervals.")
@_WORKERS
def simulate_command(scenario: str, out: str, replications: int | None, workers: int) -> None:
    """Run SCENARIO (a TOML file) and write its results."""
    from paceline.terminal.runs import replications_table, summary_table
    from simulator import load_scenario, replicate
    from simulator import simulate as run

    loaded = load_scenario(scenario)
    with progress_bars() as progress:
        if replications:
            several = replicate(loaded, replications, workers=workers, progress=stage(progress, "simulate"))
            path, table = several.write(out), replications_table(several)
        else:
            result = run(loaded, progress=stage(progress, "simulate"))
            path, table = result.write(out), summary_table(result.summary)
    say(table)
    click.echo(f"{path}")


@click.command("compare")
@click.argument("scenarios", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--replications", default=10, show_default=True, type=click.IntRange(2), help="Seeds, shared by all.")
@click.option("--out", help="Folder for comparison.json and the table of runs.")
@_WORKERS
def compare_command(scenarios: tuple[str, ...], replications: int, out: str | None, workers: int) -> None:
    """Run the first of SCENARIOS against each other one, on common random numbers."""
    from paceline.terminal.runs import comparison_table
    from simulator import compare, load_scenario

    loaded = [load_scenario(path) for path in scenarios]
    with progress_bars() as progress:
        found = compare(*loaded, replications=replications, workers=workers, progress=stage(progress, "simulate"))
    say(comparison_table(found))
    if out:
        click.echo(f"{found.write(out)}")


@click.command("sweep")
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.argument("axes", nargs=-1, metavar="[KEY=VALUE,VALUE...]...")
@click.option("--out", required=True, help="Table to write: .csv or .parquet.")
@click.option("--store", help="sqlite file that keeps finished cells; default: beside --out.")
@click.option("--replications", type=click.IntRange(1), help="Seeds per cell.")
@_WORKERS
def sweep_command(
    scenario: str, axes: tuple[str, ...], out: str, store: str | None, replications: int | None, workers: int
) -> None:
    """Run SCENARIO for every combination of values, e.g. stopping.draft_tokens=1,2,4 engine.max_num_seqs=1,8.

    Finished cells are kept: an interrupted sweep goes on where it stopped.
    """
    from paceline.terminal.runs import sweep_table
    from simulator import load_sweep, run_sweep
    from simulator.experiments.sweep import check_format

    check_format(out)
    plan = load_sweep(scenario, axes, replications)
    with progress_bars() as progress:
        found = run_sweep(
            plan,
            store=store or Path(out).with_suffix(".sqlite"),
            workers=workers,
            progress=stage(progress, "sweep"),
        )
    say(sweep_table(found))
    click.echo(f"{found.write(out)}")
