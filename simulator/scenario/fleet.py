"""The ``[[replica]]``, ``[routing]`` and ``[batching]`` tables of a scenario.

The ``[engine]`` table of a scenario, in vLLM's words and meanings.

The ``[placement]`` table of a scenario: one section for each placement, told apart by its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from calibration.common.plugins import PluginTable, by_name
from calibration.common.settings import Count, Fraction, Positive, Seconds, Table
from simulator.scenario.routing import DrafterRouting, drafter_faults, routes_drafters

BLOCK_SIZE = 16
"""Tokens of a KV block, unless the scenario says otherwise."""


class EngineKeys(Table):
    """What an engine may be told; what is left out is unlimited or off.

    `max_num_batched_tokens`: tokens of one step. Without `enable_chunked_prefill` prefills go first, in steps of
    their own, and it bounds these. With it every running request decodes in every step, and prefill chunks fill
    what is left of the budget (at most `long_prefill_token_threshold` tokens of one request).

    KV memory is unlimited unless `num_gpu_blocks`, or `gpu_memory_utilization` of the recorded device, is given:
    utilization * memory * tensor_parallel_size, less the weights of verifier and drafter, in blocks of `block_size`
    (16) tokens that take `kv_bytes_per_token` (default: 2 * layers * KV heads * head size * bytes of the dtype, the
    drafter's added). A request reserves draft length + 1 slots ahead. When blocks run out, the request admitted last
    is preempted: computed anew later (``recompute``), or copied to the host and back (``swap``; both ways block the
    step at `swap_bandwidth_gb_s`, 1e9 bytes a second; host memory is not limited).

    `enable_prefix_caching` reuses blocks of equal content. `cudagraph_capture_sizes`: a decode step is priced at the
    next of these sizes (tokens), above the largest as it is. `tensor_parallel_size` divides stated linear verifier
    costs and adds `all_reduce_s` to each verifier step: an assumption, not a measurement.
    """

    max_num_batched_tokens: Count | None = None
    enable_chunked_prefill: bool | None = None
    long_prefill_token_threshold: Count | None = None
    block_size: Count | None = None
    num_gpu_blocks: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_bytes_per_token: Positive | None = None
    enable_prefix_caching: bool | None = None
    preemption_mode: Literal["recompute", "swap"] | None = None
    swap_bandwidth_gb_s: Positive | None = None
    cudagraph_capture_sizes: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)] | None = None
    tensor_parallel_size: Count | None = None
    all_reduce_s: Seconds | None = None


class EngineSettings(EngineKeys):
    """The engine of every replica. `max_num_seqs`: the largest batch."""

    max_num_seqs: Count = 256


def engine_faults(engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (key, rule) for every rule between keys that the (maybe unchecked) table `engine` breaks."""

    def given(key: str) -> bool:
        return engine.get(key) is not None

    faults = []
    if given("num_gpu_blocks") and given("gpu_memory_utilization"):
        faults.append(("num_gpu_blocks", "must be left out where gpu_memory_utilization is given"))
    limited = given("num_gpu_blocks") or given("gpu_memory_utilization")
    swap = engine.get("preemption_mode") == "swap"
    if given("preemption_mode") and not limited:
        faults.append(("preemption_mode", "needs num_gpu_blocks or gpu_memory_utilization: nothing is preempted"))
    if given("block_size") and not limited and not engine.get("enable_prefix_caching"):
        faults.append(("block_size", "needs num_gpu_blocks, gpu_memory_utilization or enable_prefix_caching"))
    if swap != given("swap_bandwidth_gb_s"):
        faults.append(("swap_bandwidth_gb_s", "must be given exactly where preemption_mode is 'swap'"))
    if given("kv_bytes_per_token") and not swap and not given("gpu_memory_utilization"):
        faults.append(("kv_bytes_per_token", "needs gpu_memory_utilization or preemption_mode = 'swap'"))
    if engine.get("enable_chunked_prefill") and not given("max_num_batched_tokens"):
        faults.append(("max_num_batched_tokens", "must be given where enable_chunked_prefill is true"))
    if given("long_prefill_token_threshold") and not engine.get("enable_chunked_prefill"):
        faults.append(("long_prefill_token_threshold", "needs enable_chunked_prefill = true"))
    budget, slots = engine.get("max_num_batched_tokens"), engine.get("max_num_seqs", 256)
    if isinstance(budget, int) and isinstance(slots, int) and budget < slots:
        faults.append(("max_num_batched_tokens", f"must be at least max_num_seqs = {slots}, got {budget}"))
    if given("all_reduce_s") and engine.get("tensor_parallel_size") in (None, 1):
        faults.append(("all_reduce_s", "needs tensor_parallel_size of at least 2"))
    return faults


class SerialPlacement(Table):
    """Draft, then verify, on one device.

    `pad_drafts`: the engine fills every draft up to the policy's length with padding that is verified and never
    accepted, so that a slot always costs draft length + 1 tokens, also where its drafter proposes fewer (OpenVINO
    GenAI's prompt lookup).
    """

    replay: ClassVar[str] = "as recorded"
    kind: Literal["serial"] = "serial"
    pad_drafts: bool = False


class OverlappedPlacement(Table):
    """PEARL: the drafter drafts on its own device while the verifier verifies what was drafted before."""

    replay: ClassVar[str] = "replay as in serial placement, for drafters that see tokens alone"
    kind: Literal["overlapped"]


class AsynchronousPlacement(Table):
    """AMUSD: drafter and verifier never wait for each other; a mismatch rolls the drafter back.

    The policy's draft length bounds what is drafted during one verification.
    """

    replay: ClassVar[str] = (
        "replay as in serial placement, for drafters that see tokens alone; approximation: all slots "
        "share passes and draft steps"
    )
    kind: Literal["asynchronous"]


class ManyServersPlacement(Table):
    """DSI: blocks of drafted tokens are verified by several target servers at once, while drafting goes on.

    `servers`: how many verify blocks, beside one that decodes plainly; left out, as many as needed,
    ceil(verifier step / drafting of a block). Where they are fewer, blocks wait for them. What they cost an hour
    belongs in `costs.usd_per_hour`.
    """

    replay: ClassVar[str] = (
        "replay as in serial placement, for drafters that see tokens alone; approximation: a batch sees "
        "tokens at the end of a common round"
    )
    kind: Literal["many_servers"]
    servers: Count | None = None


class RemotePlacement(Table):
    """The drafter on another device behind a link, in turn with the verifier; ``[costs.drafter]`` is for that device.

    `round_trip_s`: latency of a round, there and back. `bandwidth_gb_s` (1e9 bytes a second; left out: unlimited)
    carries `bytes_per_drafted_token` of every token that is to be verified - 4 for its id alone; sampled verification
    also needs the drafter's probabilities, up to 2 * vocabulary - and 4 bytes back for every token emitted.
    """

    replay: ClassVar[str] = "replay as in serial placement; approximation: drafts of a batch travel together"
    kind: Literal["remote"]
    round_trip_s: Seconds
    bandwidth_gb_s: Positive | None = None
    bytes_per_drafted_token: Positive = 4.0


class LayerParallelPlacement(Table):
    """EasySpec: `group` consecutive layers of the drafter run at once, each on a device of its own.

    A draft step takes ceil(layers / group) / layers of its time, and `sync_s`. `layers`: those of the drafter,
    default what the TraceSet says. `acceptance_drop`: the share of accepted tokens that the drafter loses by it;
    published alignment drops are at most 0.07.
    """

    replay: ClassVar[str] = (
        "approximation: recorded acceptance thinned, draft steps proportional to layers run in turn"
    )
    kind: Literal["layer_parallel"]
    group: Count
    layers: Count | None = None
    sync_s: Seconds = 0.0
    acceptance_drop: Fraction


class PluginPlacement(PluginTable):
    """A placement from outside, by the name of its entry point; written ``kind = "plugin:name"``."""

    replay: ClassVar[str] = "as the plug-in plays it"
    group: ClassVar[str] = "paceline.placement"
    kind: Literal["plugin"]


Placement = Annotated[
    SerialPlacement
    | OverlappedPlacement
    | AsynchronousPlacement
    | ManyServersPlacement
    | RemotePlacement
    | LayerParallelPlacement
    | PluginPlacement,
    Field(discriminator="kind"),
    by_name("kind"),
]


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
