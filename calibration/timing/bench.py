"""A shape with random weights on a device, and the timed steps of its cells."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibration.common.collection import no_collection
from calibration.common.errors import CalibrationError
from calibration.models.clock import start_clock
from calibration.models.fp8 import Fp8Linear
from calibration.shapes.shapes import Shape
from calibration.timing.cells import TORCH_NAMES, Dtype, Part, StepCell, timed_layers
from calibration.timing.decoder import (
    Dense,
    HeadWeights,
    LayerWeights,
    Linear,
    place_tokens,
    run_head,
    run_layers,
    tree_parents,
)

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
