"""The ``[engine]`` table of a scenario, in vLLM's words and meanings.

The ``[placement]`` table of a scenario: one section for each placement, told apart by its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from calibration.common.plugins import PluginTable, by_name
from calibration.common.settings import Count, Fraction, Positive, Seconds, Table

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
