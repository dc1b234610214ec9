"""Where candidates are searched, and how the winner is judged: on fresh seeds, by what the question really asks.

A closed loop is searched and judged as it is. An open loop fixes throughput, and with it cost, as long as an engine
keeps up; all settings that keep the objectives have the same goodput. What a team asks there is how much load a
replica carries. So with an open loop

* ``goodput`` (and ``cost`` with objectives) means the *sustained rate*: the largest arrival rate at which the
  objectives are kept, as `analysis.capacity` finds it. The search compares goodput at a rate just above what no
  speculation and one fixed length sustain, where settings differ; the capacity plan itself judges the winner.
* ``throughput`` (and ``cost`` without objectives) means an engine that is never idle.
* ``latency`` and ``energy`` are those of the given rate.

The winner was chosen on the runs of the search, so these flatter it. It is judged, beside no speculation and the best
fixed length, on seeds that no search uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.capacity import Objective, plan_capacity
from analysis.capacity.findings import PolicyCapacity
from analysis.capacity.sustain import at_rate, check_workload, count_replicas, saturated
from analysis.common.bootstrap import Estimate
from analysis.tuning.findings import Goal, Judgement
from analysis.tuning.halving import Judge, interval, ratio_of_means
from analysis.tuning.runs import FIRST_FRESH
from analysis.tuning.space import Candidate
from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator.experiments.replicate import replication_seeds, with_seed
from simulator.scenario.scenario import Objectives, Scenario

SUSTAINED, SATURATED, AS_GIVEN = "sustained", "saturated", "as given"
_PILOT_REQUESTS, _PILOT_SEEDS = 120, 2
_ABOVE = 1.1
"""The search runs at this many times the larger of the two sustained rates that a pilot finds."""
JUDGED_REQUESTS, JUDGED_SEEDS = 250, 5
"""Requests of a run of the capacity plan that judges, and its replications."""


def setting_of(scenario: Scenario, objective: str) -> str:
    """Give where `objective` is searched: ``sustained``, ``saturated``, or the workload ``as given``.

    Raises `ScenarioError` for an objective that an open loop of changing rate cannot answer.
    """
    if scenario.workload.kind == "closed" or objective in ("latency", "energy"):
        return AS_GIVEN
    wanted = SUSTAINED if objective == "goodput" or (objective == "cost" and scenario.slo is not None) else SATURATED
    if wanted == SUSTAINED:
        try:
            check_workload(scenario)
        except ScenarioError:
            raise ScenarioError(
                f"--objective {objective}: asks which arrival rate is sustained, so workload.kind must be poisson or "
                f"gamma, got '{scenario.workload.kind}'; --objective latency and energy judge arrivals as they are"
            ) from None
        _objective(scenario.slo, 1.0)
    return wanted


def searched(
    scenario: Scenario,
    setting: str,
    pilot: Scenario,
    requests: int,
    attainment: float,
    traces: TraceSet,
    workers: int,
) -> tuple[Scenario, str]:
    """Give the scenario that the search runs, and how it differs from `scenario`; `pilot` is one candidate."""
    if setting == SATURATED:
        return saturated(scenario), "an engine that is never idle: an open loop fixes throughput and cost at its rate"
    found = plan_capacity(
        pilot,
        slo=_objective(scenario.slo, attainment),
        requests=_PILOT_REQUESTS,
        replications=_PILOT_SEEDS,
        traces=traces,
        workers=workers,
    )
    rate = _ABOVE * max(one.rate_rps.value or 0.0 for one in found.policies) * count_replicas(scenario)
    if rate <= 0:
        rate = _ABOVE * max(one.saturation_rps.value or 0.0 for one in found.policies) * count_replicas(scenario)
    rate = float(f"{rate:.3g}")
    stressed = at_rate(scenario, rate, requests).model_copy(update={"slo": scenario.slo})
    return stressed, f"{rate:g} arrivals a second, just above what no speculation and one fixed length sustain"


def judge_on_fresh_seeds(judge: Judge, best: Candidate, alone: Candidate, plain: Candidate, number: int) -> Judgement:
    """Judge `best` on `number` runs of seeds that the search did not use; candidates on common random numbers."""
    judge.runs.fill_fresh("fresh seeds", list(dict.fromkeys((best, alone, plain))), number)
    read, goal = judge.runs.fresh, judge.goal
    mine, fixed, none = (read(one, goal.value, number) for one in (best, alone, plain))

    def gain(other: Candidate, values: object) -> Estimate:
        if other is best:
            return Estimate(1.0, None, None, judge.requests)
        above, below = (mine, values) if goal.larger_is_better else (values, mine)
        return ratio_of_means(above, below, judge.wide, judge.requests)  # type: ignore[arg-type]

    over = gain(plain, none)
    return Judgement(
        how=f"{number} runs on fresh seeds, held out of the search",
        unit=goal.unit,
        best=interval(mine, judge.wide, judge.requests),
        best_fixed=interval(fixed, judge.wide, judge.requests),
        baseline=interval(none, judge.wide, judge.requests),
        over_baseline=over,
        over_fixed=gain(alone, fixed),
        pays=over.low is not None and over.low > 1,
    )


@dataclass(frozen=True)
class Finalists:
    """The winner, the best fixed length and the workload they are judged under; None where it is no speculation."""

    best: Scenario | None
    fixed: Scenario


def judge_sustained(
    finalists: Finalists, goal: Goal, slo: Objectives | None, attainment: float, traces: TraceSet, workers: int
) -> Judgement:
    """Judge by the capacity plan: the rate that each sustains within the objectives, on seeds of its own."""
    fresh = replication_seeds(finalists.fixed.seed, FIRST_FRESH + 1)[FIRST_FRESH]
    named = [("best fixed length", finalists.fixed)]
    if finalists.best is not None:
        named.insert(0, ("best", finalists.best))
    first, *others = (with_seed(one.model_copy(update={"name": name}), fresh) for name, one in named)
    found = plan_capacity(
        first,
        others=others,
        slo=_objective(slo, attainment),
        requests=JUDGED_REQUESTS,
        replications=JUDGED_SEEDS,
        traces=traces,
        workers=workers,
    )
    rates = {one.policy: one for one in found.policies}
    none, fixed = rates["no speculation"], rates["best fixed length"]
    best = rates.get("best", none)
    over = best.ratio or Estimate(1.0, None, None, JUDGED_SEEDS)
    return Judgement(
        how=f"the capacity plan: rate of a replica, {JUDGED_SEEDS} fresh seeds of {JUDGED_REQUESTS} requests",
        unit="requests/s sustained within the SLO",
        best=best.rate_rps,
        best_fixed=fixed.rate_rps,
        baseline=none.rate_rps,
        over_baseline=over,
        over_fixed=_apart(best, fixed),
        pays=over.low is not None and over.low > 1,
    )


def _apart(best: PolicyCapacity, fixed: PolicyCapacity) -> Estimate:
    """The ratio of two sustained rates, without interval: the plan pairs each with no speculation alone."""
    above, below = best.rate_rps.value, fixed.rate_rps.value
    return Estimate(above / below if above is not None and below else None, None, None, best.rate_rps.requests)


def _objective(slo: Objectives | None, attainment: float) -> Objective:
    """Give the objectives of a scenario as the capacity plan judges them."""
    if slo is None:
        raise ScenarioError("--objective goodput: needs service-level objectives, e.g. --slo ttft_ms=500,tpot_ms=50")
    if slo.itl_ms is not None:
        raise ScenarioError("slo.itl_ms: the sustained rate is judged by ttft_ms, tpot_ms and e2el_ms; leave it out")
    return Objective(slo.ttft_ms, slo.tpot_ms, slo.e2el_ms, attainment)


def requests_of(scenario: Scenario, known: Sequence[str]) -> int:
    """Give the requests of a run of a search above the sustained rate: as stated, else all recorded; at most 250.

    Long enough that what settings sustain shows in their goodput, which the end of a run dilutes for all alike.
    """
    stated = getattr(scenario.workload, "requests", None)
    return min(stated or len(known), JUDGED_REQUESTS)
