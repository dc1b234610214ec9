"""Joules of a step from its work and its seconds: fitted to public measurements on one device, scaled to others.

For prices that come from a model's shape (kind ``roofline``); `simulator.pricing.power` is for recorded joules.

Joules of a run, from the measured power of every kind of step and the simulated seconds of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats
from calibration.common.errors import CostError
from calibration.shapes.shapes import Shape, get_shape
from simulator.hardware.devices import ELEMENT_BYTES, Device, get_device
from simulator.hardware.work import Work, step_work
from simulator.pricing.fitted import measured_cells

COUNTED_STEPS = "device energy of prefill, verify and draft steps; no idle, host or cooling energy"

KINDS = {"prefill", "decode"}
"""Kinds of iterations whose power was measured."""


class Power(NamedTuple):
    """Watts of one kind of step at the measured numbers of new tokens in the batch, straight lines between them.

    Outside of what was measured it stays at the nearest measured value. `error`: mean relative error of the joules
    that it gives for the measured steps themselves.
    """

    tokens: Floats
    watts: Floats
    error: float

    def at(self, new_tokens: Any) -> Any:
        """Give watts; `new_tokens` is a sum over the batch."""
        return np.interp(new_tokens, self.tokens, self.watts)


def fit_power(timings: pa.Table, model: str, operation: str) -> Power | None:
    """Fit the power of `operation` of `model` to a table of timings; None where no joules were measured.

    The watts at N new tokens are the mean over the measured configurations with N, of median joules / median seconds.
    """
    known = timings.filter(pc.is_valid(timings["joules"]))
    seconds = measured_cells(known, model, operation)
    if len(seconds) == 0:
        return None
    in_place = known.set_column(known.schema.get_field_index("seconds"), "seconds", known["joules"])
    joules = measured_cells(in_place, model, operation).seconds
    total = seconds.batch * seconds.new_tokens
    watts = joules / seconds.seconds
    tokens, group = np.unique(total, return_inverse=True)
    mean = np.bincount(group.ravel(), weights=watts) / np.bincount(group.ravel())
    error = float(np.mean(np.abs(mean[group.ravel()] * seconds.seconds / joules - 1))) if joules.all() else 0.0
    return Power(tokens, mean, float(f"{error:.4g}"))


def joules(timings: pa.Table, costs: Mapping[str, Any], iterations: pa.Table) -> dict[str, Any]:
    """Give the joules of a run and per million output tokens; nothing where they are not known for every step.

    `costs` is what the prices of the run were made of (`Prices.describe`): only where every one of them was fitted to
    `timings`, and these have joules, is the energy known. An approximation: simulated seconds (exact as the prices
    are) times the mean measured power of such steps at that number of tokens; a prefill, whose tokens the table of
    iterations does not hold, at the mean power of all measured prefills. Covers the whole run, fillers and warm-up
    included. Steps that mix prefill and decoding were not measured: nothing is said of a run that has any.
    """
    powers: dict[str, Power] = {}
    for part in ("prefill", "verify", "draft"):
        price = costs.get(part)
        if price is None:
            continue
        power = fit_power(timings, price["model"], price["operation"]) if price.get("kind") == "fitted" else None
        if power is None:
            return {}
        powers[part] = power
    emitted = int(iterations["emitted_tokens"].to_numpy().sum())
    if emitted == 0 or not set(iterations["kind"].unique().to_pylist()) <= KINDS:
        return {}
    active, drafted, draft_s, verify_s = (
        iterations[name].to_numpy() for name in ("active", "drafted_tokens", "draft_s", "verify_s")
    )
    prefill = pc.equal(iterations["kind"], "prefill").to_numpy(zero_copy_only=False)
    watts = np.where(prefill, powers["prefill"].watts.mean(), powers["verify"].at(active + drafted))
    total = float((verify_s * watts).sum())
    if "draft" in powers:
        total += float((draft_s * powers["draft"].at(active)).sum())
    return {
        "joules": total,
        "joules_per_million_output_tokens": total / emitted * 1e6,
        "energy": {"counts": COUNTED_STEPS, "mean_errors": {name: power.error for name, power in powers.items()}},
    }


COUNTED = "device energy of all engine iterations, host overhead at the power of a step without work; no idle time"


@dataclass(frozen=True)
class PowerModel:
    """Watts of a device: TDP x min(1, idle + memory x M + arithmetic x F), M and F being the shares of peaks in use.

    M: (bytes/s + token_bytes x scored tokens/s) / bandwidth. F: FLOP/s / dense peak. `token_bytes`: what scoring a
    token and choosing its successor cost beyond the counted work, as bytes that would cost as much. Linear in what a
    step does, so joules of parts add up, until the device throttles at its TDP. `fitted`: whether the device and the
    type of numbers are those of the measurements; for any other the same parts of a TDP at the same shares of peaks
    are taken, an extrapolation that nothing here has tested.
    """

    tdp_watts: float
    bandwidth: float
    flops: float
    idle: float
    memory: float
    arithmetic: float
    token_bytes: float
    fitted: bool

    def joules(self, work: Work, seconds: Any) -> Any:
        """Give the joules that **each** device of a step draws; arguments broadcast."""
        moved = (work.bytes + self.token_bytes * work.scored_tokens) / self.bandwidth
        busy = self.memory * moved + self.arithmetic * work.flops / self.flops
        return self.tdp_watts * np.minimum(self.idle * seconds + busy, seconds)

    def describe(self) -> dict[str, Any]:
        """Say where the model comes from and what error it made on what it had not seen."""
        found = figures()
        return {
            "kind": "modelled" if self.fitted else "modelled, extrapolated to another device or type of numbers",
            "fitted_on": f"{found['device']} {found['dtype']}",
            "source": found["source"],
            "held_out_mean_errors": found["held_out_mean_errors"]["watts"],
        }


@functools.cache
def figures() -> Mapping[str, Any]:
    """Give the fitted figures with their source and their errors, as `studies.roofline.energy` made them."""
    text = resources.files("simulator.hardware").joinpath("efficiencies", "energy.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def power_model(device: Device, dtype: str = "bf16") -> PowerModel:
    """Give the power of `device` computing with numbers of type `dtype`.

    *Fitted* for the device and type of the measurements (H100 SXM, bf16); *extrapolated* for others, with their own
    idle watts where the catalogue has them. Raises `CostError` for a device without a known TDP.
    """
    if device.tdp_watts is None:
        raise CostError(f"device '{device.name}': its tdp_watts must be known to give joules, got none")
    found = figures()
    return PowerModel(
        tdp_watts=device.tdp_watts,
        bandwidth=device.bandwidth,
        flops=device.flops_per_s(dtype),
        idle=found["idle"] if device.idle_watts is None else device.idle_watts / device.tdp_watts,
        memory=found["memory"],
        arithmetic=found["arithmetic"],
        token_bytes=found["token_bytes"],
        fitted=(device.name, dtype) == (found["device"], found["dtype"]),
    )


def step_joules(work: Work, seconds: Any, device: Device, dtype: str = "bf16") -> Any:
    """Give the joules that **each** device draws for a step of `work` that takes `seconds`; see `power_model`."""
    return power_model(device, dtype).joules(work, seconds)


def modelled_joules(costs: Mapping[str, Any], iterations: pa.Table) -> dict[str, Any]:
    """Give the joules of a run and per million output tokens; nothing unless every price is of kind ``roofline``.

    `costs` is what the prices were made of (`Prices.describe`): a price of kind ``roofline`` names its ``model``,
    ``device``, ``dtype`` and ``tensor_parallel`` (and ``layers`` where it is a part of that model). Approximations
    beside those of the power: a mixed iteration counts a chunk of prefill as one decoding sequence more, and its
    attention as if tokens were spread evenly; a draft takes as many steps as its mean length, rounded up. Covers the
    whole run, fillers and warm-up included.
    """
    parts = {name: costs[name] for name in ("prefill", "verify", "draft") if costs.get(name) is not None}
    emitted = int(iterations["emitted_tokens"].to_numpy().sum())
    if "verify" not in parts or emitted == 0 or any(part.get("kind") != "roofline" for part in parts.values()):
        return {}
    verifier = _Part.of(parts["verify"])
    total = float(verifier.verified(iterations).sum())
    if "draft" in parts:
        total += float(_Part.of(parts["draft"]).drafted(iterations).sum())
    return {
        "joules": total,
        "joules_per_million_output_tokens": total / emitted * 1e6,
        "energy": {"counts": COUNTED, **verifier.power.describe()},
    }


class _Part(NamedTuple):
    """A model on its devices."""

    shape: Shape
    devices: int
    power: PowerModel
    dtype_bytes: float

    @classmethod
    def of(cls, price: Mapping[str, Any]) -> _Part:
        """Read what a price of kind ``roofline`` says of itself."""
        shape, dtype = get_shape(price.get("shape", price["model"])), price["dtype"]
        shape = replace(shape, layers=price.get("layers", shape.layers))
        power = power_model(get_device(price["device"]), dtype)
        return cls(shape, price["tensor_parallel"], power, ELEMENT_BYTES[dtype])

    def joules(self, batch: Any, new: Any, context: Any, seconds: Any, logits: Any = None) -> Floats:
        """Give the joules of steps on all devices."""
        size, byte = self.devices, self.dtype_bytes
        work = step_work(self.shape, batch, new, context, dtype_bytes=byte, tensor_parallel=size, logits=logits)
        return np.asarray(size * self.power.joules(work, seconds), dtype=np.float64)

    def verified(self, iterations: pa.Table) -> Floats:
        """Give the joules of the verifier in every iteration, prefill and host overhead included."""
        active, drafted, prefill, context, verify_s, overhead_s = _columns(
            iterations, "active", "drafted_tokens", "prefill_tokens", "context_tokens", "verify_s", "overhead_s"
        )
        alone = np.array(iterations["kind"].to_pylist()) == "prefill"
        scored = active + drafted
        new = np.where(alone, 0.0, scored) + prefill
        return self.joules(active, new, context, verify_s + overhead_s, scored)

    def drafted(self, iterations: pa.Table) -> Floats:
        """Give the joules of the drafter in every iteration that drafted."""
        columns = _columns(iterations, "active", "drafted_tokens", "context_tokens", "draft_s")
        some = columns[1] > 0
        active, drafted, context, draft_s = (column[some] for column in columns)
        steps = np.ceil(drafted / active)
        return np.asarray(steps * self.joules(active, drafted / steps, context, draft_s / steps))


def _columns(table: pa.Table, *names: str) -> tuple[Floats, ...]:
    return tuple(table[name].to_numpy().astype(np.float64) for name in names)
