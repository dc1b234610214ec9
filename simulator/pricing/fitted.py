"""Step costs fitted to measured timings, with the error they make on what they did not see.

How well a fit tells the steps that it was made from, and those that it was not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.arrays import Floats, Ints, Mask
from calibration.common.errors import CostError
from simulator.pricing.grades import MEASURED, StepGrade
from simulator.pricing.steps import Tidied

_DIGITS = 9
"""Significant digits kept of a coefficient: more would differ between linear-algebra libraries."""
_HELD_OUT_CELLS = 4
"""Fewest cells from which one can be left out."""


@dataclass(frozen=True)
class Cells:
    """Measured steps, one per configuration: the median over its repeats. Token counts are per sequence."""

    batch: Floats
    new_tokens: Floats
    context_tokens: Floats
    seconds: Floats
    repeats: Floats

    def __len__(self) -> int:
        """Give the number of configurations."""
        return len(self.seconds)

    def __getitem__(self, keep: Any) -> Cells:
        """Give the cells that a mask keeps."""
        return Cells(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


class Range(NamedTuple):
    """What was measured: totals of new tokens, largest batch, largest context per sequence."""

    low_tokens: float
    high_tokens: float
    batch: float
    context: float


class Curve(NamedTuple):
    """f at its knots (tokens, from 0 on; seconds), its slope beyond the last one, and the linear terms."""

    knots: Floats
    values: Floats
    beyond_s: float
    batch_s: float
    context_s: float
    wide_s: float

    def seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give the seconds of steps; see `FittedStep`."""
        inside = np.interp(new_tokens, self.knots, self.values)
        beyond = self.beyond_s * np.maximum(new_tokens - self.knots[-1], 0)
        wide = self.wide_s * (new_tokens > batch)
        return inside + beyond + self.batch_s * (batch - 1) + (self.context_s + wide) * context_tokens

    def times(self, factor: float) -> Curve:
        """Give the curve of steps that take `factor` times as long."""
        linear = (factor * value for value in (self.beyond_s, self.batch_s, self.context_s, self.wide_s))
        return Curve(self.knots, self.values * factor, *linear)


