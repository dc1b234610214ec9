"""A policy over lambda: quality, cost, utility, gain and shares, with paired intervals over items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from analysis.cascade.findings import PolicyCurve, PolicyPoint
from analysis.cascade.hull import mixing_quality
from analysis.cascade.policies import TITLES, outcome
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import Bounds, ClusterBootstrap, Estimate, number
from calibration.common.arrays import Floats

NO_BOUNDS: Bounds = (None, None)


def evaluate(
    table: QualityTable,
    name: str,
    done: Sequence[Choice],
    grid: Sequence[float],
    bootstrap: ClusterBootstrap,
    gains: Mapping[tuple[str, float], Bounds],
    mean_gains: Mapping[str, Bounds],
) -> PolicyCurve:
    """Give the curve of policy `name`, which did `done` at each lambda of `grid`.

    All points at once, so that the resampled items are summed once. `gains` and `mean_gains`: those of
    `together.Together`.
    """
    stages = len(table.stages)
    columns = [_columns(table, choice, lam) for choice, lam in zip(done, grid, strict=True)]
    width = columns[0].shape[1]

    def statistic(rows: Floats) -> Floats:
        mean = means(rows)
        alone = mean[..., : 2 * stages]
        parts = [
            _statistics(mean[..., 2 * stages + k * width :][..., :width], alone, lam, best_fixed(table, lam))
            for k, lam in enumerate(grid)
        ]
        gains = np.stack([part[..., 3] / lam for part, lam in zip(parts, grid, strict=True)], axis=-1)
        return np.concatenate([*parts, gains.mean(axis=-1, keepdims=True)], axis=-1)

    found = bootstrap.estimates(statistic, sums(table.correct, table.cost, *columns))
    each = len(found) // len(grid)
    points = []
    for k, lam in enumerate(grid):
        mine = found[k * each : (k + 1) * each]
        shares = tuple(one.bounded(len(table.items)) for one in mine[6:])
        quality, cost, utility, gain, mixing, closed = mine[:6]
        ran = shares[stages:]
        beyond = _bounded(gain, gains.get((name, lam), NO_BOUNDS), lam)
        points.append(PolicyPoint(lam, quality, cost, utility, gain, beyond, mixing, closed, shares[:stages], ran))
    mean = found[-1]
    return PolicyCurve(name, TITLES[name], tuple(points), mean, _bounded(mean, mean_gains.get(name, NO_BOUNDS)))


def _bounded(value: Estimate, bounds: Bounds, scale: float = 1.0) -> Estimate:
    """The same value with other bounds, times `scale`."""
    low, high = (None if one is None else number(one * scale) for one in bounds)
    return replace(value, low=low, high=high)


def _columns(table: QualityTable, choice: Choice, lam: float) -> Floats:
    """Per item: quality, cost, utility of the oracle that routes, then which stage answers, then which run."""
    quality, cost = outcome(table, choice)
    oracle = (lam * table.correct - table.cost).max(axis=1)
    answered = np.arange(len(table.stages)) == choice.answer[:, None]
    return np.column_stack([quality, cost, oracle, answered, choice.ran])


def _statistics(mean: Floats, alone: Floats, lam: float, best: int) -> Floats:
    """From means over items to quality, cost, utility, gain, quality over mixing, gap closed, and shares."""
    q, c, top = mean[..., 0], mean[..., 1], mean[..., 2]
    each, price = np.split(alone, 2, axis=-1)
    gain = lam * (q - each[..., best]) - (c - price[..., best])
    reach = top - (lam * each[..., best] - price[..., best])
    closed = np.where(reach > 1e-9 * lam, gain / reach, np.nan)
    mixed = q - mixing_quality(price, each, c)
    return np.concatenate([np.stack([q, c, lam * q - c, gain, mixed, closed], axis=-1), mean[..., 3:]], axis=-1)


def best_fixed(table: QualityTable, lam: float) -> int:
    """Give the stage whose utility is highest when it runs alone on every item, in hindsight."""
    return int(np.argmax(lam * table.correct.mean(axis=0) - table.cost.mean(axis=0)))


def sums(*columns: Floats) -> Floats:
    """Give columns for `means`: the values and, last, a 1 to count items."""
    return np.column_stack([*columns, np.ones(len(columns[0]))])


def means(rows: Floats) -> Floats:
    """Give means over items from sums over them."""
    return np.asarray(rows[..., :-1] / rows[..., -1:], dtype=np.float64)
