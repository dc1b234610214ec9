"""Which form of a law predicts best what it has not seen, and which forms the data cannot tell from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.common.bootstrap import ClusterBootstrap, Estimate, number
from analysis.laws.fit import solve
from analysis.laws.forms import FORMS, Form, checked, find_form, reference_of
from calibration.common.arrays import Floats
from calibration.common.errors import ReportError

LEAST_LEVELS = 5
"""Levels of x below which no form is chosen: a left-out level must leave four, one more than three parameters."""

_LEAST_TRAINING = LEAST_LEVELS - 1
_LEAST_UNITS = 3
"""Units below which a difference of errors gets no interval, so nothing is told apart."""


@dataclass(frozen=True)
class FormError:
    """How far off one form was on points it had not seen.

    ``rmse`` is in units of y. ``relative`` is the root mean square of errors over the mean of |y| of their group, by
    which forms are ranked, so that no group counts more for being larger. ``excess`` is the mean of the squares of
    those relative errors above that of the best form, with the interval of the paired bootstrap (no interval for the
    best itself). ``failures`` counts fits that did not converge or left the form; their predictions count all the
    same.
    """

    form: str
    rmse: float
    relative: float
    excess: Estimate
    failures: int


@dataclass(frozen=True)
class Ranking:
    """The forms by their error on one task.

    ``points`` were predicted, in ``units`` that were resampled: groups, or with fewer than three of them the levels
    of each. ``best`` has the smallest error, None where the levels are too few; ``alike`` are the forms whose excess
    over it has an interval that contains 0, or none. ``statement`` says this in a sentence.
    """

    task: str
    points: int
    units: int
    errors: tuple[FormError, ...]
    best: str | None
    alike: tuple[str, ...]
    statement: str

    def error(self, form: str) -> FormError:
        """Give the error of `form`. Raises `KeyError` where it was not compared."""
        return {each.form: each for each in self.errors}[form]


@dataclass(frozen=True)
class FormComparison:
    """Out-of-sample errors of several forms for one set of points, by task.

    *Interpolation*: every inner level of x left out in turn. *Extrapolation*: every level above the fourth predicted
    from those below it alone, the largest included; the smallest level is never left out. With groups, each group has
    parameters of its own and its own levels left out. ``levels`` counts distinct x, of the group with the fewest.
    """

    levels: int
    groups: int | None
    interpolation: Ranking
    extrapolation: Ranking


def compare_forms(
    x: ArrayLike,
    y: ArrayLike,
    forms: Sequence[str] = tuple(FORMS),
    *,
    groups: Sequence[str] | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> FormComparison:
    """Compare `forms` on y against x > 0 by their errors on left-out levels; see `FormComparison`.

    The best form is told from another when the 95% interval of their difference in squared error, bootstrapped over
    groups (over the levels of each where groups are fewer than three), lies above 0. `scale` fixes that of a logit.
    `seed` draws the bootstrap. With fewer than five levels (of every group) no form is chosen and the statement says
    so. Raises `ReportError` for unknown forms or unusable values.
    """
    xs, ys = checked(x, y)
    if groups is not None and len(groups) != len(xs):
        raise ReportError(f"comparison: groups must label each of {len(xs)} points, got {len(groups)}")
    shapes = [find_form(name, scale) for name in forms]
    labels = np.asarray(["all"] * len(xs) if groups is None else groups, dtype=str)
    names = np.unique(labels)
    levels = min(len(np.unique(xs[labels == name])) for name in names)

    def rank(task: str) -> Ranking:
        if levels < LEAST_LEVELS:
            few = f"{levels} levels of x are too few to choose a form by {task}; {LEAST_LEVELS} are needed"
            return Ranking(task=task, points=0, units=0, errors=(), best=None, alike=(), statement=few)
        tried = [_predict_left_out(shapes, xs[labels == n], ys[labels == n], task) for n in names]
        units = [
            f"{n}" if len(names) >= _LEAST_UNITS else f"{n} {level:g}"
            for n, one in zip(names, tried, strict=True)
            for level in one.x
        ]
        return _ranking(task, list(forms), _joined(tried), units, seed)

    return FormComparison(
        levels, None if groups is None else len(names), rank("interpolation"), rank("extrapolation")
    )


@dataclass(frozen=True)
class _LeftOut:
    """Left-out points: x, y and the size of y in the group, each (points); predictions (forms, points); failures."""

    x: Floats
    y: Floats
    size: Floats
    predicted: Floats
    failures: NDArray[np.int64]


def _splits(x: Floats, task: str) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Points to fit and points to predict, one pair a left-out level."""
    levels = np.unique(x)
    left_out = levels[1:-1] if task == "interpolation" else levels[_LEAST_TRAINING:]
    for level in left_out:
        yield (x != level if task == "interpolation" else x < level), x == level


