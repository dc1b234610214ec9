"""What a step asks of each device: floating-point operations, bytes moved, messages between devices, kernels.

Closed forms from a model's shape; no efficiency, no time. All are of the operations that a fused engine runs on a
Llama-like decoder (Pope et al., *Efficiently Scaling Transformer Inference*, 2022, count the same way).

What one kernel takes: fitted shares of a device's peaks, and the formulas that turn work into seconds.

All by `efficiencies/roofline.json`, made by `studies.roofline.coefficients` from public tables; it names them, with
the errors on what was held out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CostError
from calibration.shapes.shapes import Shape

Number = float | Floats | Ints

LAYER_KERNELS = 10
"""Kernels of a layer of a fused engine: residual + norm, queries/keys/values, rotation, cache write, attention,
output, residual + norm, gate and up, their product, down."""
QK_NORM_KERNELS = 2
"""Norms of the query heads and of the key heads, where the shape has them."""
HEAD_KERNELS = 4
"""Kernels outside of the layers: embedding, residual + norm, LM head, choice of the next token."""
LAYER_ALL_REDUCES = 2
"""All-reduces of a layer on several devices: behind the attention's output and behind the down projection."""


@dataclass(frozen=True)
class Work:
    """What one step asks of **each** of its devices; every field broadcasts over the arrays it was made of.

    Floating-point operations count a multiplication and an addition as two. ``linear_flops``: the matrices of the
    layers. ``attention_flops``: scores and weighted values. ``head_flops``: the LM head. Norms, rotations and the
    choice of tokens are not counted.

    Bytes are those of a step that finds nothing in its caches and moves nothing twice: ``weight_bytes`` (layers,
    final norm, LM head where logits are asked for, one embedding row a new token), ``kv_read_bytes`` (keys and values
    of cached and new tokens, once for all query heads that share them), ``kv_write_bytes`` (those of new tokens),
    ``activation_bytes`` (what every kernel reads and writes between).

    ``scored_tokens``: those that the LM head scores, all of them on every device.

    ``all_reduces``: how many; ``all_reduce_bytes``: their messages together, tokens x hidden x bytes each. A ring
    moves 2 (p - 1) / p of a message over every one of p devices' links. Both 0 on one device; the all-reduce of the
    embedding and the gathering of logits (one message each a step) are left out.
    """

    linear_flops: Any
    attention_flops: Any
    head_flops: Any
    weight_bytes: Any
    kv_read_bytes: Any
    kv_write_bytes: Any
    activation_bytes: Any
    scored_tokens: Any
    all_reduces: int
    all_reduce_bytes: Any
    kernels: int

    @property
    def flops(self) -> Any:
        """All floating-point operations."""
        return self.linear_flops + self.attention_flops + self.head_flops

    @property
    def kv_bytes(self) -> Any:
        """Bytes of keys and values, read and written."""
        return self.kv_read_bytes + self.kv_write_bytes

    @property
    def bytes(self) -> Any:
        """All bytes moved to and from the device's memory."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True)
class Share:
    """One device's part of a model under tensor parallelism, in entries; matrices are split, norms are not.

    Query heads, the MLP and the vocabulary are split evenly; KV heads too, down to one on each device, which then
    several devices hold (as Megatron-LM and vLLM do).
    """

    query_width: float
    kv_width: float
    intermediate: float
    vocabulary: float
    layer_matrix: float
    layer_rest: float

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, shape: Shape, tensor_parallel: int = 1) -> Share:
        """Give one device's part of `shape` on `tensor_parallel` devices; `CostError` where it does not divide."""
        size = tensor_parallel
        if size < 1:
            raise CostError(f"tensor_parallel: must be at least 1, got {size}")
        for name, count in (("heads", shape.heads), ("intermediate", shape.intermediate)):
            if count % size:
                raise CostError(f"tensor_parallel: must divide {name} = {count} of '{shape.name}', got {size}")
        if shape.kv_heads % size and size % shape.kv_heads:
            raise CostError(
                f"tensor_parallel: must divide kv_heads = {shape.kv_heads} of '{shape.name}' or be a multiple of it, "
                f"got {size}"
            )
        query = shape.query_width / size
        kv = float(max(shape.kv_heads // size, 1) * shape.head_dim)
        matrix = shape.hidden * 2 * (query + kv) + 3 * shape.hidden * shape.intermediate / size
        biases = query + 2 * kv if shape.qkv_bias else 0.0
        norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
        return cls(query, kv, shape.intermediate / size, shape.vocabulary / size, matrix, norms + biases)


def step_work(
    shape: Shape,
    batch: Number,
    new_tokens: Number,
    context_tokens: Number,
    *,
    dtype_bytes: float = 2,
    kv_bytes: float = 2,
    tensor_parallel: int = 1,
    logits: Number | None = None,
) -> Work:
    """Give the work of a step on `batch` sequences; arguments broadcast.

    `new_tokens` and `context_tokens` (tokens already in the cache) are **sums over the batch**. `logits`: tokens that
    the LM head scores, in all; default: every new token, as in decoding and verifying (a prefill scores one a
    sequence: give `batch`). `dtype_bytes`: bytes of a weight and of an activation; `kv_bytes`: of a cached number.

    With N new and C cached tokens in all of b sequences, matrices take 2 x their entries x N operations; attention
    takes 4 x (width of the query heads) x sum over sequences of n (c + (n + 1) / 2): a new token sees the context,
    the new tokens before it and itself. Of that sum only N and C are known here: it is taken as
    N (C + (N + b) / 2) / b, exact where every sequence has as many new tokens (a decode or verify step, whatever the
    contexts), else an approximation.

    Raises `CostError` where `tensor_parallel` does not divide the shape.
    """
    share, layers, hidden = Share.of(shape, tensor_parallel), shape.layers, shape.hidden
    scored = new_tokens if logits is None else logits
    sequences = batch + (batch == 0)
    pairs = new_tokens * (context_tokens + (new_tokens + batch) / 2) / sequences
    kv_token = layers * 2 * share.kv_width * kv_bytes
    head = share.vocabulary * hidden
    weights = layers * (share.layer_matrix + share.layer_rest) + hidden
    parallel = tensor_parallel > 1
    return Work(
        linear_flops=2.0 * layers * share.layer_matrix * new_tokens,
        attention_flops=4.0 * layers * share.query_width * pairs,
        head_flops=2.0 * head * scored,
        weight_bytes=dtype_bytes * (weights + hidden * new_tokens + head * (scored > 0)),
        kv_read_bytes=kv_token * (context_tokens + new_tokens),
        kv_write_bytes=kv_token * new_tokens,
        activation_bytes=dtype_bytes * _activations(shape, share, new_tokens, scored),
        scored_tokens=scored,
        all_reduces=LAYER_ALL_REDUCES * layers if parallel else 0,
        all_reduce_bytes=float(LAYER_ALL_REDUCES * layers * hidden * parallel) * dtype_bytes * new_tokens,
        kernels=layers * (LAYER_KERNELS + QK_NORM_KERNELS * shape.qk_norm + LAYER_ALL_REDUCES * parallel)
        + HEAD_KERNELS,
    )


def _activations(shape: Shape, share: Share, new_tokens: Number, scored: Number) -> Any:
    """Give the numbers that the kernels of a step read and write between them.

    A token and layer, with h hidden, q and k the widths of this device's query and key heads, i of its MLP: twice
    residual + norm 4h; queries/keys/values h + q + 2k; rotation 2 (q + k); cache write 2k; attention 2q; output
    q + h; gate and up h + 2i; product 3i; down i + h. Norms of heads, where there are any: 2 (q + k).
    """
    query, key = share.query_width, share.kv_width
    layer = 12 * shape.hidden + 6 * query + 6 * key + 6 * share.intermediate
    if shape.qk_norm:
        layer += 2 * (query + key)
    outside = shape.hidden + 4 * shape.hidden  # the embedding's row, residual + norm
    return (shape.layers * layer + outside) * new_tokens + (shape.hidden + share.vocabulary) * scored


def kv_token_bytes(shape: Shape, *, kv_bytes: float = 2, tensor_parallel: int = 1) -> float:
    """Give the bytes that the keys and values of one token take on each device; exact."""
    return shape.layers * 2 * Share.of(shape, tensor_parallel).kv_width * kv_bytes


def weight_memory_bytes(shape: Shape, *, dtype_bytes: float = 2, tensor_parallel: int = 1) -> float:
    """Give the bytes that the weights take on each device, embedding and LM head split by rows; exact."""
    share = Share.of(shape, tensor_parallel)
    tables = share.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return dtype_bytes * (shape.layers * (share.layer_matrix + share.layer_rest) + tables + shape.hidden)


COEFFICIENTS = Path(__file__).parent / "efficiencies" / "roofline.json"


@dataclass(frozen=True)
class Kernel:
    """How one family of kernels fares: seconds of one that does nothing, and the shares of the peaks it reaches."""

    launch_s: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Mover:
    """The same of a kernel that only moves numbers."""

    launch_s: float
    bytes: float


@dataclass(frozen=True)
class Tested:
    """Up to where errors are known: new tokens and sequences of a step, context of a sequence, widths, devices."""

    new_tokens: float
    batch: float
    context_tokens: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    tensor_parallel: tuple[int, ...]


@dataclass(frozen=True)
class Efficiencies:
    """Everything fitted: kernels by family, links, host times; where they were tested, and the errors there.

    ``matmul`` bounds matrices, ``attention`` scores and values; ``elementwise`` what only moves numbers, by kind
    (``norm``, ``rotation``, ``product``, ``embedding``). ``link``: share of the link that an all-reduce reaches, one
    kernel of ``matmul.launch_s`` each. ``host_s`` a step; ``host_per_logit_s`` for each sequence and entry of the
    vocabulary: sampling, detokenising and streaming.
    """

    matmul: Kernel
    attention: Kernel
    elementwise: Mapping[str, Mover]
    link: float
    host_s: float
    host_per_logit_s: float
    tested: Tested
    errors: Mapping[str, float]

    @classmethod
    @functools.cache
    def fitted(cls) -> Efficiencies:
        """Give those that the package ships."""
        return cls.from_json(json.loads(COEFFICIENTS.read_text(encoding="utf-8")))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Efficiencies:
        """Give those in the content of a file of coefficients."""
        tested: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data["tested"].items()
        }
        return cls(
            matmul=Kernel(**data["matmul"]["coefficients"]),
            attention=Kernel(**data["attention"]["coefficients"]),
            elementwise={kind: Mover(**part) for kind, part in data["elementwise"]["coefficients"].items()},
            link=data["all_reduce"]["coefficients"]["link"],
            host_s=data["host"]["coefficients"]["step_s"],
            host_per_logit_s=data["host"]["coefficients"]["per_logit_s"],
            tested=Tested(**tested),
            errors=data["errors"],
        )


def matmul_s(kernel: Kernel, tokens: Any, inner: Any, outer: Any, flops: float, bandwidth: float, byte: float) -> Any:
    """Give the seconds of (tokens, inner) x (inner, outer): launch + (compute^4 + memory^4)^(1/4).

    compute = 2 x tokens x inner x outer / (share x `flops`); memory = the weights (`byte` bytes each) and what goes
    in and out (at least two bytes a number), over share x `bandwidth`. Fourth powers, so that only square roots are
    taken, which every machine rounds alike.
    """
    compute = 2.0 * tokens * inner * outer / (kernel.flops * flops)
    moved = byte * inner * outer + max(byte, 2.0) * tokens * (inner + outer)
    memory = moved / (kernel.bytes * bandwidth)
    compute, memory = compute * compute, memory * memory
    return kernel.launch_s + np.sqrt(np.sqrt(compute * compute + memory * memory))


def attention_s(kernel: Kernel, flops_s: Any, kv_s: Any) -> Any:
    """Give the seconds of one attention kernel: max((sqrt(launch) + sqrt(compute))^2, launch + memory).

    `flops_s` and `kv_s`: seconds that its operations take at peak, and reading its keys and values. The first form
    is what prefills measure (few query blocks fill a device badly), the second is a decode step's.
    """
    compute = (np.sqrt(kernel.launch_s) + np.sqrt(flops_s / kernel.flops)) ** 2
    return np.maximum(compute, kernel.launch_s + kv_s / kernel.bytes)


def elementwise_s(kernel: Mover, moved_s: Any) -> Any:
    """Give the seconds of a kernel that only moves numbers: launch + `moved_s` (at peak) / share."""
    return kernel.launch_s + moved_s / kernel.bytes


def all_reduce_s(launch_s: float, share: float, message_bytes: Any, size: Any, link: float) -> Any:
    """Give the seconds of one all-reduce over `size` devices: launch + 2 (p - 1) / p x message / (share x link)."""
    return launch_s + 2 * (size - 1) / size * message_bytes / (share * link)


def matrices(shape: Shape, tensor_parallel: int = 1) -> tuple[tuple[int, float, float], ...]:
    """Give (how many, inner width, outer width) of the matrices of one device, the LM head last.

    Fused as engines do: queries, keys and values are one, gate and up another.
    """
    share = Share.of(shape, tensor_parallel)
    hidden = float(shape.hidden)
    return (
        (shape.layers, hidden, share.query_width + 2 * share.kv_width),
        (shape.layers, share.query_width, hidden),
        (shape.layers, hidden, 2 * share.intermediate),
        (shape.layers, share.intermediate, hidden),
        (1, hidden, share.vocabulary),
    )
