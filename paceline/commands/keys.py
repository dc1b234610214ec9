"""The command that prints references of the files that a user writes."""

from __future__ import annotations

import importlib

import click

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
