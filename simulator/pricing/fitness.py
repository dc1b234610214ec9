"""How well a fit tells the steps that it was made from, and those that it was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.common.arrays import Floats, Ints, Mask
from simulator.pricing.fitted import digits
from simulator.pricing.steps import Tidied

_FOLDS = 24
"""Most parts of the shapes that are left out in turn."""
_HELD_OUT_SHAPES = 4
"""Fewest shapes from which one can be left out."""
_OFTEN = 8
"""Steps from which on a shape counts for the worst error."""


@dataclass(frozen=True)
class Fitness:
    """How well a fit tells the steps it was made from, and those it was not: mean and worst relative errors.

    Means are over steps; *held out*: shapes predicted by a fit to the others (missing below four shapes). `total`:
    priced / measured seconds of all steps, less 1. `outliers`: what these add to every price, as a share of it; see
    `simulator.pricing.steps.tidied`.
    """

    steps: int
    shapes: int
    error: float
    total: float
    outliers: float
    held_out_error: float | None = None
    held_out_worst: float | None = None

    def describe(self) -> dict[str, Any]:
        """Give it for a summary."""
        told: dict[str, Any] = {"steps": self.steps, "cells": self.shapes, "mean_error": self.error}
        if self.held_out_error is not None:
            told |= {"held_out_mean_error": self.held_out_error, "held_out_worst_error": self.held_out_worst}
        return told | {"total_error": self.total, "outliers_share": self.outliers}


def fitness(tidy: Tidied, predicted: Floats, held_out: Floats | None) -> Fitness:
    """Say how well `predicted`, and seconds `held_out`, tell these steps; outliers are added to the total."""
    shapes, more = tidy.shapes, 1 + tidy.outliers
    often = shapes.steps >= min(_OFTEN, float(shapes.steps.max()))
    error, worst = None, None
    if held_out is not None:
        missed = np.abs(held_out / shapes.seconds - 1)
        error, worst = digits(np.average(missed, weights=shapes.steps), 4), digits(missed[often].max(), 4)
    return Fitness(
        steps=int(shapes.steps.sum()),
        shapes=len(shapes),
        error=digits(np.average(np.abs(predicted / shapes.seconds - 1), weights=shapes.steps), 4),
        total=digits((shapes.steps * predicted).sum() * more / (shapes.steps * tidy.raw_s).sum() - 1, 4),
        outliers=digits(tidy.outliers, 4),
        held_out_error=error,
        held_out_worst=worst,
    )


def left_out(ids: Ints, predict: Callable[[Mask], Floats]) -> Floats | None:
    """Give the seconds of every shape by a fit to others: `predict(keep)` gives those that it does not keep."""
    number = int(ids.max()) + 1
    if number < _HELD_OUT_SHAPES:
        return None
    seconds = np.zeros(len(ids))
    for fold in range(min(number, _FOLDS)):
        mine = ids % min(number, _FOLDS) == fold
        seconds[mine] = predict(~mine)
    return seconds
