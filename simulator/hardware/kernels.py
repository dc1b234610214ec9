"""What one kernel takes: fitted shares of a device's peaks, and the formulas that turn work into seconds.

All by `efficiencies/roofline.json`, made by `studies.roofline.coefficients` from public tables; it names them, with
the errors on what was held out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.shapes.shapes import Shape
from simulator.hardware.work import Share

COEFFICIENTS = Path(__file__).parent / "efficiencies" / "roofline.json"


@dataclass(frozen=True)
class Kernel:
    """How one family of kernels fares: seconds of one that does nothing, and the shares of the peaks it reaches."""

    launch_s: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Mover:
    """The same of a kernel that only moves numbers."""

    launch_s: float
    bytes: float


@dataclass(frozen=True)
class Tested:
    """Up to where errors are known: new tokens and sequences of a step, context of a sequence, widths, devices."""

    new_tokens: float
    batch: float
    context_tokens: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    tensor_parallel: tuple[int, ...]


@dataclass(frozen=True)
class Efficiencies:
    """Everything fitted: kernels by family, links, host times; where they were tested, and the errors there.

    ``matmul`` bounds matrices, ``attention`` scores and values; ``elementwise`` what only moves numbers, by kind
    (``norm``, ``rotation``, ``product``, ``embedding``). ``link``: share of the link that an all-reduce reaches, one
    kernel of ``matmul.launch_s`` each. ``host_s`` a step; ``host_per_logit_s`` for each sequence and entry of the
    vocabulary: sampling, detokenising and streaming.
    """

    matmul: Kernel
    attention: Kernel
    elementwise: Mapping[str, Mover]
    link: float
    host_s: float
    host_per_logit_s: float
    tested: Tested
    errors: Mapping[str, float]

    @classmethod
    @functools.cache
    def fitted(cls) -> Efficiencies:
        """Give those that the package ships."""
        return cls.from_json(json.loads(COEFFICIENTS.read_text(encoding="utf-8")))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Efficiencies:
        """Give those in the content of a file of coefficients."""
        tested: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data["tested"].items()
        }
        return cls(
            matmul=Kernel(**data["matmul"]["coefficients"]),
            attention=Kernel(**data["attention"]["coefficients"]),
            elementwise={kind: Mover(**part) for kind, part in data["elementwise"]["coefficients"].items()},
            link=data["all_reduce"]["coefficients"]["link"],
            host_s=data["host"]["coefficients"]["step_s"],
            host_per_logit_s=data["host"]["coefficients"]["per_logit_s"],
            tested=Tested(**tested),
            errors=data["errors"],
        )


def matmul_s(kernel: Kernel, tokens: Any, inner: Any, outer: Any, flops: float, bandwidth: float, byte: float) -> Any:
    """Give the seconds of (tokens, inner) x (inner, outer): launch + (compute^4 + memory^4)^(1/4).

    compute = 2 x tokens x inner x outer / (share x `flops`); memory = the weights (`byte` bytes each) and what goes
    in and out (at least two bytes a number), over share x `bandwidth`. Fourth powers, so that only square roots are
    taken, which every machine rounds alike.
    """
    compute = 2.0 * tokens * inner * outer / (kernel.flops * flops)
    moved = byte * inner * outer + max(byte, 2.0) * tokens * (inner + outer)
    memory = moved / (kernel.bytes * bandwidth)
    compute, memory = compute * compute, memory * memory
    return kernel.launch_s + np.sqrt(np.sqrt(compute * compute + memory * memory))


def attention_s(kernel: Kernel, flops_s: Any, kv_s: Any) -> Any:
    """Give the seconds of one attention kernel: max((sqrt(launch) + sqrt(compute))^2, launch + memory).

    `flops_s` and `kv_s`: seconds that its operations take at peak, and reading its keys and values. The first form
    is what prefills measure (few query blocks fill a device badly), the second is a decode step's.
    """
    compute = (np.sqrt(kernel.launch_s) + np.sqrt(flops_s / kernel.flops)) ** 2
    return np.maximum(compute, kernel.launch_s + kv_s / kernel.bytes)


def elementwise_s(kernel: Mover, moved_s: Any) -> Any:
    """Give the seconds of a kernel that only moves numbers: launch + `moved_s` (at peak) / share."""
    return kernel.launch_s + moved_s / kernel.bytes


def all_reduce_s(launch_s: float, share: float, message_bytes: Any, size: Any, link: float) -> Any:
    """Give the seconds of one all-reduce over `size` devices: launch + 2 (p - 1) / p x message / (share x link)."""
    return launch_s + 2 * (size - 1) / size * message_bytes / (share * link)


def matrices(shape: Shape, tensor_parallel: int = 1) -> tuple[tuple[int, float, float], ...]:
    """Give (how many, inner width, outer width) of the matrices of one device, the LM head last.

    Fused as engines do: queries, keys and values are one, gate and up another.
    """
    share = Share.of(shape, tensor_parallel)
    hidden = float(shape.hidden)
    return (
        (shape.layers, hidden, share.query_width + 2 * share.kv_width),
        (shape.layers, share.query_width, hidden),
        (shape.layers, hidden, 2 * share.intermediate),
        (shape.layers, share.intermediate, hidden),
        (1, hidden, share.vocabulary),
    )
