"""The one policy and the one point of a study that an answer names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.bootstrap import ClusterBootstrap, Estimate
from analysis.cascade.curves import best_fixed, sums
from analysis.cascade.findings import Headline, PolicyCurve
from analysis.cascade.policies import outcome
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable

LEARNED = ("sequential", "cascade-routing", "route-once")
"""Policies that the predictor drives."""


def find_headline(
    table: QualityTable,
    curves: Sequence[PolicyCurve],
    done: Mapping[str, Sequence[Choice]],
    bootstrap: ClusterBootstrap,
) -> Headline:
    """Give the learned policy of largest mean gain, its point of largest gain over lambda, and what it saves."""
    curve = max((c for c in curves if c.policy in LEARNED), key=lambda one: one.mean_gain.value or 0.0)
    point = max(curve.points, key=lambda one: (one.gain.value or 0.0) / one.lam)
    saving, lam = _saving(table, curve, done[curve.policy], bootstrap)
    best = table.stages[best_fixed(table, point.lam)]
    return Headline(curve.policy, curve.mean_gain, point.lam, best, point.gain, saving, lam)


def _saving(
    table: QualityTable, curve: PolicyCurve, done: Sequence[Choice], bootstrap: ClusterBootstrap
) -> tuple[Estimate | None, float | None]:
    """Share of cost saved against the stage of highest quality, where the policy's quality is at least as high."""
    top = int(np.argmax(table.correct.mean(axis=0)))
    level = float(table.correct[:, top].mean()) - 1e-6
    equal = [at for at, point in enumerate(curve.points) if (point.quality.value or 0.0) >= level]
    if not equal:
        return None, None
    at = min(equal, key=lambda k: curve.points[k].cost.value or np.inf)
    _, cost = outcome(table, done[at])
    (saved,) = bootstrap.estimates(lambda rows: 1 - rows[..., :1] / rows[..., 1:2], sums(cost, table.cost[:, top]))
    return saved, curve.points[at].lam
