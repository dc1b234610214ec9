"""The ``[[replica]]``, ``[routing]`` and ``[batching]`` tables of a scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from calibration.common.plugins import PluginTable, by_name
from calibration.common.settings import Count, Positive, Seconds, Table
from simulator.scenario.engine import EngineKeys, engine_faults
from simulator.scenario.routing import DrafterRouting, drafter_faults, routes_drafters

Outage = Annotated[tuple[Seconds, Seconds], Field(strict=False)]
Outages = Annotated[tuple[Outage, ...], Field(min_length=1, strict=False)]
"""Pairs of (fails at, is back at), in seconds."""


class FirstCome(Table):
    """First come, first served: vLLM's default."""

    policy: Literal["fcfs"] = "fcfs"


class ShortestPredicted(Table):
    """Shortest predicted output first (as in SSJF, Qiu et al. 2024, arXiv 2404.08509, with a plainer predictor).

    The prediction is the mean recorded output of the request's domain, not its own length. Under overload long
    domains may wait forever.
    """

    policy: Literal["shortest_predicted_first"]


class OracleShortest(Table):
    """Shortest true output first: an oracle, no server knows it. It bounds what prediction can gain."""

    policy: Literal["oracle_shortest"]


class EarliestDeadline(Table):
    """Earliest deadline first (Liu and Layland 1973): arrival + the request's own deadline.

    Requests without one get `default_s` after their arrival (and others never more than that); without `default_s`
    they come after all others.
    """

    policy: Literal["deadline"]
    default_s: Positive | None = None


class PriorityClasses(Table):
    """Smaller priority first, as vLLM's ``priority`` scheduling; within a class first come, first served.

    With `ageing_s` a request gains one class by waiting so long, so that none starves; without it the last class may
    wait forever under overload, as in vLLM. Waiting requests never preempt running ones here.
    """

    policy: Literal["priority"]
    ageing_s: Positive | None = None


class PluginOrder(PluginTable):
    """An order from outside, by the name of its entry point; written ``policy = "plugin:name"``."""

    group: ClassVar[str] = "paceline.batching"
    policy: Literal["plugin"]


Batching = Annotated[
    FirstCome | ShortestPredicted | OracleShortest | EarliestDeadline | PriorityClasses | PluginOrder,
    Field(discriminator="policy"),
    by_name("policy"),
]


class RoundRobin(Table):
    """Replicas in turn; one that is down is passed over."""

    policy: Literal["round_robin"] = "round_robin"


class LeastLoaded(Table):
    """The replica with the fewest outstanding requests, or tokens (prompt and output so far); the first of equals."""

    policy: Literal["least_loaded"]
    by: Literal["requests", "tokens"] = "requests"


class PowerOfTwo(Table):
    """The less loaded of two replicas drawn at random (Mitzenmacher 2001)."""

    policy: Literal["power_of_two_choices"]
    by: Literal["requests", "tokens"] = "requests"


class PrefixAffinity(Table):
    """The replica that has the longest beginning of the prompt in its prefix cache; of equals the least loaded.

    Where the fullest and the emptiest replica differ by more than `balance_requests` outstanding requests, the least
    loaded one (SGLang's cache-aware router and its ``balance-abs-threshold``). It knows the caches exactly; SGLang's
    router guesses them from what it sent.
    """

    policy: Literal["prefix_affinity"]
    balance_requests: Count = 32


class SessionHash(Table):
    """The replica with the highest hash of (client, replica): rendezvous hashing (Thaler and Ravishankar 1998).

    A client stays with its replica as long as that is up. Requests without a client are hashed by themselves.
    """

    policy: Literal["session_hash"]


class PluginRouter(PluginTable):
    """A router from outside, by the name of its entry point; written ``policy = "plugin:name"``."""

    group: ClassVar[str] = "paceline.replica_routing"
    policy: Literal["plugin"]


ReplicaRouting = Annotated[
    RoundRobin | LeastLoaded | PowerOfTwo | PrefixAffinity | SessionHash | PluginRouter,
    Field(discriminator="policy"),
    by_name("policy"),
]


class Routing(Table):
    """Where requests go: `replica` chooses among the ``[[replica]]`` that are up (default: in turn).

    `drafter` chooses who drafts, on every replica that has no ``drafter`` of its own.
    """

    replica: ReplicaRouting | None = None
    drafter: DrafterRouting | None = None


def fleet_faults(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (place, rule) for every rule about replicas and routing that the (maybe unchecked) scenario breaks."""
    engine = value if isinstance(value := data.get("engine"), Mapping) else {}
    routing = value if isinstance(value := data.get("routing"), Mapping) else {}
    rule = value if isinstance(value := routing.get("replica"), Mapping) else {}
    replicas = value if isinstance(value := data.get("replica"), Sequence) else ()
    tables = [table for table in replicas if isinstance(table, Mapping)]
    faults: list[tuple[str, str]] = drafter_faults(data)
    if routing.get("replica") is not None and data.get("replica") is None:
        faults.append(("routing.replica", "needs [[replica]] tables"))
    if data.get("replica") is not None and not tables:
        faults.append(("replica", "must have a [[replica]] table, or be left out"))
    for number, table in enumerate(tables):
        place = f"replica[{number}]"
        own = {key: value for key, value in table.items() if key in EngineKeys.model_fields or key == "max_num_seqs"}
        merged = {**engine, **{key: value for key, value in own.items() if value is not None}}
        told = {rule for _, rule in engine_faults(engine)}
        faults += [(f"{place}.{key}", rule) for key, rule in engine_faults(merged) if rule not in told]
        faults += _replica_faults(place, table, data)
        if rule.get("policy") == "prefix_affinity" and not merged.get("enable_prefix_caching"):
            faults.append((f"{place}.enable_prefix_caching", "must be true for routing by prefix_affinity"))
    names = [table.get("name", "replica") for table in tables]
    if len(set(map(str, names))) < len(names):
        faults.append(("replica", f"must have a name of its own each, got {', '.join(map(str, names))}"))
    return faults


def _replica_faults(place: str, table: Mapping[str, Any], data: Mapping[str, Any]) -> list[tuple[str, str]]:
    faults = []
    stopping = table.get("stopping") or data.get("stopping")
    policy = stopping.get("policy", "none") if isinstance(stopping, Mapping) else "none"
    nameless = table.get("drafter") is None and data.get("drafter") is None and not routes_drafters(data)
    if policy != "none" and nameless:
        faults.append((f"{place}.drafter", f"must be given for policy '{policy}'"))
    placement, routing = table.get("placement"), data.get("routing")
    kind = placement.get("kind", "serial") if isinstance(placement, Mapping) else "serial"
    shared = isinstance(routing, Mapping) and routing.get("drafter") is not None and table.get("drafter") is None
    if kind != "serial" and shared:
        faults.append((f"{place}.placement.kind", f"must be serial beside routing.drafter, got {kind!r}"))
    costs = table.get("costs")
    if isinstance(costs, Mapping) and costs.get("usd_per_hour") is not None:
        faults.append((f"{place}.costs.usd_per_hour", "must be in [costs]: it is what the whole fleet costs"))
    outages = table.get("failures")
    times = (
        [t for pair in outages if isinstance(pair, Sequence) for t in pair] if isinstance(outages, Sequence) else []
    )
    if all(isinstance(t, int | float) for t in times) and sorted(set(times)) != times:
        faults.append((f"{place}.failures", f"must be pairs [fails at, is back at] in order of time, got {outages}"))
    return faults
