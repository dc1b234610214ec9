"""The capacity plan: what each policy sustains, how many devices a load needs, what a million tokens cost.

Many calls of one function, here or in other processes, counted for a progress bar.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from analysis.capacity.findings import CapacityFindings, LengthTrial, Objective
from analysis.capacity.sustain import (
    SHARES,
    TAIL_SHARE,
    TOLERANCE,
    WARMUP_SHARE,
    Sustained,
    arrivals,
    changed,
    check_workload,
    count_replicas,
    devices_per_replica,
    plain,
    policy_capacity,
    probe,
    saturation,
    sustain,
)
from analysis.common.bootstrap import number
from calibration.common.errors import ConvergenceWarning, ScenarioError
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.experiments.pool import process_pool
from simulator.experiments.replicate import check_number, replication_seeds, with_seed
from simulator.results.evidence import served
from simulator.running.run import evidence_of, read_traces
from simulator.scenario.scenario import Scenario

R = TypeVar("R")


class Steps:
    """Counts the steps of a plan for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def one(self) -> None:
        """Count one step."""
        self.reach(self._done + 1)

    def reach(self, done: int) -> None:
        """Count up to `done`: steps that turned out not to be needed are counted as done."""
        self._done = done
        if self._progress is not None:
            self._progress(done, self._total)


class Crew:
    """Calls a function of a scenario many times, in this process or in others, in the order that it was asked."""

    def __init__(self, workers: int, traces: TraceSet, steps: Steps) -> None:
        self._traces, self.steps = traces, steps
        self._context = process_pool(workers, None) if workers > 1 else None
        self._pool: Any = None

    def __enter__(self) -> Self:
        """Start the processes, where there are any."""
        if self._context is not None:
            self._pool = self._context.__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        """End them."""
        if self._context is not None:
            self._context.__exit__(*fault)

    def all(self, work: Callable[..., R], asked: Sequence[tuple[Any, ...]]) -> list[R]:
        """Call `work` with each of `asked` and the TraceSet."""
        if self._pool is None:
            found = []
            for given in asked:
                found.append(work(*given, self._traces))
                self.steps.one()
            return found
        futures = [self._pool.submit(work, *given, self._traces) for given in asked]
        for future in as_completed(futures):
            future.result()
            self.steps.one()
        return [future.result() for future in futures]


T = TypeVar("T")

LENGTHS = (250, 500, 1000, 2000)
"""Arrivals of a run, tried in turn until doubling them no longer moves the sustained rate."""
STABILITY = 0.03
"""Relative change of the sustained rate, mean over the pilot seeds, that counts as none."""
PILOT_SEEDS = 3
_PILOT_SHARES = (0.6, 0.85)


