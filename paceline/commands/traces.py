"""Commands on recorded behaviour: show, check and list it."""

from __future__ import annotations

import click

from paceline.terminal import read_traces, say


@click.group()
def traces() -> None:
    """Show, check and import recorded behaviour."""


@traces.command()
@click.argument("folder")
def show(folder: str) -> None:
    """Describe the TraceSet in FOLDER (or a bundled one by name)."""
    from calibration.traces.show import show as describe
    from reports import definitions_table

    described = read_traces(folder)
    say(describe(described), definitions_table(described))


@traces.command()
@click.argument("folder")
def validate(folder: str) -> None:
    """Check the TraceSet in FOLDER against the contract."""
    checked = read_traces(folder)
    rows = ", ".join(
        f"{getattr(checked, name).num_rows:,} {name}" for name in ("sequences", "positions", "rollouts", "timings")
    )
    click.echo(f"{folder}: keeps the contract ({rows})")


@traces.command("list")
def list_bundled() -> None:
    """Name the TraceSets that come with the package."""
    from calibration.traces import bundled_names

    for name in bundled_names():
        click.echo(name)
