"""paceline: predict what speculative decoding will bring, by replaying recorded behaviour of real models.

The command line is `main`; the public names below are re-exported from the four packages and loaded when used:

    TraceSet, bundled, bundled_names        calibration: recorded behaviour
    import_evidence                         calibration: what engines and benchmarks reported
    Scenario, load_scenario, simulate       simulator: replay it under traffic and policies
    compare, sweep                          simulator: scenarios on common random numbers, grids of them
    load_cascade, simulate_cascade          simulator: a cascade of models under traffic
    observe, validate                       analysis: run scenarios on a real server, compare with predictions
    study, study_*, find_laws, tune,        analysis: what follows from it, with intervals
    plan_capacity, read_quality_table
    write_report                            reports: the PDF

    >>> import paceline
    >>> traces = paceline.bundled("smollm2-135m-cpu-greedy")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis import study
    from analysis.capacity import plan_capacity
    from analysis.cascade import read_quality_table, study_cascade
    from analysis.fidelity.observing import observe
    from analysis.fidelity.validate import validate
    from analysis.knowledge import study_knowledge
    from analysis.laws import find_laws
    from analysis.routing import study_routing
    from analysis.size import study_size
    from analysis.tokens import study_tokens
    from analysis.tuning import tune
    from calibration import PacelineError, PacelineWarning, TraceSet, bundled, bundled_names
    from calibration.importers import import_evidence
    from paceline.cli import main
    from reports import write_report
    from simulator import RunResult, Scenario, load_scenario, simulate
    from simulator.cascade import load_cascade, simulate_cascade
    from simulator.experiments.compare import compare
    from simulator.experiments.sweep import sweep

_HOME = {
    "PacelineError": "calibration",
    "PacelineWarning": "calibration",
    "RunResult": "simulator",
    "Scenario": "simulator",
    "TraceSet": "calibration",
    "bundled": "calibration",
    "bundled_names": "calibration",
    "compare": "simulator.experiments.compare",
    "find_laws": "analysis.laws",
    "import_evidence": "calibration.importers",
    "load_cascade": "simulator.cascade",
    "load_scenario": "simulator",
    "main": "paceline.cli",
    "observe": "analysis.fidelity.observing",
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
    "sweep": "simulator.experiments.sweep",
    "tune": "analysis.tuning",
    "validate": "analysis.fidelity.validate",
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
    "compare",
    "find_laws",
    "import_evidence",
    "load_cascade",
    "load_scenario",
    "main",
    "observe",
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
    "sweep",
    "tune",
    "validate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `paceline --help` does not pay for pyarrow, pydantic and scipy.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'paceline' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
