"""How good predicted chances are: Brier score, calibration error, AUROC, reliability; intervals over items."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from analysis.cascade.findings import Bin, StageScores
from analysis.cascade.predictor import log_loss
from analysis.common.bootstrap import ClusterBootstrap, Estimate, number
from calibration.common.arrays import Floats, Ints

BINS = 10
"""Bins of the reliability curve, of equal count where predictions are not tied."""

_CHANCES = 400
"""Draws of the calibration error by chance."""


def score(
    stage: str, after: int, p: Floats, base: Floats, y: Floats, fold: Ints, bootstrap: ClusterBootstrap
) -> StageScores:
    """Score chances `p` (items,) of correctness `y` against the rate `base` that was known without them.

    `fold` (items,): which items were held out together.
    """
    sums = np.column_stack([np.ones_like(y), (p - y) ** 2, (base - y) ** 2, log_loss(p, y)])
    brier, brier_base, skill, loss = bootstrap.estimates(_proper, sums)
    chance = error_by_chance(p, np.random.default_rng(0))
    auroc = _auroc(p, y, fold, bootstrap)
    curve = _reliability(p, y, bootstrap)
    ece, low, high = (number(value) or 0.0 for value in (calibration_error(p, y), *chance))
    return StageScores(stage, after, brier, brier_base, skill, ece, low, high, auroc, loss, curve)


def _proper(sums: Floats) -> Floats:
    n, brier, base, loss = np.moveaxis(sums, -1, 0)
    return np.stack([brier / n, base / n, 1 - brier / base, loss / n], axis=-1)


def _groups(p: Floats, most: int) -> Ints:
    """The group of each prediction: quantiles, ascending, ties together."""
    edges = np.unique(np.quantile(p, np.linspace(0, 1, most + 1)[1:-1]))
    _, group = np.unique(np.searchsorted(edges, p, side="left"), return_inverse=True)
    return np.asarray(group, dtype=np.int64)


def calibration_error(p: Floats, y: Floats) -> float:
    """Give the expected calibration error: mean over items of |mean observed - mean predicted| of their bin."""
    group = _groups(p, BINS)
    apart = np.bincount(group, p) - np.bincount(group, y)
    return float(np.abs(apart).sum() / len(p))


def error_by_chance(p: Floats, rng: Generator) -> tuple[float, float]:
    """Give the central 95% of the calibration error where `p` is exactly right: what chance alone makes of it."""
    group = _groups(p, BINS)
    inside = np.eye(int(group.max()) + 1)[group]
    drawn = rng.random((_CHANCES, len(p))) < p
    errors = np.abs((drawn - p) @ inside).sum(axis=1) / len(p)
    low, high = np.quantile(errors, [0.025, 0.975])
    return float(low), float(high)


def _auroc(p: Floats, y: Floats, fold: Ints, bootstrap: ClusterBootstrap) -> Estimate:
    """Chance that a correct answer is scored above a wrong one of the same fold, ties half.

    Scores of different folds come from different fits, and are not compared. The value is exact; replicates take the
    change in pairs to first order in the resampled items, as DeLong et al. 1988 do.
    """
    won, pairs = np.zeros_like(p), np.zeros_like(p)
    for k in np.unique(fold):
        rows = fold == k
        right, wrong = y[rows], 1 - y[rows]
        above = (p[rows, None] > p[rows]) + (p[rows, None] == p[rows]) / 2
        won[rows] = right * (above @ wrong) + wrong * (above.T @ right)
        pairs[rows] = right * wrong.sum() + wrong * right.sum()
    twice = np.array([won.sum(), pairs.sum()])  # each pair counts for both of its items

    def share(rows: Floats) -> Floats:
        once = rows - twice / 2
        return np.asarray(once[..., :1] / once[..., 1:], dtype=np.float64)

    return bootstrap.estimates(share, np.column_stack([won, pairs]))[0]


def _reliability(p: Floats, y: Floats, bootstrap: ClusterBootstrap) -> tuple[Bin, ...]:
    group = _groups(p, BINS)
    inside = np.eye(int(group.max()) + 1)[group]
    found = []
    for k in range(inside.shape[1]):
        sums = inside[:, [k]] * np.column_stack([np.ones_like(y), y])
        (observed,) = bootstrap.estimates(lambda s: s[..., 1:] / s[..., :1], sums)
        count = int(inside[:, k].sum())
        found.append(Bin(number(p[group == k].mean()) or 0.0, observed.bounded(count)))
    return tuple(found)
