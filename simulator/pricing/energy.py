"""Joules of a run, from the measured power of every kind of step and the simulated seconds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats
from simulator.pricing.fitted import measured_cells

COUNTED = "device energy of prefill, verify and draft steps; no idle, host or cooling energy"

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
        "energy": {"counts": COUNTED, "mean_errors": {name: power.error for name, power in powers.items()}},
    }
