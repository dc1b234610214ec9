"""Cost tables of a scenario that price a step from a model's shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import model_validator

from calibration.common.errors import CostError, did_you_mean
from calibration.common.settings import Count, Seconds, Table
from calibration.shapes.shapes import SHAPES, UNTIMED, get_shape
from simulator.hardware.devices import DEVICES, Dtype, get_device
from simulator.hardware.work import Share


class Roofline(Table):
    """Priced from its shape: `model` on `tensor_parallel` times `device`, at fitted shares of the device's peaks.

    `layers`: only so many layers of that model, with its LM head (an EAGLE head is one; an early exit some).
    `host_overhead_s`: host time of every step, `host_per_sequence_s` of every sequence in it; left out, they are
    those fitted to vLLM for a verifier, and 0 for a drafter, whose steps run from one captured graph. A host time
    given here adds to `costs.overhead_s`, which is charged once an iteration.
    """

    kind: Literal["roofline"]
    model: str
    device: str
    dtype: Dtype = "bf16"
    tensor_parallel: Count = 1
    layers: Count | None = None
    host_overhead_s: Seconds | None = None
    host_per_sequence_s: Seconds | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        faults = _name_faults(self) or _split_faults(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _name_faults(table: Roofline) -> list[str]:
    shapes = SHAPES | UNTIMED
    faults = []
    if table.model not in shapes:
        faults.append(f"model must be a known shape, got '{table.model}'{_hint(table.model, shapes)}")
    if table.device not in DEVICES:
        faults.append(f"device must be a known one, got '{table.device}'{_hint(table.device, DEVICES)}")
    return faults


def _hint(word: str, known: Iterable[str]) -> str:
    """Point to a name that starts like `word`, else to the closest one."""
    names = list(known)
    return did_you_mean(word.lower(), [name for name in names if name.startswith(word.lower())] or names)


def _split_faults(table: Roofline) -> list[str]:
    shape, device, faults = get_shape(table.model), get_device(table.device), []
    try:
        Share.of(shape, table.tensor_parallel)
    except CostError as fault:
        faults.append(str(fault))
    if table.dtype not in device.flops:
        got = f"got '{table.dtype}'{did_you_mean(table.dtype, device.flops)}"
        faults.append(f"dtype must be one that {device.title} has a rate for, {got}")
    if table.tensor_parallel > 1 and device.link is None:
        faults.append(
            f"tensor_parallel must be 1 on {device.title}, whose link is not known, got {table.tensor_parallel}"
        )
    if table.layers is not None and table.layers > shape.layers:
        faults.append(f"layers must be at most the {shape.layers} of '{shape.name}', got {table.layers}")
    return faults
