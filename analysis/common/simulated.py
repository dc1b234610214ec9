"""A simulation and what it warned of."""

from __future__ import annotations

import warnings

from calibration.common.errors import ExtrapolationWarning, PacelineWarning
from calibration.traces import TraceSet
from simulator import RunResult, Scenario, simulate


def simulate_and_hear(scenario: Scenario, traces: TraceSet | None) -> tuple[RunResult, tuple[str, ...]]:
    """Simulate; give the result and each thing it warned of, once.

    Extrapolation is left out: results carry their share of extrapolated iterations. Warnings of others go on.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PacelineWarning)
        result = simulate(scenario, traces=traces)
    said = []
    for warning in caught:
        if issubclass(warning.category, ExtrapolationWarning):
            continue
        if issubclass(warning.category, PacelineWarning):
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, tuple(dict.fromkeys(said))