@dataclass(frozen=True)
class CurveStep:
    """Seconds of a step: f(N) + batch_s * (b - 1) + (context_s + wide_s * [N > b]) * C.

    b sequences have N new and C cached tokens between them; [N > b]: some sequence has several new tokens, and
    attention leaves the path made for one. f is piecewise linear, f(0) >= 0, and never falls; no coefficient is
    negative, so a step never gets cheaper by one more sequence, token or cached token.
    """

    model: str
    operation: str
    curve: Curve
    range: Range

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        if type(new_tokens) is int and new_tokens < len(self._table):
            # NOTE: an engine asks one step at a time; looking f up takes 0.1 us, interpolating 8 us.
            _, _, _, batch_s, context_s, wide_s = self.curve
            per_context_s = context_s + wide_s if new_tokens > batch else context_s
            return self._table[new_tokens] + batch_s * (batch - 1) + per_context_s * context_tokens
        return self.curve.seconds(batch, new_tokens, context_tokens)

    @functools.cached_property
    def _table(self) -> list[float]:
        """The values of f at 0, 1, 2 ... up to its last knot."""
        knots = self.curve.knots
        values: list[float] = np.interp(np.arange(int(knots[-1]) + 1), knots, self.curve.values).tolist()
        return values

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Whether a step has more sequences, fewer or more new tokens, or longer contexts than any measured one.

        Contexts shorter than the shortest measured one count as inside: the price is linear there and ends at a
        context of zero.
        """
        low, high, largest, context = self.range
        return new_tokens > high or new_tokens < low or batch > largest or context_tokens > batch * context


@dataclass(frozen=True)
class FittedStep(CurveStep):
    """A step whose f has its knots at the measured N; beyond the largest, the steeper of last slope and mean slope.

    Coefficients minimise the squared relative error over the cells (non-negative least squares). Errors are mean and
    worst absolute relative errors; *held out*: each cell predicted by a fit to all the others (missing below four
    cells).
    """

    cells: Cells
    error: float
    held_out_error: float | None
    held_out_worst: float | None

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "fitted to recorded timings"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return MEASURED

    def describe(self) -> dict[str, Any]:
        """Give the size and the range of the measurement and the errors of the fit."""
        errors: dict[str, Any] = {"mean_error": self.error}
        if self.held_out_error is not None:
            errors |= {"held_out_mean_error": self.held_out_error, "held_out_worst_error": self.held_out_worst}
        return {
            "kind": "fitted",
            "model": self.model,
            "operation": self.operation,
            "cells": len(self.cells),
            **errors,
            "measured_range": {
                "batch": [int(self.cells.batch.min()), int(self.range.batch)],
                "new_tokens_in_batch": [int(self.range.low_tokens), int(self.range.high_tokens)],
                "context_tokens_per_sequence": [int(self.cells.context_tokens.min()), int(self.range.context)],
            },
        }


def fit_step(timings: pa.Table, model: str, operation: str) -> FittedStep:
    """Fit the cost of `operation` (``prefill``, ``verify`` or ``draft``) of `model` to a table of timings.

    Raises `CostError` where no such step was timed.
    """
    cells = measured_cells(timings, model, operation)
    if len(cells) == 0:
        raise CostError(
            f"timings.parquet: no {operation} step of '{model}' was timed, so costs of kind 'measured' cannot be "
            "fitted; give kind = 'linear' with base_s, per_token_s and per_context_token_s instead"
        )
    packed = np.stack([getattr(cells, name) for name in Cells.__dataclass_fields__]).tobytes()
    return _fit_packed(model, operation, packed)


@functools.lru_cache(maxsize=64)
def _fit_packed(model: str, operation: str, packed: bytes) -> FittedStep:
    """Fit and cross-check; kept, because a study runs hundreds of simulations on the same timings."""
    cells = Cells(*np.frombuffer(packed, dtype=np.float64).reshape(len(Cells.__dataclass_fields__), -1))
    curve = fit_curve(cells)
    held_out = held_out_errors(cells)
    total = cells.batch * cells.new_tokens
    return FittedStep(
        model=model,
        operation=operation,
        cells=cells,
        curve=curve,
        range=Range(
            float(total.min()), float(total.max()), float(cells.batch.max()), float(cells.context_tokens.max())
        ),
        error=digits(np.mean(np.abs(_relative(curve, cells))), 4),
        held_out_error=None if held_out is None else digits(np.mean(np.abs(held_out)), 4),
        held_out_worst=None if held_out is None else digits(np.max(np.abs(held_out)), 4),
    )


def measured_cells(timings: pa.Table, model: str, operation: str) -> Cells:
    """Give the median seconds of every configuration of a chain step (tree steps are left out)."""
    return repeated_cells(timings, model, operation)[0]


def repeated_cells(timings: pa.Table, model: str, operation: str) -> tuple[Cells, list[Floats]]:
    """Give the configurations of a chain step as `measured_cells` does, and the seconds of the repeats of each."""
    mine = pc.and_(pc.equal(timings["model"], model), pc.equal(timings["operation"], operation))
    table = timings.filter(pc.and_(mine, pc.is_null(timings["tree_nodes"])))
    keys = np.stack([table[name].to_numpy() for name in ("batch", "new_tokens", "context_tokens")], axis=1)
    seconds = table["seconds"].to_numpy()
    cells, cell = np.unique(keys, axis=0, return_inverse=True)
    repeats = [np.asarray(seconds[cell.ravel() == i], dtype=np.float64) for i in range(len(cells))]
    medians = np.array([np.median(one) for one in repeats], dtype=np.float64)
    counts = np.array([len(one) for one in repeats], dtype=np.float64)
    batch, new_tokens, context = cells.T.astype(np.float64)
    return Cells(batch, new_tokens, context, medians, counts), repeats


def hinges(tokens: Floats, knots: Floats) -> list[Floats]:
    """Give how many of `tokens` lie in each stretch between `knots`: the columns of a piecewise linear f."""
    return [np.clip(tokens, low, high) - low for low, high in itertools.pairwise(knots)]


def solve(
    columns: list[Floats], seconds: Floats, near: Floats | None = None, weights: Floats | None = None
) -> Floats:
    """Give the non-negative coefficients of `columns` with the least squared error relative to `near`.

    `near`: the seconds themselves unless given; `weights` of the rows: all alike unless given.
    """
    from scipy.optimize import nnls

    # Columns of very different size would spoil the conditioning.
    scale = np.array([max(float(column.max()), 1.0) for column in columns])
    near = seconds if near is None else near
    weighted, target = np.stack(columns, axis=1) / scale / near[:, None], seconds / near
    if weights is not None:
        weighted, target = weighted * np.sqrt(weights)[:, None], target * np.sqrt(weights)
    return np.array([digits(x) for x in nnls(weighted, target, maxiter=10_000)[0] / scale])


def curve_of(knots: Floats, solution: Floats) -> Curve:
    """Give the curve of a `solution`: f(0), its slopes, and as many of the linear terms (context first) as it has."""
    first, slopes, linear = solution[0], solution[1 : len(knots)], solution[len(knots) :].tolist()
    values = first + np.concatenate(([0.0], np.cumsum(slopes * np.diff(knots))))
    beyond = max(float(slopes[-1]), float(values[-1] - values[0]) / float(knots[-1])) if len(slopes) else 0.0
    context_s, batch_s, wide_s = linear + [0.0] * (3 - len(linear))
    return Curve(knots, values, beyond, batch_s, context_s, wide_s)


def fit_curve(cells: Cells) -> Curve:
    """Solve for non-negative steps of f between knots and non-negative linear terms (`FittedStep`)."""
    total, context = cells.batch * cells.new_tokens, cells.batch * cells.context_tokens
    knots = np.concatenate(([0.0], np.unique(total)[1:]))
    columns = [np.ones_like(total), *hinges(total, knots), context]
    # With one number of new tokens only, these two say what other columns say.
    if len(np.unique(cells.new_tokens)) > 1:
        columns.append(cells.batch - 1)
        if cells.new_tokens.min() == 1:
            columns.append(context * (cells.new_tokens > 1))
    return curve_of(knots, solve(columns, cells.seconds))


def _relative(curve: Curve, cells: Cells) -> Floats:
    predicted = curve.seconds(cells.batch, cells.batch * cells.new_tokens, cells.batch * cells.context_tokens)
    return np.asarray(predicted / cells.seconds - 1, dtype=np.float64)


def held_out_errors(cells: Cells) -> Floats | None:
    """Give the signed relative error on each cell of the fit to all the others; None with fewer than four cells."""
    if len(cells) < _HELD_OUT_CELLS:
        return None
    index = np.arange(len(cells))
    return np.concatenate([_relative(fit_curve(cells[index != i]), cells[index == i]) for i in index])


def digits(value: Any, kept: int = _DIGITS) -> float:
    """Give `value` with so many significant digits `kept`."""
    return float(f"{float(value):.{kept}g}")


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
