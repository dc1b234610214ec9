"""Kangaroo's drafter: the verifier's first layers, an attention-only adapter trained behind them, and its head.

Source: Liu and others, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting" (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calibration.common.errors import CalibrationError
from calibration.models.load import Verifier
from calibration.trained.shapes import KangarooShape, StudentShape
from calibration.trained.students import COPIED_NORM, check_tensors, skeleton

KIND = "kangaroo"
"""What ``drafter.json`` calls it."""


class NoMlp(nn.Module):
    """Stands where a decoder layer adds the output of its MLP, and adds nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Give zeros."""
        return torch.zeros_like(hidden)


@torch.no_grad()
def build_kangaroo(verifier: Verifier, shape: KangarooShape, dtype: torch.dtype) -> Any:
    """Give a causal LM of ``exit_layer`` + 1 layers: the verifier's first ones (shared), and the adapter in `dtype`.

    The adapter begins as the attention of the verifier's next layer, and its norms as that layer's and
    the final one, the latter made smaller.
    """
    body = verifier.model.model
    student = _frame(verifier, shape, dtype)
    following, adapter = body.layers[shape.exit_layer], student.model.layers[shape.exit_layer]
    adapter.self_attn.load_state_dict(following.self_attn.state_dict())
    adapter.input_layernorm.load_state_dict(following.input_layernorm.state_dict())
    student.model.norm.load_state_dict(body.norm.state_dict())
    student.model.norm.weight.mul_(COPIED_NORM)
    return student


@torch.no_grad()
def load_kangaroo(verifier: Verifier, shape: KangarooShape, tensors: dict[str, Tensor]) -> Any:
    """Give the model that `tensors` (those of `adapter_tensors`) make, in their dtype."""
    student = _frame(verifier, shape, next(iter(tensors.values())).dtype)
    mine = adapter_tensors(student)
    check_tensors(mine, tensors)
    for key, tensor in mine.items():
        tensor.copy_(tensors[key])
    return student.requires_grad_(False).eval()


def adapter_tensors(student: Any) -> dict[str, Tensor]:
    """Give what is trained, by name: the last layer (the adapter) and the final norm."""
    last = f"model.layers.{len(student.model.layers) - 1}."
    return {n: p for n, p in student.named_parameters() if n.startswith((last, "model.norm."))}


def _frame(verifier: Verifier, shape: KangarooShape, dtype: torch.dtype) -> Any:
    layers = verifier.model.config.num_hidden_layers
    if shape.exit_layer >= layers:
        raise CalibrationError(f"kangaroo: exit_layer must lie in [1, {layers - 1}], got {shape.exit_layer}")
    student = skeleton(verifier, StudentShape(layers=shape.exit_layer + 1), dtype)
    shared = verifier.model.model.layers
    for index in range(shape.exit_layer):
        # The layer knows its place in the KV cache, which is the same here: the module itself can be shared.
        student.model.layers[index] = shared[index]
    adapter = student.model.layers[shape.exit_layer]
    adapter.mlp, adapter.post_attention_layernorm = NoMlp(), nn.Identity()
    return student
