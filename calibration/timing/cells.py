"""One step of one shape to time, the table columns that name it, and the part of the model it runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from calibration.shapes.shapes import Shape

Part = Literal["whole", "layer", "head"]
Dtype = Literal["bf16", "fp16", "fp32", "fp8"]
Attention = Literal["chain", "tree"]
Operation = Literal["prefill", "verify"]

TORCH_NAMES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
"""What torch calls each type. fp8: the weight matrices of the layers and what they multiply; the rest is bf16."""

LAYERS_TIMED = 4
"""Fewest layers of a ``layer`` step: what a step costs once, whatever its layers, is spread over these."""
CACHE_TURNS = 4
"""The weights of a ``layer`` step are this many times the device's last cache: a real step finds none there."""


@dataclass(frozen=True)
class StepCell:
    """One step: which part of which shape, in which type, and over what. Token counts are per sequence.

    ``part``: ``whole`` is embedding, all layers, final norm, head and choice of the largest logit; ``layer`` is a few
    decoder layers alone; ``head`` is all but the layers. A verify step of n new tokens gives logits for all n (n = 1
    is plain decoding, or the step of a drafter), a prefill for the last one. A ``tree`` step verifies ``tree_nodes``
    drafted nodes below the last committed token: new_tokens = tree_nodes + 1. Heads see no context and no tree.
    """

    shape: str
    part: Part
    dtype: Dtype
    graph: bool
    attention: Attention
    operation: Operation
    batch: int
    new_tokens: int
    context_tokens: int
    tree_nodes: int | None = None

    @property
    def group(self) -> tuple[str, Part, Dtype]:
        """What shares weights: shape, part, type."""
        return self.shape, self.part, self.dtype

    def row(self) -> dict[str, Any]:
        """Give the columns that name the cell."""
        return asdict(self)

    def __str__(self) -> str:
        """Name it in a line."""
        tree = "" if self.tree_nodes is None else f" (tree of {self.tree_nodes})"
        graph = "graph" if self.graph else "eager"
        size = f"{self.batch} x {self.new_tokens}{tree} after {self.context_tokens}"
        return f"{self.shape} {self.part} {self.dtype} {graph} {self.operation} {size}"


def timed_layers(shape: Shape, part: Part, dtype: Dtype, cache_bytes: int) -> int:
    """Give how many decoder layers a step of `part` runs on a device whose last cache has `cache_bytes`."""
    if part != "layer":
        return shape.layers if part == "whole" else 0
    spill = math.ceil(CACHE_TURNS * cache_bytes / layer_bytes(shape, dtype))
    return min(shape.layers, max(LAYERS_TIMED, spill))


def layer_bytes(shape: Shape, dtype: Dtype) -> int:
    """Give the bytes of one layer's weights."""
    rest = shape.layer_parameters - shape.layer_matrix_parameters
    return shape.layer_matrix_parameters * weight_size(dtype) + rest * element_size(dtype)


def weight_size(dtype: Dtype) -> int:
    """Give the bytes of one entry of a layer's weight matrices."""
    return 1 if dtype == "fp8" else element_size(dtype)


def element_size(dtype: Dtype) -> int:
    """Give the bytes of one number outside of the layers' matrices: activations, caches, embedding, head."""
    return 4 if dtype == "fp32" else 2
