"""What a step needs of a device's memory, estimated before anything is allocated. No torch needed."""

from __future__ import annotations

from calibration.shapes.shapes import Shape
from calibration.timing.cells import StepCell, element_size, layer_bytes

USABLE = 0.94
"""Share of the free memory that a step may take; the rest is for the allocator and the libraries' workspaces."""


def weight_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes of the weights that a step of `cell` over `layers` decoder layers holds; exact."""
    outside = 0 if cell.part == "layer" else shape.head_parameters * element_size(cell.dtype)
    return layers * layer_bytes(shape, cell.dtype) + outside


def cache_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes of the KV cache of `cell`, its new tokens included; exact."""
    slots = cell.batch * (cell.context_tokens + cell.new_tokens)
    return layers * 2 * slots * shape.kv_width * element_size(cell.dtype)


def working_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes of what lives for a step only: activations, tree mask, logits; approximate, from above."""
    tokens, size = cell.batch * cell.new_tokens, element_size(cell.dtype)
    total = 4 * tokens * shape.hidden * size
    if layers:
        total += tokens * (4 * (shape.query_width + 2 * shape.kv_width) + 4 * shape.intermediate) * size
        if cell.attention == "tree":
            rows = cell.new_tokens * shape.heads // shape.kv_heads
            total += 2 * rows * (cell.context_tokens + cell.new_tokens) * size
    if cell.part != "layer":
        scored = cell.batch if cell.operation == "prefill" else tokens
        total += 2 * scored * shape.vocabulary * size
    return total


def step_bytes(shape: Shape, cell: StepCell, layers: int) -> int:
    """Give the bytes that a step of `cell` over `layers` decoder layers needs in all."""
    held = weight_bytes(shape, cell, layers) + cache_bytes(shape, cell, layers)
    return held + working_bytes(shape, cell, layers)


def too_large(shape: Shape, cell: StepCell, layers: int, free_bytes: int | None) -> str | None:
    """Say why `cell` does not fit `free_bytes`, or None where it does (or where the free memory is not known)."""
    if free_bytes is None or step_bytes(shape, cell, layers) <= USABLE * free_bytes:
        return None
    weights, cache, working = (f(shape, cell, layers) / 2**30 for f in (weight_bytes, cache_bytes, working_bytes))
    return (
        f"memory: needs {weights:.2f} GiB of weights + {cache:.2f} of KV cache + {working:.2f} to work, "
        f"{free_bytes / 2**30:.2f} GiB are free"
    )
