"""How good predicted chances are: Brier score, calibration error, AUROC, reliability; intervals over items.

What holds whatever was picked: gains judged for all policies and lambdas at once, against whichever stage is best.

The interval of one gain is that of a choice made beforehand. An answer names the policy that came out best, and the
lambda where it did so; its bounds are those that hold for every policy (at every lambda) together. Neither is the
best single stage known: a gain over it is the least of the gains over each stage, and is bounded as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.random import Generator

from analysis.cascade.curves import outcome
from analysis.cascade.findings import BestAt, Bin, StageScores
from analysis.cascade.predictor import log_loss
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import Bounds, Candidates, ClusterBootstrap, Estimate, least, number
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
    return StageScores(
        stage=stage,
        after=after,
        brier=brier,
        brier_base=brier_base,
        skill=skill,
        ece=ece,
        ece_chance_low=low,
        ece_chance_high=high,
        auroc=auroc,
        log_loss=loss,
        reliability=curve,
    )


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


Done = Mapping[str, Sequence[Choice]]

ORACLES = ("oracle", "oracle-sequential")
"""Policies that nobody can run: no choice is made among these."""


class Together:
    """Utilities over lambda of every policy that can be run and of every stage alone, per item, in quality units.

    Utility over lambda is what compares across lambdas: quality - cost / lambda. `done`: what each policy did at each
    lambda of `grid`.
    """

    def __init__(self, table: QualityTable, done: Done, grid: Sequence[float], bootstrap: ClusterBootstrap) -> None:
        self.policies = tuple(name for name in done if name not in ORACLES)
        self.stages, self.grid, self._bootstrap = table.stages, tuple(grid), bootstrap
        self._policy = np.stack(
            [_of_policies(table, [done[p][k] for p in self.policies], lam) for k, lam in enumerate(grid)]
        )
        self._stage = np.stack([table.correct - table.cost / lam for lam in grid])

    def gains(self) -> dict[tuple[str, float], Bounds]:
        """Bounds of each policy's gain over the best stage at each lambda, over lambda; all of them hold together."""
        beyond = self._policy[..., :, None] - self._stage[..., None, :]  # (lambdas, items, policies, stages)
        columns = np.moveaxis(beyond, 1, 0).reshape(beyond.shape[1], -1)
        bounds, stages = self._family(columns).simultaneous(), len(self.stages)
        keys = [(policy, lam) for lam in self.grid for policy in self.policies]
        return {key: least(bounds[at * stages : (at + 1) * stages]) for at, key in enumerate(keys)}

    def mean_gains(self) -> dict[str, Bounds]:
        """Bounds of each policy's gain averaged over the lambdas; all of them hold together.

        Against the stage that came out best at each lambda, which is no easier to beat than the one that is.
        """
        best = self._stage.mean(axis=1).argmax(axis=1)
        hindsight = np.stack([each[:, at] for each, at in zip(self._stage, best, strict=True)])
        beyond = (self._policy - hindsight[..., None]).mean(axis=0)
        return dict(zip(self.policies, self._family(beyond).simultaneous(), strict=True))

    def best_at(self) -> tuple[BestAt, ...]:
        """Name the policies and stages that may be the best at each lambda; the sets hold together."""
        each = np.concatenate([self._policy, self._stage], axis=2)
        lambdas, items, count = each.shape
        family = self._family(np.moveaxis(each, 1, 0).reshape(items, -1))
        inside = family.best_set(groups=np.repeat(np.arange(lambdas), count).tolist()).reshape(lambdas, count)
        return tuple(
            BestAt(
                lam,
                tuple(name for name, kept in zip(self.policies, row, strict=False) if kept),
                tuple(name for name, kept in zip(self.stages, row[len(self.policies) :], strict=True) if kept),
            )
            for lam, row in zip(self.grid, inside, strict=True)
        )

    def _family(self, columns: Floats) -> Candidates:
        """Means over items of each column, drawn together."""
        counted = np.column_stack([columns, np.ones(len(columns))])
        return self._bootstrap.candidates(lambda s: s[..., :-1] / s[..., -1:], counted, scale="identity")


def _of_policies(table: QualityTable, choices: Sequence[Choice], lam: float) -> Floats:
    """Quality - cost / lambda of every item under each choice, (items, policies)."""
    found = [outcome(table, choice) for choice in choices]
    return np.stack([quality - cost / lam for quality, cost in found], axis=1)
