"""paceline: predict what speculative decoding will bring, by replaying recorded behaviour of real models.

The command line is `main`; the public names below are re-exported from the four packages and loaded when used:

    TraceSet, bundled, bundled_names        calibration: recorded behaviour
    Scenario, load_scenario, simulate       simulator: replay it under traffic and policies
    load_cascade, simulate_cascade          simulator: a cascade of models under traffic
    study, study_*, find_laws, tune,        analysis: what follows from it, with intervals
    plan_capacity, read_quality_table
    write_report                            reports: the PDF

    >>> import paceline
    >>> traces = paceline.bundled("smollm2-135m-cpu-greedy")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

from paceline.commands.cascade import cascade_command
from paceline.commands.cascade import simulate_cascade as simulate_cascade_command
from paceline.commands.grade import grade
from paceline.commands.imports import import_
from paceline.commands.observe import observe
from paceline.commands.record import calibrate, distill, time_shapes_command
from paceline.commands.simulate import compare_command, simulate_command, sweep_command
from paceline.commands.study import demo, report
from paceline.commands.traces import keys_command, traces
from paceline.commands.tune import tune as tune_command
from paceline.commands.validate import validate
from paceline.terminal.progress import Failsafe

if TYPE_CHECKING:
    from analysis import study
    from analysis.capacity import plan_capacity
    from analysis.cascade import read_quality_table, study_cascade
    from analysis.knowledge import study_knowledge
    from analysis.laws import find_laws
    from analysis.routing import study_routing
    from analysis.size import study_size
    from analysis.tokens import study_tokens
    from analysis.tuning import tune
    from calibration import PacelineError, PacelineWarning, TraceSet, bundled, bundled_names
    from reports import write_report
    from simulator import RunResult, Scenario, load_scenario, simulate
    from simulator.cascade import load_cascade, simulate_cascade

_HOME = {
    "PacelineError": "calibration",
    "PacelineWarning": "calibration",
    "RunResult": "simulator",
    "Scenario": "simulator",
    "TraceSet": "calibration",
    "bundled": "calibration",
    "bundled_names": "calibration",
    "find_laws": "analysis.laws",
    "load_cascade": "simulator.cascade",
    "load_scenario": "simulator",
    "plan_capacity": "analysis.capacity",
    "read_quality_table": "analysis.cascade",
    "simulate": "simulator",
    "simulate_cascade": "simulator.cascade",
    "study": "analysis",
    "study_cascade": "analysis.cascade",
    "study_knowledge": "analysis.knowledge",
    "study_routing": "analysis.routing",
    "study_size": "analysis.size",
    "study_tokens": "analysis.tokens",
    "tune": "analysis.tuning",
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
    "find_laws",
    "load_cascade",
    "load_scenario",
    "main",
    "plan_capacity",
    "read_quality_table",
    "simulate",
    "simulate_cascade",
    "study",
    "study_cascade",
    "study_knowledge",
    "study_routing",
    "study_size",
    "study_tokens",
    "tune",
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
