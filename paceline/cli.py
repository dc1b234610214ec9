"""The command line: one group, a command for each question."""

from __future__ import annotations

import click

from paceline.commands.cascade import cascade_command
from paceline.commands.cascade import simulate_cascade as simulate_cascade_command
from paceline.commands.imports import import_
from paceline.commands.observe import observe, validate
from paceline.commands.record import calibrate, distill, grade, time_shapes_command
from paceline.commands.simulate import compare_command, simulate_command, sweep_command
from paceline.commands.study import demo, report
from paceline.commands.traces import keys_command, traces
from paceline.commands.tune import tune as tune_command
from paceline.terminal.progress import Failsafe


@click.group(cls=Failsafe, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paceline")
def main() -> None:
    """Predict what speculative decoding will bring, before anything is deployed.

    Record a drafter/verifier pair (calibrate), replay it under traffic (simulate), and hand on a report.
    """


traces.add_command(import_)
for _command in (
    demo,
    simulate_command,
    compare_command,
    sweep_command,
    tune_command,
    grade,
    cascade_command,
    simulate_cascade_command,
    report,
    keys_command,
    calibrate,
    distill,
    time_shapes_command,
    observe,
    validate,
    traces,
):
    main.add_command(_command)
