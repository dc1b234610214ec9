"""A shape with random weights on a device, and the timed steps of its cells.

A Llama-like decoder step written for timing: static shapes, caches written in place, nothing read back.

The same function runs eagerly and inside a CUDA graph, with plain or fp8 matrices, for chains and for trees. Its
logits are those of transformers' Llama and Qwen2 on the same weights (a test compares them).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.common.fetch import no_collection
from calibration.models.clock import start_clock
from calibration.models.fp8 import Fp8Linear
from calibration.shapes.shapes import Shape
from calibration.timing.gridfile import TORCH_NAMES, Dtype, Part, StepCell, timed_layers

Linear = Callable[[Tensor], Tensor]
"""x [..., in] to [..., out]."""


@dataclass(frozen=True)
class Dense:
    """x W' + b. ``weight`` [out, in], ``bias`` [out]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Give x W' + b."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``qkv``: queries, keys, values side by side; ``gate_up``: the gate, then what it gates."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class HeadWeights:
    """What is outside of the layers: embedding [vocabulary, hidden], final norm [hidden], LM head."""

    embedding: Tensor
    norm: Tensor
    head: Linear


@dataclass(frozen=True)
class Place:
    """Where n new tokens stand, and what they see, in a cache of S slots.

    ``slots`` [n]: their cache slots. ``cos``, ``sin`` [n, head_dim]: their rotary factors. ``bias`` [group * n, S]: 0
    where a token may look and -inf elsewhere, once for every query head of a KV head; None leaves the causal order to
    the attention kernel, which then sees ``causal`` (or a square of new tokens alone).
    """

    slots: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor | None = None
    causal: Tensor | None = None


