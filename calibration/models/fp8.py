"""Linear layers in fp8: e4m3 weights and inputs, one scale a tensor, on the device's fp8 matrix units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0
"""Largest finite e4m3 number."""
INPUT_SCALE = 1 / 16
"""Inputs are stored as x / INPUT_SCALE: exact to 1 part in 16 up to 28, far beyond what follows a norm."""


@dataclass(frozen=True)
class Fp8Linear:
    """x W' + b with both factors rounded to e4m3. ``weight`` [out, in] in e4m3, times ``weight_scale``.

    Inputs are divided by ``input_scale`` first. As quantised here it is fixed (static quantisation): no reduction
    stands between two matrix products, which engines fuse away and a plain step would pay for. Inputs beyond
    448 * ``input_scale`` are clipped.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None = None

    @classmethod
    def quantise(cls, weight: Tensor, bias: Tensor | None = None) -> Fp8Linear:
        """Round `weight` [out, in], which is overwritten, to e4m3 with the scale of its largest entry."""
        scale = weight.abs().amax().float() / LARGEST
        rounded = weight.div_(scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return cls(rounded, scale, torch.tensor(INPUT_SCALE, device=weight.device), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Give x W' + b [..., out] in the type of `x` [..., in]."""
        rows = (x.reshape(-1, x.shape[-1]) / self.input_scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        product: Tensor = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=x.is_cuda,
        )
        return product.view(*x.shape[:-1], -1)


def fp8_fault(device: torch.device) -> str | None:
    """Say why fp8 cannot be timed on `device`, or None where it can: compute capability 8.9 or newer."""
    if device.type != "cuda":
        return f"fp8 needs a CUDA device of compute capability 8.9 or newer, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device)
    return f"fp8 needs compute capability 8.9 or newer, got {capability[0]}.{capability[1]} ({name})"


class Fp8Module(torch.nn.Module):
    """`Fp8Linear` in place of a `torch.nn.Linear` of a real model, whose inputs have outliers: scaled each time."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        made = Fp8Linear.quantise(
            linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach()
        )
        for name in ("weight", "weight_scale", "bias"):
            self.register_buffer(name, getattr(made, name))

    def forward(self, x: Tensor) -> Tensor:
        """Give x W' + b [..., out]."""
        scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        return Fp8Linear(self.weight, self.weight_scale, scale, self.bias)(x)

    @staticmethod
    def put_in_place(module: torch.nn.Module) -> None:
        """Replace every linear map below `module`."""
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Fp8Module(child))
            else:
                Fp8Module.put_in_place(child)
