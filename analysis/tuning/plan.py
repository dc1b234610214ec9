"""How much work a search does, settled before it begins: from a first timing, or as the user says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.tuning.findings import Plan, Rung
from calibration.common.errors import ScenarioError
from simulator.experiments.pool import run_one
from simulator.scenario.scenario import Scenario

LAST = (16, 12, 8, 6)
"""Replications of the final stage, the most first, that a plan chooses from."""
KEEP = (16, 8)
"""Candidates that go on from the first and the second rung at most."""
_FULL = 4
"""A closed loop is full most of the time if it serves this many times its clients."""
_POLICY = 3.0
"""A run under a policy takes about this many times a run at one length (measured: 1 to 10)."""
_POLICIES, _GRID = 60, 35
"""Candidates beside fixed lengths, about, and runs of the grid over batch sizes."""
_STARTUP_S = 5.0
"""Reading the TraceSet and starting worker processes."""
_FILE_ARRIVALS = 512
_LEAST = 32
"""Requests, or batches of copies, that a run is not shortened below: fewer tell little, and cost hardly less."""
_PROBE = 64
"""Requests of the longer one of the timed runs at most, about."""


@dataclass(frozen=True)
class Length:
    """How long every run is: `overrides` of the workload, and what they change, in words.

    `requests`, `recorded` and `share` as in `Plan`.
    """

    requests: int | None
    recorded: int
    share: float | None
    overrides: dict[str, Any]
    changed: dict[str, str]


def make_length(scenario: Scenario, recorded: int, divide: int = 1) -> Length:
    """Give the length of runs of `scenario` on `recorded` sequences, 1 / `divide` of what it could be.

    Where the workload leaves the number open, every run serves half of the recorded requests, in an order of its own
    seed, so that replications tell how much depends on which requests there were; but all of them where a closed loop
    would be empty half of the time. What the scenario states is kept, unless `divide` shortens it.
    """
    load = scenario.workload
    overrides: dict[str, Any] = {}
    changed: dict[str, str] = {}
    if getattr(load, "order", None) == "trace":
        overrides["workload.order"] = "shuffled"
        changed["workload.order"] = "'shuffled', not 'trace': replications must differ in something"
    copies = getattr(load, "copies", 1)
    stated = getattr(load, "requests", None)
    seconds = getattr(load, "duration_s", None)
    requests = stated
    if stated is None and seconds is None:
        requests = _open_number(load, recorded, copies)
    if divide > 1 and requests is not None:
        # An open loop is never shortened: its end, when the engine runs empty, would weigh too much.
        shorter = divide if load.kind == "closed" else 1
        requests = max(requests // shorter // copies, min(_LEAST, requests // copies)) * copies
    if requests is not None and requests != stated:
        overrides["workload.requests"] = requests
        changed["workload.requests"] = f"{requests}, not {'all' if stated is None else stated}{_why(divide)}"
    served = None if requests is None else requests / copies
    drawn = served is not None and served < recorded and getattr(load, "mix", None) is None and load.kind != "csv"
    share = served / recorded if drawn and served is not None else None
    return Length(requests, recorded, share, overrides, changed)


def _why(divide: int) -> str:
    return f": shortened {divide} times to fit into the budget" if divide > 1 else ""


def _open_number(load: Any, recorded: int, copies: int) -> int | None:
    """Requests of a run where the scenario does not say: half of the recorded ones, if that keeps a closed loop full.

    None leaves the workload's own number.
    """
    half = recorded // 2
    if load.kind == "closed":
        enough = half >= 2 if copies > 1 else half >= _FULL * load.concurrency
        return half * copies if enough else None
    if load.kind in ("trace", "csv"):
        return _FILE_ARRIVALS
    return max(half, 1)


def plan_by_clock(
    scenario: Scenario,
    make: Callable[[Mapping[str, Any]], Sequence[Scenario]],
    recorded: int,
    fixed: int,
    *,
    workers: int,
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
    run: Callable[[Scenario], Any] = run_one,
) -> tuple[Plan, Length]:
    """Time a run and give the largest plan that should fit into `budget_s` on `workers` processes.

    `make` gives, for overrides of the workload, scenarios to time; `fixed` is the number of candidates at one length.
    """
    each = _timing(scenario, make, recorded, clock, run)
    divide = 1
    while True:
        length = make_length(scenario, recorded, divide)
        seconds = each(_served(scenario, length))
        for last in LAST:
            rungs = make_rungs(last)
            predicted = _predicted(rungs, fixed, seconds, workers)
            if predicted <= 0.8 * budget_s:
                return _plan(length, rungs, "clock", budget_s, predicted, seconds), length
        shorter = make_length(scenario, recorded, 2 * divide)
        if (shorter.requests, shorter.overrides) == (length.requests, length.overrides) or divide >= 64:
            return _plan(length, make_rungs(LAST[-1]), "clock", budget_s, predicted, seconds), length
        divide *= 2


def _served(scenario: Scenario, length: Length) -> int:
    """Give the requests of a run of `length`, where only its duration is given those that are expected."""
    load = scenario.workload
    if length.requests is not None:
        return length.requests
    seconds = length.overrides.get("workload.duration_s", getattr(load, "duration_s", None))
    if seconds is None:
        return length.recorded * getattr(load, "copies", 1)
    rate, faster = getattr(load, "rate_rps", None), getattr(load, "rate_multiplier", None) or 1.0
    return _FILE_ARRIVALS if rate is None else max(1, round(rate * faster * seconds))


def _timing(
    scenario: Scenario,
    make: Callable[[Mapping[str, Any]], Sequence[Scenario]],
    recorded: int,
    clock: Callable[[], float],
    run: Callable[[Scenario], Any],
) -> Callable[[int], float]:
    """Give the seconds of a run by its number of requests: a line through two timings, the slower scenario's.

    A first run, which loads what the others find loaded, is not timed.
    """
    whole = make_length(scenario, recorded)
    load = scenario.workload
    copies, clients = getattr(load, "copies", 1), getattr(load, "concurrency", 1)
    batches = min(_served(scenario, whole) // copies, max(_PROBE, 2 * clients // copies))
    large, small = max(1, batches) * copies, max(1, batches // 4) * copies
    points = []
    for timed, requests in ((False, small), (True, small), (True, large)):
        seconds = 0.0
        for one in make(whole.overrides | {"workload.requests": requests}):
            began = clock()
            outcome = run(one)
            if outcome.fault is not None:
                raise outcome.fault
            seconds = max(seconds, clock() - began)
        if timed:
            points.append((requests, seconds))
    (low, quick), (high, slow) = points
    slope = max(0.0, (slow - quick) / (high - low)) if high > low else slow / high
    return lambda requests: max(quick + slope * (requests - low), slope * requests)


def plan_by_user(scenario: Scenario, recorded: int, replications: int, budget_s: float) -> tuple[Plan, Length]:
    """Give the plan with `replications` in the final stage; no clock decides anything."""
    if replications < 2:
        raise ScenarioError(f"--replications: must be at least 2, so that there is an interval, got {replications}")
    length = make_length(scenario, recorded)
    return _plan(length, make_rungs(replications), "user", budget_s, None, None), length


def make_rungs(last: int) -> tuple[Rung, ...]:
    """Give three rungs that end with `last` replications."""
    first = min(3, last)
    middle = min(max(first, last // 2), last)
    return Rung(first, KEEP[0]), Rung(middle, KEEP[1]), Rung(last, 1)


def _predicted(rungs: Sequence[Rung], fixed: int, each: float, workers: int) -> float:
    """Predict the seconds of a search whose runs at one length take `each`."""
    first, middle, last = (rung.replications for rung in rungs)
    runs: float = fixed * first + _GRID
    runs += _POLICY * _POLICIES * first
    runs += _POLICY * (KEEP[0] * (middle - first) + KEEP[1] * (last - middle) + 5 * last)
    return _STARTUP_S + runs * each / max(1, workers)


def _plan(
    length: Length,
    rungs: tuple[Rung, ...],
    chosen_by: str,
    budget_s: float,
    predicted_s: float | None,
    seconds_per_run: float | None,
) -> Plan:
    return Plan(
        requests=length.requests,
        recorded=length.recorded,
        share=length.share,
        rungs=rungs,
        chosen_by=chosen_by,
        budget_s=budget_s,
        predicted_s=None if predicted_s is None else round(predicted_s, 1),
        seconds_per_run=None if seconds_per_run is None else float(f"{seconds_per_run:.2g}"),
        changed=dict(length.changed),
    )