def place_tokens(
    shape: Shape, context: int, parents: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Place:
    """Place new tokens after `context` cached ones; token i follows token ``parents[i]`` (-1: the last cached one).

    A chain has parents -1, 0, 1, ...; anything else is a tree, whose tokens see the context and their ancestors.
    """
    new, total = len(parents), context + len(parents)
    depth = depths(parents)
    positions = torch.tensor(depth, device=device) + context
    cos, sin = rotary(shape, positions, dtype)
    place = Place(torch.arange(context, total, device=device), cos, sin)
    chain = depth == list(range(new))
    if chain and new == 1:
        return place
    if chain and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.bias import causal_lower_right

        causal = causal_lower_right(new, total)
        return Place(place.slots, cos, sin, causal=causal)
    if chain and not context:
        return place
    return Place(place.slots, cos, sin, bias=_bias(shape, context, parents, dtype, device))


def depths(parents: Sequence[int]) -> list[int]:
    """Give the depth of every token, 0 for those that follow the context; a parent stands before its children."""
    depth: list[int] = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return depth


def tree_parents(nodes: int, branching: int = 2) -> list[int]:
    """Give the parents of a committed token with `nodes` drafted ones below it, level by level, `branching` each.

    The time of a masked step does not depend on which tree its mask draws.
    """
    return [-1] + [node // branching for node in range(nodes)]


def ancestors(parents: Sequence[int]) -> Tensor:
    """Give who sees whom among the new tokens: bool [n, n], each its ancestors and itself."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            seen[token] |= seen[parent]
    return seen


def _bias(shape: Shape, context: int, parents: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give the additive mask of `Place`, in rows padded to 8 entries so that no attention call has to copy it."""
    new, total = len(parents), context + len(parents)
    group = shape.heads // shape.kv_heads
    rows = torch.zeros(group * new, -(-total // 8) * 8, dtype=dtype, device=device)[:, :total]
    hidden = ~ancestors(parents).repeat(group, 1).to(device)
    rows[:, context:].masked_fill_(hidden, float("-inf"))
    return rows


def rotary(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give the rotary factors [n, head_dim]: cosines, and sines with the sign of the half they multiply.

    The rotation of (a, b), the halves of a head, is (a cos - b sin, b cos + a sin) (RoFormer, in Llama's layout).
    """
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angles = positions[:, None].float() / shape.rope_theta**half
    sines = angles.sin()
    return angles.cos().repeat(1, 2).to(dtype), torch.cat((-sines, sines), 1).to(dtype)


def run_layer(shape: Shape, weights: LayerWeights, x: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Run one decoder layer over `x` [batch, n, hidden]; `keys`, `values` [batch, KV heads, S, head_dim] are written.

    Both caches are filled up to the first of the new slots.
    """
    batch, new, _ = x.shape
    normed = F.rms_norm(x, (shape.hidden,), weights.attention_norm, shape.norm_eps)
    split = weights.qkv(normed).view(batch, new, shape.heads + 2 * shape.kv_heads, shape.head_dim).transpose(1, 2)
    turning = split[:, : shape.heads + shape.kv_heads]
    turned = torch.addcmul(turning * place.cos, turning.roll(shape.head_dim // 2, -1), place.sin)
    keys.index_copy_(2, place.slots, turned[:, shape.heads :])
    values.index_copy_(2, place.slots, split[:, shape.heads + shape.kv_heads :])
    mixed = attend(turned[:, : shape.heads], keys, values, place)
    x = x + weights.out(mixed.transpose(1, 2).reshape(batch, new, shape.query_width))
    gate, up = weights.gate_up(F.rms_norm(x, (shape.hidden,), weights.mlp_norm, shape.norm_eps)).chunk(2, -1)
    return x + weights.down(F.silu(gate) * up)


def attend(queries: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Give scaled dot-product attention [batch, heads, n, head_dim] of `queries` over the cache.

    Without a kernel's own causal order, the query heads of a KV head become rows of one query, so that keys and
    values are read once for all of them; one new token needs no mask at all.
    """
    batch, heads, new, width = queries.shape
    group = heads // keys.shape[1]
    if place.causal is not None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=place.causal, enable_gqa=group > 1)
    if place.bias is None and new > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    rows = queries.reshape(batch, keys.shape[1], group * new, width)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=place.bias).reshape(queries.shape)


def run_layers(shape: Shape, layers: Sequence[LayerWeights], x: Tensor, cache: Tensor, place: Place) -> Tensor:
    """Run `layers` over `x` [batch, n, hidden]; `cache` is [layers, 2, batch, KV heads, S, head_dim]."""
    for weights, kept in zip(layers, cache, strict=True):
        x = run_layer(shape, weights, x, kept[0], kept[1], place)
    return x


def run_head(shape: Shape, weights: HeadWeights, x: Tensor) -> Tensor:
    """Give logits [..., vocabulary] of hidden states `x` [..., hidden]: final norm and LM head."""
    return weights.head(F.rms_norm(x, (shape.hidden,), weights.norm, shape.norm_eps))


_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CAPTURE_WARMUPS = 2
"""Runs before a capture: libraries must have chosen their kernels and taken their workspaces by then."""


@dataclass(frozen=True)
class Bench:
    """The weights of one part of one shape, ready to step. ``layers``: how many decoder layers a step runs."""

    shape: Shape
    part: Part
    dtype: Dtype
    device: torch.device
    layers: tuple[LayerWeights, ...]
    head: HeadWeights | None

    @classmethod
    @torch.inference_mode()
    def build(
        cls, shape: Shape, part: Part, dtype: Dtype, device: torch.device, seed: int, layers: int | None = None
    ) -> Bench:
        """Draw the weights of `part` (`layers` of them, default as `timed_layers` says for the device)."""
        count = timed_layers(shape, part, dtype, last_cache_bytes(device)) if layers is None else layers
        draw = _Draw(activation_dtype(dtype), device, torch.Generator(device).manual_seed(seed))
        made = tuple(_layer(shape, dtype, draw) for _ in range(count))
        return cls(shape, part, dtype, device, made, None if part == "layer" else _head(shape, draw))

    @torch.inference_mode()
    def work(self, cell: StepCell) -> Callable[[], Tensor]:
        """Give a function that runs one step of `cell` on buffers of its own and gives what the step computes.

        That is the hidden states of a ``layer`` step, and the chosen tokens of any other. Every call does the same.
        """
        shape, device, dtype = self.shape, self.device, activation_dtype(self.dtype)
        tree = cell.tree_nodes is not None
        parents = tree_parents(cell.new_tokens - 1) if tree else list(range(-1, cell.new_tokens - 1))
        place = place_tokens(shape, cell.context_tokens, parents, dtype, device)
        slots = cell.context_tokens + cell.new_tokens
        cache = torch.empty(
            len(self.layers), 2, cell.batch, shape.kv_heads, slots, shape.head_dim, dtype=dtype, device=device
        ).normal_()
        hidden = torch.empty(cell.batch, cell.new_tokens, shape.hidden, dtype=dtype, device=device).normal_()
        tokens = torch.arange(cell.batch * cell.new_tokens, device=device).view(cell.batch, -1) % shape.vocabulary
        last = 1 if cell.operation == "prefill" else cell.new_tokens
        head = self.head

        @torch.inference_mode()
        def step() -> Tensor:
            x = hidden if head is None else torch.nn.functional.embedding(tokens, head.embedding)
            x = run_layers(shape, self.layers, x, cache, place)
            return x if head is None else run_head(shape, head, x[:, -last:]).argmax(-1)

        return step

    def timed(self, cell: StepCell) -> Callable[[], float]:
        """Give a function that runs one step of `cell`, from a CUDA graph where it asks for one; gives its seconds.

        `CalibrationError` for a graph on anything but a CUDA device.
        """
        run: Callable[[], object] = self.work(cell)
        if cell.graph:
            run = capture(run, self.device)

        def step() -> float:
            clock = start_clock(self.device)
            run()
            return clock()

        return step


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Give a function that replays `work` as one CUDA graph."""
    if fault := graph_fault(device):
        raise CalibrationError(f"graph: {fault}")
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), no_collection():
        for _ in range(_CAPTURE_WARMUPS):
            work()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # a graph allocates from a pool of its own, not from what the warm-ups left
        graph.capture_begin()
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # the fault of the work counts, not that its capture cannot end well
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(side)
    replay: Callable[[], None] = graph.replay
    return replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the one stream for captures; every stream keeps a workspace of the matrix library for good."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def graph_fault(device: torch.device) -> str | None:
    """Say why steps cannot be captured on `device`, or None where they can."""
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, got {device.type}"


def activation_dtype(dtype: Dtype) -> torch.dtype:
    """Give the type of activations, caches and head; bf16 around fp8 matrices."""
    found: torch.dtype = getattr(torch, TORCH_NAMES["bf16" if dtype == "fp8" else dtype])
    return found


def last_cache_bytes(device: torch.device) -> int:
    """Give the size of the last cache before the memory of `device`, 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        sizes = [path.read_text(encoding="ascii").strip() for path in _CPU_CACHES.glob("index*/size")]
    except OSError:
        return 0
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


def free_memory_bytes(device: torch.device) -> int | None:
    """Give the bytes that can be allocated on `device` now, None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether something could not be allocated; only torch's CUDA allocator has a class for it."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(fault, torch.OutOfMemoryError) or (
        isinstance(fault, RuntimeError) and any(word in str(fault) for word in words)
    )


@dataclass(frozen=True)
class _Draw:
    """Random weights of one type on one device; deviation 1/sqrt(in) keeps activations near 1."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def matrix(self, out: int, width: int) -> Tensor:
        empty = torch.empty(out, width, dtype=self.dtype, device=self.device)
        return empty.normal_(std=width**-0.5, generator=self.generator)

    def vector(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)


def _layer(shape: Shape, dtype: Dtype, draw: _Draw) -> LayerWeights:
    def linear(out: int, width: int, bias: bool = False) -> Linear:
        weight, shift = draw.matrix(out, width), draw.vector(out) if bias else None
        return Fp8Linear.quantise(weight, shift) if dtype == "fp8" else Dense(weight, shift)

    return LayerWeights(
        attention_norm=draw.vector(shape.hidden),
        qkv=linear(shape.query_width + 2 * shape.kv_width, shape.hidden, shape.qkv_bias),
        out=linear(shape.hidden, shape.query_width),
        mlp_norm=draw.vector(shape.hidden),
        gate_up=linear(2 * shape.intermediate, shape.hidden),
        down=linear(shape.hidden, shape.intermediate),
    )


def _head(shape: Shape, draw: _Draw) -> HeadWeights:
    embedding = draw.matrix(shape.vocabulary, shape.hidden)
    head = embedding if shape.tied else draw.matrix(shape.vocabulary, shape.hidden)
    return HeadWeights(embedding, draw.vector(shape.hidden), Dense(head))
