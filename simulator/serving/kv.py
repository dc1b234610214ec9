"""Paged KV memory: blocks that are counted, and with prefix caching found again by what they hold.

How many KV blocks a device holds, from the shapes of the models.

The requests that decode, as columns of one table, so that a round is a dozen numpy calls on slices.

A request on its way through an engine: what the engine remembers of it, whichever replica serves it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import CostError
from calibration.traces import Manifest
from calibration.traces.manifest import ModelInfo
from calibration.traces.paradigms import own_models
from simulator.scenario.fleet import BLOCK_SIZE, EngineSettings
from simulator.workload import Request


@dataclass(slots=True, eq=False)
class Job:
    """A request in service. It waits, is prefilled, decodes, and ends; preempted or requeued it waits again.

    `emitted` output tokens are out, whatever happens to its memory. `computed` tokens of its context are in memory
    while it is prefilled, and `lost` ones were, before it was preempted. It holds `blocks` KV blocks, the first
    `shared` of them under `keys`, the keys of its first full blocks of `key_tokens` tokens.
    """

    request: Request
    rank: float = 0.0
    emitted: int = 0
    computed: int = 0
    lost: int = 0
    swapped: bool = False
    blocks: int = 0
    shared: int = 0
    keys: list[int] = field(default_factory=list)
    key_tokens: int = 0
    start_s: float = math.nan
    first_token_s: float = math.nan
    previous_s: float = math.nan
    """When it last emitted before its present stretch of rounds; see `RunLog.spans`."""
    began_s: float = math.nan
    first_round: int = 0
    prefill_share_s: float = 0.0
    replay_start: int = -1
    """Start of its stretch in the replay arrays; -1 while it has none."""
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    requeues: int = 0
    cached_tokens: int = 0

    @property
    def context(self) -> int:
        """Tokens of prompt and output so far: what a prefill has to compute."""
        return self.request.prompt_tokens + self.emitted


CURSOR, POSITION, CONTEXT, LEFT, DRAFTED, ACCEPTED, SLOT, BLOCKS = range(8)
"""Rows: place in the replay arrays; output tokens committed; prompt and committed tokens; output tokens to come;
tokens drafted and accepted since it entered; stable slot id; KV blocks held."""


class DecodeTable:
    """Requests that decode, in the order in which they began; a slot id stays with its request until it leaves.

    `table` has shape (rows, max_num_seqs); the first `len` columns are live.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.jobs: list[Job] = []
        self.table: Ints = np.zeros((8, max_num_seqs), dtype=np.int64)
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        """Give the number of requests that decode."""
        return len(self.jobs)

    @property
    def live(self) -> Ints:
        """The live columns: a view."""
        return self.table[:, : len(self.jobs)]

    def enter(self, job: Job) -> None:
        """Let `job`, all of whose context is computed, decode."""
        request, emitted = job.request, job.emitted
        self.table[:, len(self.jobs)] = (
            job.replay_start + emitted,
            emitted,
            request.prompt_tokens + emitted,
            request.output_tokens - emitted,
            0,
            0,
            self._free.pop(),
            job.blocks,
        )
        self.jobs.append(job)

    def leave(self, columns: list[int]) -> list[Job]:
        """Take the jobs at `columns` (ascending) out, with what they gained, and close the gaps."""
        gone = []
        for column in columns:
            job = self.jobs[column]
            _, job.emitted, _, _, drafted, accepted, slot, job.blocks = self.table[:, column].tolist()
            job.drafted += drafted
            job.accepted += accepted
            self._free.append(slot)
            gone.append(job)
        last = len(self.jobs)
        for column in reversed(columns):
            # NOTE: moving the tail by one costs 2 us; picking the columns that stay, 15 us.
            self.table[:, column : last - 1] = self.table[:, column + 1 : last]
            last -= 1
            del self.jobs[column]
        return gone

    def drop_last(self) -> Job:
        """Take the last job out."""
        return self.leave([len(self.jobs) - 1])[0]


UNLIMITED = 1 << 60
"""Blocks of a memory without limit."""
_POSITIVE = (1 << 63) - 1


