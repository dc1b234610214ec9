"""What a search tries to make best: one number of a run, and the service-level objectives that it must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calibration.common.errors import ScenarioError, did_you_mean
from simulator.scenario.scenario import Objectives, Scenario

OBJECTIVES = ("throughput", "goodput", "latency", "cost", "energy")
ATTAINMENT = 0.99
"""Share of requests that must keep the objectives, unless told otherwise."""
_UNITS = {
    "throughput": "output tokens/s",
    "goodput": "requests/s within the SLO",
    "cost": "USD per million output tokens",
    "energy": "joules per output token",
    "latency": "ms per output token after the first (mean TPOT)",
}


@dataclass(frozen=True)
class Goal:
    """What is made best: `metric` of a run's summary, times `scale`, in `unit`.

    `slo`: limits in ms by key. With objective ``goodput`` they are part of the number; with the others they are a
    constraint: a candidate is feasible if on average `attainment` of the requests keep all of them.
    """

    objective: str
    metric: str
    scale: float
    unit: str
    larger_is_better: bool
    slo: dict[str, float]
    attainment: float

    @property
    def constrained(self) -> bool:
        """Whether the objectives are a constraint."""
        return bool(self.slo) and self.objective != "goodput"

    def value(self, summary: Mapping[str, Any]) -> float:
        """Give the number of a run; `ScenarioError` where the run does not have it."""
        if self.metric not in summary:
            raise ScenarioError(f"--objective {self.objective}: {_MISSING[self.objective]}")
        return float(summary[self.metric]) * self.scale


_MISSING = {
    "latency": "the runs give no TPOT: outputs of one token have none",
    "throughput": "the runs give no throughput",
    "goodput": "needs service-level objectives, e.g. --slo ttft_ms=500,tpot_ms=50",
    "cost": "needs a price, e.g. --price-per-hour 2.5, or costs.usd_per_hour in the scenario",
    "energy": "the prices give no joules; they do where the timings of the TraceSet hold joules, and for "
    "costs of kind 'roofline' on a device with known power",
}


def make_goal(scenario: Scenario, objective: str, attainment: float = ATTAINMENT) -> Goal:
    """Give the goal of tuning `scenario` (which holds its ``[slo]`` and ``usd_per_hour``) for `objective`.

    Throughput counts all tokens of the engine where a closed loop keeps the batch full by fillers. Raises
    `ScenarioError` for an unknown objective and for one that the scenario cannot answer.
    """
    if objective not in OBJECTIVES:
        raise ScenarioError(
            f"--objective: must be one that is known, got '{objective}'{did_you_mean(objective, OBJECTIVES)}"
        )
    if not 0 < attainment <= 1:
        raise ScenarioError(f"--attainment: must be above 0 and at most 1, got {attainment:g}")
    slo = {} if scenario.slo is None else scenario.slo.model_dump(exclude_none=True)
    if objective == "goodput" and not slo:
        raise ScenarioError(f"--objective goodput: {_MISSING['goodput']}")
    if objective == "cost" and scenario.costs.usd_per_hour is None:
        raise ScenarioError(f"--objective cost: {_MISSING['cost']}")
    filled = bool(getattr(scenario.workload, "keep_full", False))
    metric = {
        "throughput": "engine_output_throughput" if filled else "output_throughput",
        "goodput": "request_goodput",
        "cost": "usd_per_million_output_tokens",
        "energy": "joules_per_million_output_tokens",
        "latency": "mean_tpot_ms",
    }[objective]
    scale = 1e-6 if objective == "energy" else 1.0
    larger = objective in ("throughput", "goodput")
    return Goal(objective, metric, scale, _UNITS[objective], larger, slo, attainment)


def parse_slo(text: str) -> dict[str, float]:
    """Give the limits in ``ttft_ms=500,tpot_ms=50``; `ScenarioError` names every faulty piece.

    >>> parse_slo("ttft_ms=500,tpot_ms=50")
    {'ttft_ms': 500.0, 'tpot_ms': 50.0}
    """
    keys = tuple(Objectives.model_fields)
    found: dict[str, float] = {}
    faults = []
    for piece in text.split(","):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            faults.append(f"must be KEY=MS,KEY=MS with keys {', '.join(keys)}, got '{piece.strip()}'")
        elif key not in keys:
            faults.append(f"no such limit, got '{key}'{did_you_mean(key, keys)}")
        elif key in found:
            faults.append(f"must name {key} once")
        elif (limit := _milliseconds(value)) is None:
            faults.append(f"{key} must be a number of ms above 0, got '{value}'")
        else:
            found[key] = limit
    if faults:
        raise ScenarioError("\n".join(f"--slo: {fault}" for fault in faults))
    return found


def _milliseconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
