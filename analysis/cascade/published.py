"""A published cascade that always chose its largest model, against the optimum under its own costs.

Source: github.com/sa2shun/adaptive-speculative-decoding at 510ea65 (costs, lambdas, and the stopping rule in
``experiments/final/run_final_real_experiments.py``). Facts only; nothing of its code is here.

Stages of fixed quality: the upper envelope of lines lambda * quality - cost, and what mixing stages can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import ndtr

from analysis.cascade.stopping import sequential_nodes, solve
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


SOURCE = "github.com/sa2shun/adaptive-speculative-decoding at 510ea65"
STAGES = ("13B", "34B", "70B")
COSTS = (1.6, 4.2, 8.8)
LAMBDAS = (0.5, 1.0, 2.0, 5.0)
RUNS = 60
QUALITIES = (0.6, 0.7, 0.8)
"""An example, not published: no quality was ever measured there."""


@dataclass(frozen=True)
class ReachShare:
    """Share of items that the published rule sends to its last stage, derived from the rule; no model is asked."""

    lam: float
    share: float


@dataclass(frozen=True)
class PublishedFacts:
    """Both facts. `optimum`: the best stage at each of `lambdas` with `qualities`, by the sequential recursion.

    `impossible_below_once` and `..._sequential`: the lambda up to which each stage cannot be optimal whatever the
    qualities in 0..1. `gap_needed_once` and `..._sequential`: by how much the second stage's quality must exceed
    the first one's to be worth its cost at the largest of `lambdas`. `reach`: what the published rule does.
    """

    source: str
    stages: tuple[str, ...]
    costs: tuple[float, ...]
    lambdas: tuple[float, ...]
    runs: int
    chosen: str
    qualities: tuple[float, ...]
    optimum: tuple[str, ...]
    switches: tuple[Switch, ...]
    switches_sequential: tuple[Switch, ...]
    impossible_below_once: tuple[float, ...]
    impossible_below_sequential: tuple[float, ...]
    gap_needed_once: float
    gap_needed_sequential: float
    reach: tuple[ReachShare, ...]


def published_facts() -> PublishedFacts:
    """Give both facts, computed."""
    top = max(LAMBDAS)
    return PublishedFacts(
        source=SOURCE,
        stages=STAGES,
        costs=COSTS,
        lambdas=LAMBDAS,
        runs=RUNS,
        chosen=STAGES[-1],
        qualities=QUALITIES,
        optimum=tuple(STAGES[best_stage(COSTS, QUALITIES, lam)] for lam in LAMBDAS),
        switches=switch_points(COSTS, QUALITIES),
        switches_sequential=switch_points(tuple(np.cumsum(COSTS).tolist()), QUALITIES),
        impossible_below_once=first_possible_lambda(COSTS, sequential=False),
        impossible_below_sequential=first_possible_lambda(COSTS, sequential=True),
        gap_needed_once=(COSTS[1] - COSTS[0]) / top,
        gap_needed_sequential=COSTS[1] / top,
        reach=tuple(ReachShare(lam, reach_share(lam)) for lam in LAMBDAS),
    )


def best_stage(costs: tuple[float, ...], qualities: tuple[float, ...], lam: float) -> int:
    """Give the stage at which the sequential optimum stops when qualities are known numbers."""
    nodes = sequential_nodes(costs, [np.array([q]) for q in qualities], [np.ones((1, 1))] * len(costs))
    action = solve(nodes, lam).action
    return next(k for k in range(len(costs)) if action[tuple(range(k + 1))][0] == -1)


def reach_share(lam: float) -> float:
    """Give the share of items that the published rule sends to the last of its four stages.

    It compares 0.7 + 0.05 i + N(0, 0.02) (i = 0, 1, 2; no input in it) with a threshold: 0.75 below lambda 1, 0.95
    above 5, else 0.85; the first value above it stops.
    """
    threshold = 0.75 if lam < 1 else 0.95 if lam > 5 else 0.85
    return float(np.prod([ndtr((threshold - 0.7 - 0.05 * i) / 0.02) for i in range(3)]))
