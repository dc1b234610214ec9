"""What a step asks of each device: floating-point operations, bytes moved, messages between devices, kernels.

Closed forms from a model's shape; no efficiency, no time. All are of the operations that a fused engine runs on a
Llama-like decoder (Pope et al., *Efficiently Scaling Transformer Inference*, 2022, count the same way).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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