def plan_capacity(
    scenario: Scenario,
    *,
    others: Sequence[Scenario] = (),
    slo: Objective | None = None,
    load_rps: float | None = None,
    price_per_hour: float | None = None,
    devices: int | None = None,
    replications: int = 5,
    requests: int | None = None,
    traces: TraceSet | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> CapacityFindings:
    """Plan the capacity of `scenario`: no speculation against its policy, and against each of `others`.

    `others` serve the requests of `scenario`; those that do not speculate are left out.

    For every policy and each of `replications` seeds, the largest open-loop arrival rate at which the objective is
    kept, by bisection over simulated rates on common random numbers. The objective is `slo`, else the scenario's
    ``[slo]`` at 99% attainment, else one relative to an idle engine, which says so. Rates are per replica; `devices`
    is how many devices one replica takes (default: what the scenario says). `load_rps` asks how many are needed;
    `price_per_hour`, of one device, in dollars (default: ``costs.usd_per_hour`` of the fleet), what a million output
    tokens cost: nothing is said of money without one.

    `requests` arrive in a run; left out, the number is doubled from 250 on until the rate of three pilot seeds no
    longer moves by 3% (`ConvergenceWarning` where it still does at 2,000). Results do not depend on `workers`;
    `progress` hears (steps done, steps in all). Raises `ScenarioError` for arrivals that are not one rate, or an
    objective that cannot be judged.
    """
    _check(scenario, load_rps, price_per_hour, replications, requests)
    traces = traces if traces is not None else read_traces(scenario)
    policies = _policies(scenario, others)
    seeds = replication_seeds(scenario.seed, replications)
    steps = Steps(progress, 2 * len(policies) * len(seeds) + PILOT_SEEDS * len(LENGTHS))
    with Crew(workers, traces, steps) as crew:
        found = _search(
            crew=crew, scenario=scenario, policies=policies, seeds=seeds, slo=slo, requests=requests, traces=traces
        )
    if not found.stable:
        warnings.warn(
            f"capacity: the sustained rate still moves by more than {100 * STABILITY:.0f}% between runs of "
            f"{found.trials[-2].requests} and {found.trials[-1].requests} requests; give more with requests",
            ConvergenceWarning,
            stacklevel=2,
        )
    replicas = count_replicas(scenario)
    sizes = {name: devices or devices_per_replica(one) for name, one in policies.items()}
    size = devices or devices_per_replica(scenario)
    price = price_per_hour
    if price is None and scenario.costs.usd_per_hour is not None:
        price = scenario.costs.usd_per_hour / (replicas * size)
    first = next(iter(found.results.values()))
    manifest = traces.manifest
    evidence = evidence_of(policies.values(), traces)
    named = served(scenario, manifest)
    return CapacityFindings(
        name=scenario.name,
        created=manifest.created,
        verifier=named["verifier"],
        device=named["device"],
        costs=_costs(scenario, traces),
        acceptance=evidence.acceptance,
        arrivals=arrivals(scenario),
        objective=found.objective,
        policies=tuple(
            policy_capacity(
                name=name,
                several=several,
                first=first if several is not first else None,
                replicas=replicas,
                size=sizes[name],
                load_rps=load_rps,
                price=price,
            )
            for name, several in found.results.items()
        ),
        replicas=replicas,
        devices_per_replica=size,
        load_rps=load_rps,
        usd_per_device_hour=price,
        energy_counts=next((one.at.energy for one in first if one.at is not None), None),
        replications=replications,
        requests_per_run=found.requests,
        warmup_share=WARMUP_SHARE,
        tail_share=TAIL_SHARE,
        tolerance=TOLERANCE,
        trials=found.trials,
        stable=found.stable,
        stability=STABILITY,
        evidence=evidence,
        warnings=tuple(
            sorted({said for several in found.results.values() for one in several for said in _said(one)})
        ),
    )


def _said(one: Sustained) -> set[str]:
    return {text for probe in one.curve for text in probe.said}


def _check(
    scenario: Scenario, load_rps: float | None, price: float | None, replications: int, requests: int | None
) -> None:
    """Refuse what no plan can be made of."""
    check_number(replications)
    check_workload(scenario)
    if requests is not None and requests < 20:
        raise ScenarioError(f"requests: a run of a capacity plan needs at least 20, got {requests}")
    for name, value in (("load_rps", load_rps), ("price_per_hour", price)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ScenarioError(f"{name}: must be above 0, got {value}")


class _Found(NamedTuple):
    """What every policy sustains on every seed, against which objective, and how the run length was found."""

    results: dict[str, list[Sustained]]
    objective: Objective
    requests: int
    trials: tuple[LengthTrial, ...]
    stable: bool


def _search(
    crew: Crew,
    scenario: Scenario,
    policies: Mapping[str, Scenario],
    seeds: Sequence[int],
    slo: Objective | None,
    requests: int | None,
    traces: TraceSet,
) -> _Found:
    """Saturate every policy on every seed, settle objective and run length, and look for the sustained rates."""
    cells = [(name, with_seed(one, seed)) for name, one in policies.items() for seed in seeds]

    def by_policy(values: list[T]) -> dict[str, list[T]]:
        return {name: values[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(policies)}

    full = by_policy(crew.all(saturation, [(one,) for _, one in cells]))
    bare = next(iter(policies))
    objective = slo or _objective(scenario, policies[bare], min(full[bare]), traces)
    trials, stable = _run_length(crew, policies, seeds, full, objective) if requests is None else ((), True)
    length = requests or trials[-1].requests
    crew.steps.reach(len(cells) + PILOT_SEEDS * len(LENGTHS))
    asked = [
        (one, length, objective, full[name][i % len(seeds)], SHARES, float(np.mean(full[name])))
        for i, (name, one) in enumerate(cells)
    ]
    return _Found(by_policy(crew.all(sustain, asked)), objective, length, trials, stable)


def _policies(scenario: Scenario, others: Sequence[Scenario]) -> dict[str, Scenario]:
    """Give what is compared, by name: no speculation first; all serve the requests of `scenario` on its seeds."""
    found = {"no speculation": plain(scenario)}
    same = {"seed": scenario.seed, "workload": scenario.workload.model_dump(mode="json", exclude_none=True)}
    for one in (scenario, *others):
        if one.speculates:
            name = one.name if one.name not in found else f"{one.name} ({len(found)})"
            found[name] = one if one is scenario else changed(one, same)
    return found


def _objective(scenario: Scenario, bare: Scenario, saturation_rps: float, traces: TraceSet) -> Objective:
    """Give the scenario's objective; without one, twice what an almost idle engine does without speculation."""
    if (slo := scenario.slo) is not None:
        if slo.itl_ms is not None:
            raise ScenarioError("slo.itl_ms: a capacity plan judges ttft_ms, tpot_ms and e2el_ms; leave it out")
        return Objective(slo.ttft_ms, slo.tpot_ms, slo.e2el_ms)
    idle = probe(bare, 0.02 * saturation_rps, 200, Objective(1.0, 1.0, None), traces)
    ttft_ms, tpot_ms = (float(f"{2 * value:.2g}") or None for value in (idle.p99_ttft_ms, idle.p99_tpot_ms))
    return Objective(
        ttft_ms,
        tpot_ms,
        None,
        source="assumed, as none was stated: twice the 99th percentiles of an almost idle engine without speculation",
    )


def _run_length(
    crew: Crew,
    policies: Mapping[str, Scenario],
    seeds: Sequence[int],
    full: dict[str, list[float]],
    objective: Objective,
) -> tuple[tuple[LengthTrial, ...], bool]:
    """Double the run length until the rate of the pilot seeds stands still; the last policy is the pilot."""
    name, pilot = list(policies.items())[-1]
    chosen = seeds[:PILOT_SEEDS]
    trials: list[LengthTrial] = []
    for length in LENGTHS:
        reference = float(np.mean(full[name]))
        asked = [
            (with_seed(pilot, seed), length, objective, full[name][i], _PILOT_SHARES, reference)
            for i, seed in enumerate(chosen)
        ]
        rate = float(np.mean([one.rate_rps for one in crew.all(sustain, asked)]))
        trials.append(LengthTrial(length, number(rate) or 0.0))
        if len(trials) > 1 and abs(rate - trials[-2].rate_rps) <= STABILITY * max(rate, trials[-2].rate_rps):
            return tuple(trials), True
    return tuple(trials), False


def _costs(scenario: Scenario, traces: TraceSet) -> str:
    """Say where prices come from, in the word that reports use."""
    kind = scenario.costs.verifier.kind if scenario.costs.verifier is not None else None
    if kind is None:
        kind = "measured" if traces.timings.num_rows else "stated"
    words = {"measured": "fitted", "observed": "fitted to an engine's steps", "linear": "assumed"}
    return words.get(kind, kind)