class BlockPool:
    """All KV blocks of one replica.

    A block is *private* (held by one request), *shared* (full, its content known by a key, held by one request or
    more) or *free*. Free blocks wait in a queue, the longest unused first; one whose content is known can be leased
    again until the queue hands it out: vLLM's free block queue and prefix cache, by key.

    NOTE: private blocks have no identity, only a number, and without `caching` there is no queue: a request that
    grows costs a subtraction.
    """

    def __init__(self, blocks: int | None, *, caching: bool = False) -> None:
        self.total = blocks if blocks is not None else UNLIMITED
        self.free = self.total
        self._caching = caching
        self._references: dict[int, int] = {}
        # Keys of known blocks, one each; a negative number stands for a run of blocks without known content.
        self._queue: OrderedDict[int, int] = OrderedDict({-1: self.total})
        self._runs = 1

    @property
    def used(self) -> int:
        """Blocks that requests hold; a shared one counts once."""
        return self.total - self.free

    @property
    def shared(self) -> int:
        """Blocks with known content that requests hold."""
        return len(self._references)

    def take(self, number: int) -> None:
        """Make `number` free blocks (at most `free`) private, the longest unused first; their content is lost."""
        self.free -= number
        while self._caching and number > 0:
            key, count = next(iter(self._queue.items()))
            if count > number:
                self._queue[key] = count - number
                return
            del self._queue[key]
            number -= count

    def give(self, number: int) -> None:
        """Put `number` private blocks at the end of the queue."""
        self.free += number
        if not self._caching or number == 0:
            return
        last = next(reversed(self._queue), 0)
        if last >= 0:
            self._runs += 1
            last = -self._runs
        self._queue[last] = self._queue.get(last, 0) + number

    def known(self, keys: Sequence[int]) -> int:
        """Give how many of `keys`, from the first on without a gap, are in memory."""
        for number, key in enumerate(keys):
            if key not in self._references and key not in self._queue:
                return number
        return len(keys)

    def idle(self, keys: Iterable[int]) -> int:
        """Give how many of `keys`, all known, are free: leasing them takes that many blocks."""
        return sum(key in self._queue for key in keys)

    def lease(self, keys: Iterable[int]) -> None:
        """Hold the known blocks of `keys`."""
        references, queue = self._references, self._queue
        for key in keys:
            if key in references:
                references[key] += 1
            else:
                del queue[key]
                self.free -= 1
                references[key] = 1

    def publish(self, keys: Iterable[int]) -> None:
        """Turn as many private blocks of the caller into shared ones with the content of `keys`.

        Where equal content is known already, that block is leased and the caller's own becomes free. (vLLM keeps
        such a duplicate until its request ends.)
        """
        references, queue = self._references, self._queue
        for key in keys:
            if key in references or key in queue:
                self.lease((key,))
                self.give(1)
            else:
                references[key] = 1

    def release(self, keys: Sequence[int], private: int) -> None:
        """Let go of the shared blocks of `keys` and of `private` others.

        They queue up from the last to the first, so that of a chain the end is forgotten first.
        """
        self.give(private)
        references, queue = self._references, self._queue
        for key in reversed(keys):
            left = references[key] - 1
            if left:
                references[key] = left
            else:
                del references[key]
                queue[key] = 1
                self.free += 1


def chain(seed: int, contents: Iterable[int]) -> list[int]:
    """Give the keys of a chain of blocks: each a hash of the key before it and of its own content.

    So a key stands for everything from the beginning of the text on, as in vLLM. Hashes of integers: the same on
    every machine with 64 bits; two contents collide with a probability of about 1e-19.
    """
    keys = []
    key = seed
    for content in contents:
        key = hash((key, content)) & _POSITIVE
        keys.append(key)
    return keys


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8": 1, "fp8": 1, "int8": 1}

Drafter = str | tuple[str, ...] | None
"""One drafter, several that share the device, or none."""


def num_blocks(engine: EngineSettings, manifest: Manifest, drafter: Drafter) -> int | None:
    """Give the number of KV blocks; None where memory is unlimited.

    gpu_memory_utilization * device memory * tensor_parallel_size, less the weights of verifier and drafter, divided
    by the bytes of a block; activations are not counted. Raises `CostError` that names what is not known.
    """
    if engine.gpu_memory_utilization is None:
        return engine.num_gpu_blocks
    memory = manifest.device.memory_bytes
    if memory is None:
        raise CostError(
            "engine.gpu_memory_utilization: device.memory_bytes is unknown in manifest.json; give num_gpu_blocks"
        )
    usable = engine.gpu_memory_utilization * memory * (engine.tensor_parallel_size or 1)
    weights = sum(_weight_bytes(model) for model in _models(manifest, drafter))
    blocks = int((usable - weights) / block_bytes(engine, manifest, drafter))
    if blocks < 1:
        raise CostError(
            f"engine.gpu_memory_utilization: must leave memory for KV blocks, got {usable / 1e9:.4g} GB for weights "
            f"of {weights / 1e9:.4g} GB"
        )
    return blocks


def block_bytes(engine: EngineSettings, manifest: Manifest, drafter: Drafter) -> float:
    """Give the bytes of a block, verifier and drafter together: keys and values of `block_size` tokens.

    Bytes per token of a model: 2 * layers * KV heads * (hidden size / heads) * bytes of its dtype. A model whose head
    size is not hidden size / heads needs kv_bytes_per_token.
    """
    per_token = engine.kv_bytes_per_token
    if per_token is None:
        per_token = sum(_kv_bytes(model) for model in _models(manifest, drafter))
    return per_token * (engine.block_size or BLOCK_SIZE)


def _models(manifest: Manifest, drafter: Drafter) -> list[ModelInfo]:
    models: list[ModelInfo] = [manifest.verifier]
    for name in (drafter,) if isinstance(drafter, str) else drafter or ():
        models += own_models(manifest.drafter(name))
    return models


def _kv_bytes(model: ModelInfo) -> float:
    if model.layers == 0:  # heads that read the verifier's states alone
        return 0.0
    layers, kv_heads, hidden, heads = (
        _known(model, name, "kv_bytes_per_token") for name in ("layers", "kv_heads", "hidden_size", "heads")
    )
    return 2 * layers * kv_heads * hidden / heads * _dtype_bytes(model, "kv_bytes_per_token")


def _weight_bytes(model: ModelInfo) -> float:
    return _known(model, "parameters", "num_gpu_blocks") * _dtype_bytes(model, "num_gpu_blocks")


def _known(model: ModelInfo, name: str, instead: str) -> int:
    value: int | None = getattr(model, name)
    if not value:
        raise CostError(f"engine: KV memory: {name} of '{model.name}' is unknown in manifest.json; give {instead}")
    return value


def _dtype_bytes(model: ModelInfo, instead: str) -> int:
    if model.dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise CostError(
            f"engine: KV memory: dtype of '{model.name}' must be one of {known}, got {model.dtype!r}; give {instead}"
        )
    return DTYPE_BYTES[model.dtype]
