"""The largest arrival rate that one policy sustains on one seed, by bisection over simulated rates.

From what every seed sustains to the capacity of a policy, with intervals over seeds.

The scenarios that a capacity plan runs: without speculation, saturated, and at a given arrival rate.

The scenario that a capacity plan takes where a study of a TraceSet is all there is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.capacity.findings import Needed, Objective, PolicyCapacity, RatePoint
from analysis.common.bootstrap import Estimate, number
from analysis.common.simulated import simulate_and_hear
from analysis.speedup.findings import Findings
from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator.experiments.replicate import estimate
from simulator.results.metrics import request_latencies
from simulator.scenario.fleet import LayerParallelPlacement, ManyServersPlacement, Placement
from simulator.scenario.scenario import Replica, Scenario
from simulator.scenario.workload import ClosedLoop, GammaArrivals, PoissonArrivals

_BOUND = ("lengths", "mix", "classes", "block_tokens")
"""Keys of a workload that say which requests come, not when."""


def check_workload(scenario: Scenario) -> None:
    """Refuse arrivals whose rate is not one number."""
    if not isinstance(scenario.workload, ClosedLoop | PoissonArrivals | GammaArrivals):
        raise ScenarioError(
            f"scenario '{scenario.name}': workload.kind: a capacity plan varies one arrival rate, so it must be "
            f"closed (planned as poisson), poisson or gamma, got '{scenario.workload.kind}'"
        )


def arrivals(scenario: Scenario) -> str:
    """Say how requests arrive in the plan."""
    if isinstance(scenario.workload, GammaArrivals):
        return f"gamma gaps with a coefficient of variation of {scenario.workload.cv:g}"
    return "Poisson"


def changed(scenario: Scenario, changes: Mapping[str, Any]) -> Scenario:
    """Give `scenario` with whole tables replaced (None removes one), checked like any other."""
    data = scenario.model_dump(mode="json", exclude_none=True) | dict(changes)
    kept = {name: value for name, value in data.items() if value is not None}
    return Scenario.model_validate(kept).placed(scenario.locate("."))


def at_rate(scenario: Scenario, rate_rps: float, requests: int) -> Scenario:
    """Give `scenario` with `requests` open-loop arrivals at `rate_rps` a second over all replicas.

    Same seed, same luck at every rate: the k-th request is the same, and arrival times are those of another rate,
    stretched.
    """
    load = scenario.workload
    data: dict[str, Any] = {"kind": "poisson", "order": "shuffled"}
    if isinstance(load, PoissonArrivals | GammaArrivals):
        data["order"] = load.order
    if isinstance(load, GammaArrivals):
        data |= {"kind": "gamma", "cv": load.cv}
    return changed(
        scenario,
        {"workload": data | {"rate_rps": rate_rps, "requests": requests} | _bound(scenario), "measure": None},
    )


def saturated(scenario: Scenario) -> Scenario:
    """Give `scenario` with as many clients as its replicas have slots, each of which never pauses.

    The first batch fills up an empty engine and is left out; four more are measured, at least 200 requests.
    """
    slots = sum(_slots(scenario, replica) * replica.count for replica in scenario.replica or (Replica(),))
    requests = slots + max(4 * slots, 200)
    load = {"kind": "closed", "concurrency": slots, "requests": requests, "keep_full": True, "order": "shuffled"}
    return changed(
        scenario, {"workload": load | _bound(scenario), "slo": None, "measure": {"warmup_requests": slots}}
    )


def plain(scenario: Scenario) -> Scenario:
    """Give `scenario` without speculation, for the same requests: those that its first drafter serves."""
    data = scenario.model_dump(mode="json", exclude_none=True)
    changes: dict[str, Any] = {"name": "no speculation", "stopping": {"policy": "none"}, "placement": None}
    routing = dict(data.get("routing", {}))
    names = (routing.pop("drafter", None) or {}).get("drafters")
    if scenario.drafter is None and names:
        changes["drafter"] = {"name": names[0]}
    changes["routing"] = routing or None
    costs = {key: value for key, value in data.get("costs", {}).items() if key != "drafters"}
    changes["costs"] = costs
    if scenario.replica is not None:
        own = ("stopping", "placement")
        changes["replica"] = [{k: v for k, v in table.items() if k not in own} for table in data["replica"]]
    return changed(scenario, changes)


def count_replicas(scenario: Scenario) -> int:
    """Give the number of replicas."""
    return sum(replica.count for replica in scenario.replica or (Replica(),))


def devices_per_replica(scenario: Scenario) -> int:
    """Give the devices of one replica: those of the verifier, and those that a placement gives the drafter.

    Of several replicas the first speaks for all.
    """
    first = scenario.replica[0] if scenario.replica else Replica()
    costs = first.costs or scenario.costs
    size = first.tensor_parallel_size or scenario.engine.tensor_parallel_size
    return (size or getattr(costs.verifier, "tensor_parallel", None) or 1) + _beside(
        first.placement or scenario.placement
    )


def _beside(placement: Placement | None) -> int:
    if isinstance(placement, ManyServersPlacement):
        return placement.servers or 1
    if isinstance(placement, LayerParallelPlacement):
        return placement.group - 1
    return 1 if placement is not None and placement.kind in ("overlapped", "asynchronous", "remote") else 0


def _slots(scenario: Scenario, replica: Replica) -> int:
    return replica.max_num_seqs or scenario.engine.max_num_seqs


def _bound(scenario: Scenario) -> dict[str, Any]:
    data = scenario.workload.model_dump(mode="json", exclude_none=True)
    return {key: data[key] for key in _BOUND if key in data}


def study_scenarios(findings: Findings, traces: TraceSet) -> tuple[Scenario, ...]:
    """Give the policies that a study recommends: its headline, and the best length for each batch size.

    The headline's drafter at its draft length; then the same drafter by batch, as vLLM's schedule has it, where the
    best lengths differ and not all are 0. The engine has as many slots as the largest batch that was timed (where
    none was: studied). Requests arrive in Poisson manner, shuffled.
    """
    head = findings.answer.headline
    policies: list[tuple[str, dict[str, Any]]] = [
        (
            f"{head.drafter}, draft {head.speculative_tokens}",
            {"policy": "fixed", "draft_tokens": head.speculative_tokens},
        )
    ]
    table = _schedule(findings, head.drafter)
    lengths = {entry[2] for entry in table}
    if lengths not in ({0}, {head.speculative_tokens}):  # else it is no speculation, or the fixed length again
        policies.append((f"{head.drafter}, by batch", {"policy": "by_batch", "table": table}))
    return tuple(_scenario(findings, traces, name, stopping) for name, stopping in policies)


def _schedule(findings: Findings, drafter: str) -> list[list[int]]:
    """Give [first, last, K]: the best length of a studied batch size holds until the next one; 0 does not draft."""
    rows = sorted((r for r in findings.best if r.drafter == drafter and r.domain is None), key=lambda r: r.batch)
    ends = [after.batch - 1 for _, after in itertools.pairwise(rows)] + [rows[-1].batch]
    return [[1 if i == 0 else row.batch, ends[i], row.draft_tokens] for i, row in enumerate(rows)]


def _scenario(findings: Findings, traces: TraceSet, name: str, stopping: dict[str, Any]) -> Scenario:
    data: dict[str, Any] = {
        "name": name,
        "seed": findings.settings.seed,
        "traces": {"path": "."},
        "drafter": {"name": findings.answer.headline.drafter},
        "stopping": stopping,
        "engine": {"max_num_seqs": _default_slots(findings, traces)},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "order": "shuffled"},
        "costs": findings.settings.costs or {},
    }
    return Scenario.model_validate(data)


def _default_slots(findings: Findings, traces: TraceSet) -> int:
    timed = traces.timings.filter(pc.equal(traces.timings["operation"], "verify"))
    return int(pc.max(timed["batch"]).as_py()) if timed.num_rows else findings.settings.batches[-1]


WARMUP_SHARE = 0.2
"""Of the arrivals of a run, in order: the first ones, which find the engine emptier than others will."""
TAIL_SHARE = 0.1
"""The last ones, which are served while the engine runs empty; they are there to keep the others company."""
TOLERANCE = 0.02
"""A bisection ends when it knows the rate to this share of the saturated one."""
SHARES = (0.3, 0.5, 0.75, 1.0)
"""Rates of the curve, as shares of the saturated one; the bisection goes on between two of them."""


@dataclass(frozen=True)
class Probe:
    """What was seen at one arrival rate (of the whole fleet).

    ``attained``: share of the `judged` requests that keep each limit, and all of them (``all``). ``energy``: what
    the joules count.
    """

    rate_rps: float
    attained: dict[str, float]
    p99_ttft_ms: float
    p99_tpot_ms: float
    mean_e2el_s: float
    output_tokens_per_s: float
    judged: int
    joules_per_million: float | None
    extrapolated_share: float
    energy: str | None = None
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sustained:
    """What one policy sustains on one seed: the rate, what was seen there, and at every rate of the curve.

    ``at`` is None where not even the smallest rate tried keeps the objective: the rate is 0. ``failing``: the limit
    that is missed most just above; None where the saturated rate itself keeps all.
    """

    rate_rps: float
    saturation_rps: float
    at: Probe | None
    failing: str | None
    curve: tuple[Probe, ...] = field(default=())


def saturation(scenario: Scenario, traces: TraceSet | None) -> float:
    """Give the requests a second of an engine with every slot always in use."""
    summary, _, _ = _run(saturated(scenario), traces)
    return float(summary["request_throughput"])


def probe(scenario: Scenario, rate_rps: float, requests: int, objective: Objective, traces: TraceSet | None) -> Probe:
    """Simulate one arrival rate; judge the requests between warm-up and tail, in order of arrival."""
    summary, table, said = _run(at_rate(scenario, rate_rps, requests), traces)
    rows = np.argsort(table["arrival_s"].to_numpy(), kind="stable")
    judged = table.take(rows[int(WARMUP_SHARE * len(rows)) : len(rows) - int(TAIL_SHARE * len(rows))])
    ttft, tpot, stay = request_latencies(judged)
    tokens = judged["output_tokens"].to_numpy()
    per_token = np.zeros(judged.num_rows)  # of a request with one output token: 0, as vLLM counts it
    per_token[tokens > 1] = tpot
    seconds = {"ttft": ttft, "tpot": per_token, "e2el": stay}
    kept = {name: 1000 * seconds[name] <= limit for name, limit in objective.limits.items()}
    attained = {name: float(mask.mean()) for name, mask in kept.items()}
    attained["all"] = float(np.logical_and.reduce(list(kept.values())).mean())
    return Probe(
        rate_rps,
        attained,
        p99_ttft_ms=1000 * float(np.percentile(ttft, 99)),
        p99_tpot_ms=1000 * float(np.percentile(per_token, 99)),
        mean_e2el_s=float(stay.mean()),
        output_tokens_per_s=rate_rps * float(tokens.mean()),
        judged=judged.num_rows,
        joules_per_million=summary.get("joules_per_million_output_tokens"),
        extrapolated_share=summary["extrapolated_iterations"] / max(1, summary["iterations"]),
        energy=summary.get("energy", {}).get("counts"),
        said=said,
    )


def sustain(
    scenario: Scenario,
    requests: int,
    objective: Objective,
    saturation_rps: float,
    shares: tuple[float, ...],
    reference_rps: float,
    traces: TraceSet | None,
) -> Sustained:
    """Find the largest rate at which `objective` is kept, within `TOLERANCE` of the saturated one.

    `saturation_rps` bounds it: a finite run could carry more for a while. The rates of the curve are `shares` of
    `reference_rps` (the same for all seeds), tried in turn; the bisection starts at the first one that fails, so that
    a lucky one above it does not count.
    """
    curve = tuple(probe(scenario, share * reference_rps, requests, objective, traces) for share in shares)
    good, bad = None, None
    for one in curve:
        if one.attained["all"] < objective.attainment:
            bad = one
            break
        good = one
    low = 0.0 if good is None else good.rate_rps
    high = max(saturation_rps, low) if bad is None else bad.rate_rps
    while high - low > TOLERANCE * reference_rps:
        middle = probe(scenario, (low + high) / 2, requests, objective, traces)
        if middle.attained["all"] >= objective.attainment:
            good, low = middle, middle.rate_rps
        else:
            bad, high = middle, middle.rate_rps
    failing = None if bad is None else min(objective.limits, key=lambda name: bad.attained[name])
    if low >= saturation_rps:
        low, failing = saturation_rps, None
    return Sustained(low, saturation_rps, good, failing, curve)


def _run(scenario: Scenario, traces: TraceSet | None) -> tuple[dict[str, Any], pa.Table, tuple[str, ...]]:
    """Simulate; give the summary, the counted requests, and what was warned of, but for extrapolation."""
    result, said = simulate_and_hear(scenario, traces)
    return result.summary, result.requests.filter(result.requests["counted"]), said


def policy_capacity(
    name: str,
    several: Sequence[Sustained],
    first: Sequence[Sustained] | None,
    replicas: int,
    size: int,
    load_rps: float | None,
    price: float | None,
) -> PolicyCapacity:
    """Sum up one policy over its seeds; `first` are those of the policy that it is compared with."""
    rates = [one.rate_rps / replicas for one in several]
    seen = [one.at for one in several if one.at is not None]
    judged = sum(one.judged for one in seen)
    rate = _estimate(rates, judged)
    ratio = None
    if first is not None and all(one.rate_rps > 0 for one in first):
        ratio = _estimate([b.rate_rps / a.rate_rps for a, b in zip(first, several, strict=True)], judged)
    failing = [one.failing for one in several]
    tokens = [one.output_tokens_per_s / replicas for one in seen]
    joules = [one.joules_per_million for one in seen if one.joules_per_million is not None]
    return PolicyCapacity(
        policy=name,
        rate_rps=rate,
        ratio=ratio,
        saturation_rps=_estimate([one.saturation_rps / replicas for one in several], judged),
        limited_by=max(dict.fromkeys(failing), key=failing.count) or "saturation",
        output_tokens_per_s=_estimate(tokens, judged),
        p99_ttft_ms=_estimate([one.p99_ttft_ms for one in seen], judged),
        p99_tpot_ms=_estimate([one.p99_tpot_ms for one in seen], judged),
        requests_in_system=_estimate([one.rate_rps / replicas * one.mean_e2el_s for one in seen], judged),
        usd_per_million_output_tokens=None
        if price is None or not tokens
        else _estimate([price * size / 3600 / one * 1e6 for one in tokens], judged),
        joules_per_million_output_tokens=_estimate(joules, judged) if len(joules) == len(seen) > 0 else None,
        needed=None if load_rps is None else needed(load_rps, rate, size),
        curve=_curve(several, replicas),
        extrapolated_share=number(max((p.extrapolated_share for one in several for p in one.curve), default=0.0))
        or 0.0,
        devices_per_replica=size,
    )


def _curve(several: Sequence[Sustained], replicas: int) -> tuple[RatePoint, ...]:
    """Give attainment and tails at every rate of the curve, which all seeds share."""
    reference = float(np.mean([one.saturation_rps for one in several]))
    points = []
    for probes in zip(*(one.curve for one in several), strict=True):
        judged = sum(p.judged for p in probes)

        def over(values: list[float], judged: int = judged) -> Estimate:
            return _estimate(values, judged)

        points.append(
            RatePoint(
                number(probes[0].rate_rps / replicas) or 0.0,
                number(probes[0].rate_rps / reference) or 0.0,
                over([p.attained["all"] for p in probes]),
                over([p.p99_ttft_ms for p in probes]),
                over([p.p99_tpot_ms for p in probes]),
            )
        )
    return tuple(points)


def needed(load_rps: float, rate: Estimate, size: int) -> Needed | None:
    """Give ceil(load / rate) replicas; None where a replica carries nothing."""
    if not rate.value:
        return None
    middle = math.ceil(load_rps / rate.value)
    low = math.ceil(load_rps / (rate.high or rate.value))
    high = math.ceil(load_rps / rate.low) if rate.low else None
    return Needed(
        load_rps=load_rps,
        replicas=middle,
        replicas_low=low,
        replicas_high=high,
        devices=middle * size,
        devices_low=low * size,
        devices_high=None if high is None else high * size,
    )


def _estimate(values: Sequence[float], judged: int) -> Estimate:
    """Give the mean over replications with its t interval, no bound below zero; undefined where there is none."""
    if not values:
        return Estimate(None, None, None, judged)
    found = estimate(values)
    low = None if found.low is None else number(max(0.0, found.low))
    high = None if found.high is None else number(found.high)
    return Estimate(number(found.mean), low, high, judged)
