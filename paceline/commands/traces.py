"""Commands on recorded behaviour: show, check and list it.

The command that prints references of the files that a user writes.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from paceline.terminal.progress import read_traces, say


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
    """Check the TraceSet in FOLDER against the contract, and its tables against their sha256."""
    checked = read_traces(folder)
    rows = ", ".join(
        f"{getattr(checked, name).num_rows:,} {name}" for name in ("sequences", "positions", "rollouts", "timings")
    )
    click.echo(f"{folder}: keeps the contract ({rows})")
    click.echo(f"{folder}: {checked.integrity}")


@traces.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def seal(folder: str) -> None:
    """State the sha256 of the tables in FOLDER anew, after an edit on purpose.

    FOLDER is a TraceSet or a measured run. The whole contract is checked first; the manifest then says which tables
    were edited by hand, and so do `traces show` and every result. In pandas, read_parquet(...,
    dtype_backend="pyarrow") keeps the types that the contract asks for.
    """
    from calibration.measured import run as measured
    from calibration.traces import traceset

    is_run = (Path(folder) / measured.MARKER).is_file()
    new = (measured.seal if is_run else traceset.seal)(folder)
    for one in new:
        click.echo(f"{folder}: sealed {', '.join(one.tables)} ({one.reason})")
    if not new:
        click.echo(f"{folder}: every table has the sha256 that its manifest says, nothing to seal")


@traces.command("list")
def list_bundled() -> None:
    """Name the TraceSets that come with the package."""
    from calibration.traces import bundled_names

    for name in bundled_names():
        click.echo(name)


_FILES = {
    "scenario": ("scenario", "simulator", "Scenario"),
    "calibrate": ("recording job", "calibration.jobs.jobfile", "Job"),
    "distill": ("distillation job", "calibration.training.jobfile", "DistillJob"),
    "heads": ("heads job", "calibration.training.head_job", "HeadsJob"),
    "cascade": ("cascade scenario", "simulator.cascade", "CascadeScenario"),
    "time-shapes": ("timing job", "calibration.timing", "TimingJob"),
}
"""Files that a user writes: name -> (what it is called, where its model lives, the model)."""


@click.command("keys")
@click.argument("file", default="scenario", type=click.Choice(list(_FILES)))
def keys_command(file: str) -> None:
    """Print the reference of the keys of a FILE that you write (Markdown)."""
    from calibration.common.reference import reference

    what, module, model = _FILES[file]
    page = reference(getattr(importlib.import_module(module), model), what, f"paceline keys {file}")
    click.echo(page, nl=False)
