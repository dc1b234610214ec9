"""Students: causal LMs on the verifier's vocabulary that use its embedding and head, with layers of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calibration.common.errors import CalibrationError
from calibration.models.load import Verifier
from calibration.trained.shapes import LayersShape

KIND = "distilled"
"""What ``drafter.json`` calls a student."""

FRESH_NORM, COPIED_NORM = 0.12, 0.3
"""Share of the verifier's final norm that students of fresh layers and of copied layers begin with.

At full size their states, which mean nothing yet, make sharply wrong predictions (35 nats from a 135M verifier),
which many steps have to undo. After 20,000 tokens one fresh layer matched 10 % of the verifier's tokens from 0.12,
and 5 % from 0.3; a copied one 13 % from 0.3 and 12 % from 1, at 5.8 against 8.0 nats.
"""


@torch.no_grad()
def build_student(verifier: Verifier, shape: LayersShape, generator: torch.Generator, dtype: torch.dtype) -> Any:
    """Give a new student in `dtype`, ready to be trained.

    Fresh matrices are drawn from a normal distribution of the verifier's ``initializer_range``, those that write into
    the residual stream divided by sqrt(2 layers); norms begin at 1. The final norm begins as the verifier's, made
    smaller (`FRESH_NORM`). `CalibrationError` where the shape does not fit the verifier.
    """
    model = verifier.model
    student = skeleton(verifier, shape, dtype)
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for name, tensor in own_tensors(student).items():
        _begin(name, tensor, spread / (2 * shape.depth) ** 0.5 if _writes(name) else spread, generator)
    student.model.norm.load_state_dict(model.model.norm.state_dict())
    student.model.norm.weight.mul_(FRESH_NORM if shape.from_layers is None else COPIED_NORM)
    for new, old in enumerate(shape.from_layers or ()):
        student.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    return student


def load_student(verifier: Verifier, shape: LayersShape, tensors: dict[str, Tensor]) -> Any:
    """Give the student that `tensors` (those of `own_tensors`) make, in their dtype; not to be trained."""
    student = skeleton(verifier, shape, next(iter(tensors.values())).dtype)
    mine = own_tensors(student)
    check_tensors(mine, tensors)
    with torch.no_grad():
        for key, tensor in mine.items():
            tensor.copy_(tensors[key])
    return student.requires_grad_(False).eval()


def check_tensors(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """`CalibrationError` where the tensors of a file are not those of the shape that goes with it."""
    odd = sorted(wanted.keys() ^ got.keys()) or sorted(k for k in wanted if wanted[k].shape != got[k].shape)
    if odd:
        raise CalibrationError(f"trained drafter: tensors must be those of its shape, got another '{odd[0]}'")


def own_tensors(student: Any) -> dict[str, Tensor]:
    """Give the student's own parameters by name: its layers and its final norm."""
    outer = {id(p) for m in (student.get_input_embeddings(), student.get_output_embeddings()) for p in m.parameters()}
    return {name: p for name, p in student.named_parameters() if id(p) not in outer}


def parameters(verifier: Verifier, shape: LayersShape) -> int:
    """Count a student's parameters without embedding and head; nothing is allocated."""
    return sum(p.numel() for p in own_tensors(_empty(student_config(verifier, shape), verifier)).values())


def student_config(verifier: Verifier, shape: LayersShape) -> Any:
    """Give the model configuration of a student: the verifier's, with the shape's sizes."""
    config = copy.deepcopy(verifier.model.config)
    have = config.num_hidden_layers
    if shape.from_layers is not None and max(shape.from_layers) >= have:
        raise CalibrationError(f"student: from_layers must lie in [0, {have - 1}], got {list(shape.from_layers)}")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_hidden_layers = shape.depth
    config.num_attention_heads = shape.heads or heads
    config.num_key_value_heads = shape.kv_heads or min(kv_heads or heads, config.num_attention_heads)
    config.head_dim = shape.head_dim or head_dim
    config.intermediate_size = shape.intermediate_size or config.intermediate_size
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * shape.depth
    if config.num_attention_heads % config.num_key_value_heads:
        rule = f"heads must be a multiple of kv_heads = {config.num_key_value_heads}"
        raise CalibrationError(f"student: {rule}, got {config.num_attention_heads}")
    return config


def _empty(config: Any, verifier: Verifier) -> Any:
    with torch.device("meta"):
        return type(verifier.model)(config)


def skeleton(verifier: Verifier, shape: LayersShape, dtype: torch.dtype) -> Any:
    """Give a student whose own tensors hold nothing yet, around the verifier's embedding and head."""
    model = verifier.model
    student = _empty(student_config(verifier, shape), verifier)
    student.model.layers.to_empty(device=model.device).to(dtype)
    student.model.norm.to_empty(device=model.device).to(dtype)
    # Buffers made on the meta device hold nothing; the embedding's rotation depends on the head dimension alone.
    student.model.rotary_emb = type(model.model.rotary_emb)(config=student.config).to(model.device)
    student.set_input_embeddings(model.get_input_embeddings())
    student.set_output_embeddings(model.get_output_embeddings())
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def _writes(name: str) -> bool:
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def _begin(name: str, tensor: Tensor, spread: float, generator: torch.Generator) -> None:
    if tensor.ndim > 1:
        nn.init.normal_(tensor, std=spread, generator=generator)
    else:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)
