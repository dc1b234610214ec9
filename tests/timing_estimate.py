"""How long a timing job will take, from the roofline of a device: a plan on paper, good to a factor of about two."""

from __future__ import annotations

from dataclasses import dataclass

from calibration.models.clock import ENERGY_WINDOW_S
from calibration.shapes.shapes import SHAPES, Shape
from calibration.timing.gridfile import Dtype, StepCell, TimingJob, timed_layers
from calibration.timing.run import cache_bytes, step_bytes, too_large, weight_bytes


@dataclass(frozen=True)
class Peaks:
    """What a device does at most: FLOP/s by type, bytes/s of memory; its memory and its last cache in bytes."""

    name: str
    flops: dict[Dtype, float]
    bandwidth: float
    memory_bytes: int
    cache_bytes: int


H100 = Peaks(
    "H100 SXM 80 GB",
    {"bf16": 9.9e14, "fp16": 9.9e14, "fp8": 1.98e15, "fp32": 6.7e13},
    bandwidth=3.35e12,
    memory_bytes=79 * 2**30,
    cache_bytes=50 * 2**20,
)
"""Dense rates of the vendor's data sheet."""

EFFICIENCY = 0.6
"""Share of a peak that a plain torch step is taken to reach."""
KERNELS = 22
"""Kernels of a decoder layer."""
KERNEL_S = {True: 2.5e-6, False: 8e-6}
"""Seconds that a small kernel takes, from a graph and one by one."""
CELL_S = 0.03
"""Seconds that a cell takes before its first step: buffers, masks, clocks."""
CAPTURE_RUNS = 3
"""Eager runs of a step that becomes a graph: warm-ups and the capture."""
DRAW_BYTES_S = 2e11
"""Bytes of random weights or caches drawn a second."""


def step_floor_s(shape: Shape, cell: StepCell, layers: int, peaks: Peaks) -> float:
    """Give the roofline of a step: max(operations / FLOP/s, bytes / bandwidth), s."""
    tokens = cell.batch * cell.new_tokens
    seen = cell.context_tokens + cell.new_tokens * (0.5 if cell.operation == "prefill" else 1.0)
    operations = layers * tokens * (2 * shape.layer_matrix_parameters + 4 * seen * shape.query_width)
    if cell.part != "layer":
        scored = cell.batch if cell.operation == "prefill" else tokens
        operations += 2 * scored * shape.vocabulary * shape.hidden
    moved = step_bytes(shape, cell, layers)
    return max(operations / peaks.flops[cell.dtype], moved / peaks.bandwidth)


def expected_step_s(shape: Shape, cell: StepCell, layers: int, peaks: Peaks) -> float:
    """Give the seconds that a step of `cell` is expected to take: its roofline at `EFFICIENCY`, plus its kernels."""
    kernels = (layers * KERNELS + 5) * KERNEL_S[cell.graph]
    return step_floor_s(shape, cell, layers, peaks) / EFFICIENCY + kernels


def expected_run_s(job: TimingJob, peaks: Peaks) -> float:
    """Give the seconds that the whole of `job` is expected to take on the device `peaks`, skipped cells left out."""
    total, built = 0.0, None
    for cell, energy in job.cells().items():
        shape = SHAPES[cell.shape]
        layers = timed_layers(shape, cell.part, cell.dtype, peaks.cache_bytes)
        if cell.batch * cell.new_tokens > job.max_step_tokens or too_large(shape, cell, layers, peaks.memory_bytes):
            continue
        if built != cell.group:
            built = cell.group
            total += weight_bytes(shape, cell, layers) / DRAW_BYTES_S + 0.5
        runs = job.warmups + job.repeats + (CAPTURE_RUNS if cell.graph else 0)
        total += CELL_S + cache_bytes(shape, cell, layers) / DRAW_BYTES_S
        total += runs * expected_step_s(shape, cell, layers, peaks)
        if cell.graph:
            total += CAPTURE_RUNS * layers * KERNELS * KERNEL_S[False]
        total += ENERGY_WINDOW_S if energy else 0.0
    return total
