"""What holds whatever was picked: gains judged for all policies and lambdas at once, against whichever stage is best.

The interval of one gain is that of a choice made beforehand. An answer names the policy that came out best, and the
lambda where it did so; its bounds are those that hold for every policy (at every lambda) together. Neither is the
best single stage known: a gain over it is the least of the gains over each stage, and is bounded as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.cascade.findings import BestAt
from analysis.cascade.policies import outcome
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import Bounds, Candidates, ClusterBootstrap, least
from calibration.common.arrays import Floats

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
