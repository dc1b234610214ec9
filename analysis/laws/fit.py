"""Least-squares fits of one form, with 95% intervals of its parameters and of its predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from analysis.common.bootstrap import LEVEL, ClusterBootstrap, Estimate, number
from analysis.laws.forms import Form, checked, find_form, reference_of
from calibration.common.arrays import Floats
from calibration.common.errors import ConvergenceWarning, ReportError

DRAWS = 200
"""Bootstrap replicates of a fit."""

_EVALUATIONS = 200
"""Evaluations of a form before a search is given up."""

Redraw = Callable[[Callable[[Floats], Floats]], Sequence[Estimate]]
"""Takes a statistic of y, (..., points) -> (..., q), and gives its q estimates over resampled requests."""


@dataclass(frozen=True)
class FittedForm:
    """A form fitted by least squares to n points of y against x.

    ``reference`` is the x_0 of the formula. ``parameters`` hold the value and 95% interval of each parameter; their
    ``requests`` are the points, or the groups, behind it. ``intervals`` says where they come from: the covariance of
    the least-squares fit (Student's t, n - p degrees of freedom, independent errors), or a bootstrap.
    ``covariance`` is that of the parameters (absent where it could not be had), for `interval`. ``residuals`` are
    y - fit in the order given. ``r_squared`` is against the (weighted) mean, None for constant y. ``converged`` is
    false where the search stopped early or a parameter left the form, and ``trouble`` then says how. ``scale`` is the
    given scale of a logit.
    """

    form: str
    formula: str
    reference: float
    parameters: dict[str, Estimate]
    intervals: str
    covariance: tuple[tuple[float, ...], ...] | None
    points: int
    levels: int
    x_low: float
    x_high: float
    residuals: tuple[float, ...]
    rmse: float
    r_squared: float | None
    converged: bool
    trouble: str | None = None
    scale: float | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """The parameters, in the order of the form."""
        return tuple(p.value for p in self.parameters.values() if p.value is not None)

    def predict(self, x: ArrayLike) -> Floats:
        """Give the fitted y at x (any shape); see `extrapolates` for where that leaves the data."""
        z = np.asarray(x, dtype=np.float64) / self.reference
        return find_form(self.form, self.scale).value(z, self.values)

    def extrapolates(self, x: ArrayLike) -> NDArray[np.bool_]:
        """Tell where x lies outside the fitted points."""
        xs = np.asarray(x, dtype=np.float64)
        return np.asarray((xs < self.x_low) | (xs > self.x_high))

    def interval(self, x: ArrayLike) -> tuple[Floats, Floats]:
        """Give the 95% interval of the fitted curve at x (delta method on ``covariance``); NaN where it is absent.

        The error of the curve, given that the form is right; neither the scatter of points about it, nor the doubt
        about the form, which away from the data is the larger.
        """
        xs = np.asarray(x, dtype=np.float64)
        middle = self.predict(xs)
        if self.covariance is None:
            return np.full_like(middle, np.nan), np.full_like(middle, np.nan)
        form = find_form(self.form, self.scale)
        slopes = form.slopes(xs.ravel() / self.reference, self.values)
        spread = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", slopes, np.asarray(self.covariance), slopes), 0))
        reach = _quantile(self.points - len(self.values)) * spread.reshape(middle.shape)
        return middle - reach, middle + reach


def fit_form(
    form: str,
    x: ArrayLike,
    y: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    scale: float | None = None,
    reference: float | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    redraw: Redraw | None = None,
) -> FittedForm:
    """Fit `form` (a name of `FORMS`) to y against x > 0 by (weighted) least squares of y.

    `weights` multiply the squared residuals. `scale` fixes the scale of a logit (1 for a probability, the draft
    length for an accepted length without bonus), None fits it. `reference` is x_0, by default a round number amid the
    x. With `groups` (one label a point, a domain say) the intervals come from a bootstrap over whole groups, `seed`
    drawing them; with `redraw` from y drawn again as it says (over requests, say). Warns `ConvergenceWarning` where
    the fit did not converge or is degenerate. Raises
    `ReportError` where points or levels of x do not exceed the parameters, or values are unusable.
    """
    xs, ys = checked(x, y)
    shape = find_form(form, scale)
    levels = len(np.unique(xs))
    if levels < len(shape.parameters) or len(xs) <= len(shape.parameters):
        raise ReportError(
            f"fit of '{form}': needs {len(shape.parameters)} levels of x and a point more than parameters, "
            f"got {levels} levels and {len(xs)} points"
        )
    w = _weights(weights, len(xs))
    x0 = reference_of(xs) if reference is None else reference
    z = xs / x0
    best, trouble = solve(shape, z, ys, w)
    residuals = ys - shape.value(z, best)
    covariance = _covariance(shape, z, best, residuals, w)
    if trouble is None and covariance is None:
        trouble = "the data do not determine its parameters"
    if trouble is not None:
        warnings.warn(f"fit of '{form}': {trouble}", ConvergenceWarning, stacklevel=2)
    if redraw is not None:
        parameters = _from_redraw(shape, z, w, best, redraw)
        source = "bootstrap over requests"
    elif groups is None:
        parameters = _from_covariance(shape, best, covariance, len(xs))
        source = "covariance"
    else:
        parameters = _from_groups(form=shape, z=z, y=ys, w=w, best=best, groups=groups, seed=seed)
        source = f"bootstrap over {len(set(groups))} groups"
    spread = float((w * (ys - np.average(ys, weights=w)) ** 2).sum())
    return FittedForm(
        form=form,
        formula=shape.formula,
        reference=x0,
        parameters=parameters,
        intervals=source,
        covariance=None if covariance is None else tuple(tuple(map(float, row)) for row in covariance),
        points=len(xs),
        levels=levels,
        x_low=float(xs.min()),
        x_high=float(xs.max()),
        residuals=tuple(map(float, residuals)),
        rmse=float(np.sqrt(np.average(residuals**2, weights=w))),
        r_squared=float(1 - (w * residuals**2).sum() / spread) if spread > 0 else None,
        converged=trouble is None,
        trouble=trouble,
        scale=scale if form == "logit" else None,
    )


def solve(form: Form, z: Floats, y: Floats, w: Floats, start: Floats | None = None) -> tuple[Floats, str | None]:
    """Give the least-squares parameters of `form` and what is wrong with them, None if nothing.

    Levenberg and Marquardt from the best candidate start (positive parameters through their logarithm), or from
    `start`.
    """
    from scipy.optimize import leastsq

    root = np.sqrt(w)
    positive = np.array([name in form.positive for name in form.parameters])
    low, high = np.array([form.positive.get(name, (1.0, 1.0)) for name in form.parameters]).T
    floor, roof = np.log(low / 2), np.log(high * 2)  # just beyond the form, where the search may rest and be told of

    def natural(u: Floats) -> Floats:
        return np.asarray(np.where(positive, np.exp(np.clip(u, floor, roof)), u))

    def misfit(u: Floats) -> Floats:
        return root * (form.value(z, natural(u)) - y)

    def slopes(u: Floats) -> Floats:
        p = natural(u)
        return np.asarray(root[:, None] * form.slopes(z, p) * np.where(positive, p, 1.0))

    candidates = [np.asarray(c) for c in form.starts(z, y)] if start is None else [start]
    inner = [np.where(positive, np.log(np.where(positive, c, 1.0)), c) for c in candidates]
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # leastsq tells of early stops twice; its flag is read below
        first = min(inner, key=lambda u: float((misfit(u) ** 2).sum()))
        u, _, _, _, flag = leastsq(misfit, first, Dfun=slopes, full_output=True, maxfev=_EVALUATIONS)
    best = natural(u)
    return best, _trouble(form, best, flag in (1, 2, 3, 4))


def _trouble(form: Form, best: Floats, success: bool) -> str | None:
    for name, value in zip(form.parameters, best, strict=True):
        low, high = form.positive.get(name, (-np.inf, np.inf))
        if not low < value < high:
            return f"{name} = {value:.3g} left the range {low:g} to {high:g} in which the form is itself"
    return None if success and bool(np.isfinite(best).all()) else "the search did not converge"


def _weights(weights: ArrayLike | None, points: int) -> Floats:
    if weights is None:
        return np.ones(points)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (points,) or not (np.isfinite(w).all() and (w > 0).all()):
        raise ReportError(f"fit: weights must be {points} numbers > 0, got shape {w.shape}, least {w.min():g}")
    return np.asarray(w / w.mean())


def _covariance(form: Form, z: Floats, best: Floats, residuals: Floats, w: Floats) -> Floats | None:
    """s^2 (J^T W J)^-1, or None where J^T W J has no usable inverse."""
    slopes = form.slopes(z, best) * np.sqrt(w)[:, None]
    size = np.sqrt((slopes**2).sum(axis=0))
    if not (np.isfinite(slopes).all() and (size > 0).all()):
        return None
    normed = slopes / size
    if np.linalg.cond(normed) > 1e7:
        return None
    variance = float((w * residuals**2).sum() / (len(z) - len(best)))
    return np.asarray(np.linalg.inv(normed.T @ normed) * variance / np.outer(size, size))


def _quantile(freedom: int) -> float:
    return float(stdtrit(max(freedom, 1), (1 + LEVEL) / 2))


def _from_covariance(form: Form, best: Floats, covariance: Floats | None, points: int) -> dict[str, Estimate]:
    if covariance is None:
        return {n: Estimate(number(v), None, None, points) for n, v in zip(form.parameters, best, strict=True)}
    reach = _quantile(points - len(best)) * np.sqrt(np.diag(covariance))
    return {
        name: Estimate(number(v), number(v - r), number(v + r), points)
        for name, v, r in zip(form.parameters, best, reach, strict=True)
    }


def _from_redraw(form: Form, z: Floats, w: Floats, best: Floats, redraw: Redraw) -> dict[str, Estimate]:
    """Intervals from fits to y drawn again."""

    def refit(y: Floats) -> Floats:
        fitted, trouble = solve(form, z, y, w, best)
        return fitted if trouble is None else np.full(len(best), np.nan)

    drawn = redraw(lambda y: np.asarray(np.apply_along_axis(refit, -1, y)))
    return {
        name: Estimate(number(value), each.low, each.high, each.requests)
        for name, value, each in zip(form.parameters, best, drawn, strict=True)
    }


def _from_groups(
    form: Form, z: Floats, y: Floats, w: Floats, best: Floats, groups: Sequence[str], seed: int
) -> dict[str, Estimate]:
    """Intervals from fits to whole groups drawn with replacement (each group a row of the identity matrix)."""
    if len(groups) != len(y):
        raise ReportError(f"fit: groups must label each of {len(y)} points, got {len(groups)}")
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)

    def refit(counts: Floats) -> Floats:
        drawn = counts[index]
        keep = drawn > 0
        if len(np.unique(z[keep])) < len(form.parameters):
            return np.full(len(best), np.nan)
        fitted, trouble = solve(form, z[keep], y[keep], (w * drawn)[keep], best)
        return fitted if trouble is None else np.full(len(best), np.nan)

    bootstrap = ClusterBootstrap(["all"] * len(names), np.random.default_rng(seed), draws=DRAWS)
    drawn = bootstrap.estimates(lambda counts: np.asarray(np.apply_along_axis(refit, -1, counts)), np.eye(len(names)))
    return {
        name: Estimate(number(value), each.low, each.high, len(names))
        for name, value, each in zip(form.parameters, best, drawn, strict=True)
    }
