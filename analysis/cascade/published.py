"""A published cascade that always chose its largest model, against the optimum under its own costs.

Source: github.com/sa2shun/adaptive-speculative-decoding at 510ea65 (costs, lambdas, and the stopping rule in
``experiments/final/run_final_real_experiments.py``). Facts only; nothing of its code is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from analysis.cascade.hull import Switch, first_possible_lambda, switch_points
from analysis.cascade.stopping import sequential_nodes, solve

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
