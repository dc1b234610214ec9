"""paceline: predict what speculative decoding will bring, by replaying recorded behaviour of real models.

The command line is `main`; the public names below are re-exported from the four packages and loaded when used:

    TraceSet, bundled, bundled_names        calibration: recorded behaviour
    Scenario, load_scenario, simulate       simulator: replay it under traffic and policies
    study                                   analysis: what follows from it, with intervals
    write_report                            reports: the PDF

    >>> import paceline
    >>> traces = paceline.bundled("smollm2-135m-cpu-greedy")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

from paceline.commands.cascade import cascade_command
from paceline.commands.cascade_fleet import simulate_cascade as simulate_cascade_command
from paceline.commands.grade import grade
from paceline.commands.imports import import_
from paceline.commands.keys import keys_command
from paceline.commands.observe import observe
from paceline.commands.record import calibrate, distill, time_shapes_command
from paceline.commands.simulate import compare_command, simulate_command, sweep_command
from paceline.commands.study import demo, report
from paceline.commands.traces import traces
from paceline.commands.tune import tune as tune_command
from paceline.commands.validate import validate
from paceline.terminal import Failsafe

if TYPE_CHECKING:
    from analysis import study
    from calibration import PacelineError, PacelineWarning, TraceSet, bundled, bundled_names
    from reports import write_report
    from simulator import RunResult, Scenario, load_scenario, simulate

_HOME = {
    "PacelineError": "calibration",
    "PacelineWarning": "calibration",
    "RunResult": "simulator",
    "Scenario": "simulator",
    "TraceSet": "calibration",
    "bundled": "calibration",
    "bundled_names": "calibration",
    "load_scenario": "simulator",
    "simulate": "simulator",
    "study": "analysis",
    "write_report": "reports",
}

__all__ = [
    "PacelineError",
    "PacelineWarning",
    "RunResult",
    "Scenario",
    "TraceSet",
    "bundled",
    "bundled_names",
    "load_scenario",
    "main",
    "simulate",
    "study",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `paceline --help` does not pay for pyarrow, pydantic and scipy.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'paceline' has no attribute '{name}'")


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
