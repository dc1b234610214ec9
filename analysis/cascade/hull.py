"""Stages of fixed quality: the upper envelope of lines lambda * quality - cost, and what mixing stages can reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError


@dataclass(frozen=True)
class Switch:
    """From this lambda on (up to that of the next switch) the stage at index `stage` has the highest utility."""

    stage: int
    from_lambda: float


def switch_points(costs: Sequence[float], qualities: Sequence[float]) -> tuple[Switch, ...]:
    """Give the stages on the upper envelope of lambda * quality - cost over lambda >= 0, in order, from lambda 0.

    The breakpoint between neighbours i, j on the envelope is (C_j - C_i) / (Q_j - Q_i). Dominated stages are not in
    it. Exact. With costs (1.6, 4.2, 8.8) and qualities (.6, .7, .8): stage 0 from 0, 1 from 26, 2 from 46. For a
    sequential cascade without signals give the cumulated costs: those of earlier stages are paid, too.
    """
    if len(costs) != len(qualities) or not costs:
        raise ReplayError(f"switch points: needs as many costs as qualities, got {len(costs)} and {len(qualities)}")
    now = min(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    found, at = [Switch(now, 0.0)], 0.0
    while True:
        better = [j for j in range(len(costs)) if qualities[j] > qualities[now]]
        if not better:
            return tuple(found)
        breaks = {j: (costs[j] - costs[now]) / (qualities[j] - qualities[now]) for j in better}
        at = min(breaks.values())
        now = max((j for j in better if breaks[j] <= at * (1 + 1e-12)), key=lambda j: qualities[j])
        found.append(Switch(now, at))


def first_possible_lambda(costs: Sequence[float], *, sequential: bool) -> tuple[float, ...]:
    """Give the lambda up to which each stage cannot be optimal, whatever the qualities in 0..1.

    A stage is worth at most lambda more than another. Route-once: C_j - min C. Sequential: the sum of what is paid
    after the first stage, C_2 + ... + C_j. A bound: it is reached only by qualities 0 and 1.
    """
    if sequential:
        return tuple(float(sum(costs[1 : j + 1])) for j in range(len(costs)))
    return tuple(float(cost - min(costs)) for cost in costs)


def mixing_quality(costs: Floats, qualities: Floats, at: Floats) -> Floats:
    """Give the best expected quality that random mixing of stages reaches at expected cost `at` (or below).

    `costs`, `qualities`: (..., stages); `at`: (...). The upper hull of the points (cost, quality) of the stages,
    as the best of all mixtures of two. NaN below the cheapest stage.
    """
    best = np.where(costs <= at[..., None] * (1 + 1e-9), qualities, -np.inf).max(axis=-1)
    for i, j in combinations(range(costs.shape[-1]), 2):
        low, high = np.minimum(costs[..., i], costs[..., j]), np.maximum(costs[..., i], costs[..., j])
        between = (at >= low) & (at <= high) & (high > low)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (at - costs[..., i]) / (costs[..., j] - costs[..., i])
            mixed = qualities[..., i] + share * (qualities[..., j] - qualities[..., i])
        best = np.where(between, np.fmax(best, mixed), best)
    return np.where(np.isfinite(best), best, np.nan)