def _predict_left_out(shapes: Sequence[Form], x: Floats, y: Floats, task: str) -> _LeftOut:
    z = x / reference_of(x)
    runaway = 1e6 * (float(np.abs(y).max()) or 1.0)  # a fit that ran away errs by much, and by a number
    rows, failures = [], np.zeros(len(shapes), dtype=np.int64)
    for fit, test in _splits(x, task):
        column = []
        for index, shape in enumerate(shapes):
            best, trouble = solve(shape, z[fit], y[fit], np.ones(int(fit.sum())))
            failures[index] += trouble is not None
            with np.errstate(over="ignore", invalid="ignore"):
                guess = shape.value(z[test], best)
            column.append(np.clip(np.nan_to_num(guess, nan=runaway), -runaway, runaway))
        rows.append((x[test], y[test], np.stack(column)))
    at, truth, predicted = (np.concatenate([row[i] for row in rows], axis=-1) for i in range(3))
    size = float(np.abs(y).mean()) or 1.0
    return _LeftOut(at, truth, np.full_like(truth, size), predicted, failures)


def _joined(parts: Sequence[_LeftOut]) -> _LeftOut:
    x, y, size, predicted = (
        np.concatenate([getattr(p, name) for p in parts], axis=-1) for name in ("x", "y", "size", "predicted")
    )
    return _LeftOut(x, y, size, predicted, np.sum([p.failures for p in parts], axis=0))


def _ranking(task: str, forms: list[str], tried: _LeftOut, units: Sequence[str], seed: int) -> Ranking:
    absolute = np.sqrt(((tried.predicted - tried.y) ** 2).mean(axis=1))
    squared = ((tried.predicted - tried.y) / tried.size) ** 2
    relative = np.sqrt(squared.mean(axis=1))
    best = int(np.argmin(relative))
    excess = _excess(squared, best, units, seed)
    errors = tuple(
        FormError(name, float(absolute[i]), float(relative[i]), excess[i], int(tried.failures[i]))
        for i, name in enumerate(forms)
    )
    alike = tuple(e.form for i, e in enumerate(errors) if i != best and not (e.excess.low or 0.0) > 0)
    count = len(set(units))
    said = _statement(task, errors[best], alike, len(forms), count)
    ordered = tuple(sorted(errors, key=lambda e: e.relative))
    return Ranking(
        task=task, points=len(tried.y), units=count, errors=ordered, best=forms[best], alike=alike, statement=said
    )


def _excess(squared: Floats, best: int, units: Sequence[str], seed: int) -> list[Estimate]:
    """Mean squared relative error above the best form's, paired, with intervals over units."""
    names, index = np.unique(np.asarray(units, dtype=str), return_inverse=True)
    gap = squared - squared[best]
    sums = np.zeros((len(names), len(gap) + 1))
    np.add.at(sums, index, np.concatenate([gap, np.ones((1, gap.shape[1]))]).T)
    if len(names) < _LEAST_UNITS:
        return [Estimate(number(v), None, None, len(names)) for v in gap.mean(axis=1)]
    bootstrap = ClusterBootstrap(["all"] * len(names), np.random.default_rng(seed))
    found = list(bootstrap.estimates(lambda s: s[..., :-1] / s[..., -1:], sums))
    found[best] = Estimate(0.0, None, None, len(names))
    return found


def _statement(task: str, best: FormError, alike: Sequence[str], forms: int, units: int) -> str:
    head = f"cross-validated error by {task}: {best.form} {best.relative:.1%} of the mean"
    if not alike:
        return f"{head}, and less than each other form"
    if len(alike) == forms - 1:
        why = "" if units >= _LEAST_UNITS else f": {units} left-out units give no interval"
        return f"{head}; not distinguishable from any other form{why}"
    return f"{head}; not distinguishable from {', '.join(alike)}"
