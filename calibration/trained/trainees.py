"""What can be trained: a model with some tensors of its own, and the states that a loss looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.models.load import Verifier
from calibration.trained import kangaroo, nested, students
from calibration.trained.corpus import Batch
from calibration.trained.evaluate import body_states, final_states
from calibration.trained.folder import load_drafter, read_about
from calibration.trained.shapes import AnyShape, KangarooShape, NestedShape, StudentShape


@dataclass(frozen=True)
class Trainee:
    """A drafter in training.

    ``model``: its causal LM. ``kind`` is that of its folder, ``weights`` are the tensors that are trained and saved.
    ``states`` gives, for a batch, the states [n, hidden size] of each exit, the last one the model's own.
    """

    kind: str
    model: Any
    weights: dict[str, Tensor]
    states: Callable[[Batch], list[Tensor]]


def make_trainee(
    verifier: Verifier,
    shape: StudentShape | NestedShape | KangarooShape,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Trainee:
    """Begin a drafter of `shape` with its trained tensors in `dtype`."""
    if isinstance(shape, KangarooShape):
        model = kangaroo.build_kangaroo(verifier, shape, dtype)
        weights = kangaroo.adapter_tensors(model)
        return Trainee(kangaroo.KIND, model, weights, lambda batch: [final_states(model, batch)])
    model = students.build_student(verifier, shape, generator, dtype)
    weights = students.own_tensors(model)
    if isinstance(shape, StudentShape):
        return Trainee(students.KIND, model, weights, lambda batch: [final_states(model, batch)])
    exits = nested.Exits(model.model, shape.exits)

    def states(batch: Batch) -> list[Tensor]:
        last = body_states(model, batch)
        return [part.flatten(0, 1)[batch.places] for part in (*exits.take(), last)]

    return Trainee(nested.KIND, model, weights, states)


def load_trained(folder: Path | str, verifier: Verifier) -> tuple[Any, dict[str, Tensor]]:
    """Read (causal LM, own tensors) of any drafter that was trained here; a nested one with all its layers."""
    kind = read_about(folder)["kind"]
    settings, tensors = load_drafter(folder, kind, verifier)
    shape = read_shape(folder, settings)
    if isinstance(shape, KangarooShape):
        return kangaroo.load_kangaroo(verifier, shape, tensors), tensors
    return students.load_student(verifier, shape, tensors), tensors


def resume_trainee(folder: Path | str, verifier: Verifier, dtype: torch.dtype) -> Trainee:
    """Go on with a drafter that was trained here: its tensors in `dtype`, ready for more steps."""
    _, tensors = load_trained(folder, verifier)
    shape = read_shape(folder, read_about(folder)["settings"])
    trainee = make_trainee(verifier, shape, torch.Generator(device=verifier.device), dtype)
    with torch.no_grad():
        for name, tensor in trainee.weights.items():
            tensor.copy_(tensors[name])
    return trainee


def read_shape(folder: Path | str, settings: dict[str, Any]) -> StudentShape | NestedShape | KangarooShape:
    """Read the shape that ``drafter.json`` tells; `CalibrationError` where it is none."""
    try:
        shape: StudentShape | NestedShape | KangarooShape = TypeAdapter(AnyShape).validate_python(
            settings.get("shape")
        )
    except ValidationError as fault:
        raise CalibrationError(f"{folder}: shape: {fault.errors()[0]['msg']}") from None
    return shape
