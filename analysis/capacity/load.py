"""The scenarios that a capacity plan runs: without speculation, saturated, and at a given arrival rate.

The scenario that a capacity plan takes where a study of a TraceSet is all there is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from analysis.speedup.findings import Findings
from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator.scenario.engine import LayerParallelPlacement, ManyServersPlacement, Placement
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
