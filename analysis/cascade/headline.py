"""The one policy and the one point of a study that an answer names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.cascade.curves import best_fixed, means, sums
from analysis.cascade.findings import Headline, PolicyCurve
from analysis.cascade.policies import outcome
from analysis.cascade.rules import Choice
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import ClusterBootstrap, Estimate, number

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
    saving, quality, lam = _saving(table, curve, done[curve.policy], bootstrap)
    mean = curve.mean_gain_together
    return Headline(
        curve.policy,
        curve.mean_gain,
        mean,
        mean.low is not None and mean.low > 0,
        point.lam,
        table.stages[best_fixed(table, point.lam)],
        point.gain,
        point.gain_together,
        saving,
        quality,
        lam,
    )


def _saving(
    table: QualityTable, curve: PolicyCurve, done: Sequence[Choice], bootstrap: ClusterBootstrap
) -> tuple[Estimate | None, Estimate | None, float | None]:
    """Share of cost saved against the stage of highest quality where the policy's is as high, and how much higher."""
    top = int(np.argmax(table.correct.mean(axis=0)))
    level = float(table.correct[:, top].mean()) - 1e-6
    equal = [at for at, point in enumerate(curve.points) if (point.quality.value or 0.0) >= level]
    if not equal:
        return None, None, None
    at = min(equal, key=lambda k: curve.points[k].cost.value or np.inf)
    each = [outcome(table, one) for one in done]
    beyond = sums(*(quality - table.correct[:, top] for quality, _ in each))
    costs = sums(*(cost for _, cost in each), table.cost[:, top])
    higher = bootstrap.candidates(means, beyond, scale="identity")
    paid = bootstrap.candidates(lambda rows: rows[..., :-2] / rows[..., -2:-1], costs)
    dearest, cheapest = paid.simultaneous()[at]
    items = len(table.items)
    saved = Estimate(
        number(1 - float(paid.values[at])),
        None if cheapest is None else number(1 - cheapest),
        None if dearest is None else number(1 - dearest),
        items,
    )
    return saved, Estimate(number(float(higher.values[at])), *higher.simultaneous()[at], items), curve.points[at].lam
