"""Optimal stopping of a cascade by backward induction over what has been seen so far.

What is known is a *state* of the set of stages that ran. In every state one may stop and hand out an answer, worth
lambda times its expected quality, or run one of the stages that the cascade allows, pay its cost and see more:

    V(s) = max{ lambda E[q | s],  max_j ( -C_j(s) + E[V(s') | s, j] ) }

Costs paid before are sunk: they are in no comparison. Sequential cascade, route-once and cascade-routing differ only
in which stages may follow which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError

Ran = tuple[int, ...]
"""The stages that have run, ascending."""

STOP = -1
"""The action that hands out the answer."""


@dataclass(frozen=True, eq=False)
class Move:
    """Running `stage` next: its expected `cost` in each state (n,), and the chances of the states after it (n, m)."""

    stage: int
    cost: Floats
    chances: Floats


@dataclass(frozen=True, eq=False)
class Node:
    """The states after one set of stages: expected quality of the answer in each (n,), None where none is at hand."""

    quality: Floats | None
    moves: tuple[Move, ...]


@dataclass(frozen=True, eq=False)
class Solution:
    """Value of every state, and what to do there: `STOP` or the stage to run next."""

    value: Mapping[Ran, Floats]
    action: Mapping[Ran, Ints]


def after(ran: Ran, stage: int) -> Ran:
    """Give the stages that have run once `stage` ran, too."""
    return tuple(sorted((*ran, stage)))


def solve(nodes: Mapping[Ran, Node], lam: float) -> Solution:
    """Give values and actions by backward induction; exact for the states given. Ties stop, then go to the first.

    Raises `ReplayError` for chances that do not sum to 1 or a state in which nothing can be done.
    """
    if not (lam >= 0 and np.isfinite(lam)):
        raise ReplayError(f"lambda: must be 0 or more, got {lam}")
    value: dict[Ran, Floats] = {}
    action: dict[Ran, Ints] = {}
    for ran in sorted(nodes, key=len, reverse=True):
        node = nodes[ran]
        worth, stages = _options(ran, node, value, lam)
        best = np.argmax(worth, axis=0)
        value[ran] = worth[best, np.arange(worth.shape[1])]
        action[ran] = np.asarray(stages)[best]
    return Solution(value, action)


def _options(ran: Ran, node: Node, value: Mapping[Ran, Floats], lam: float) -> tuple[Floats, list[int]]:
    """The worth of stopping and of every move, (options, states), and the action of each."""
    worth: list[Floats] = [] if node.quality is None else [lam * node.quality]
    stages = [] if node.quality is None else [STOP]
    for move in node.moves:
        if not np.allclose(move.chances.sum(axis=1), 1):
            raise ReplayError(f"stopping: chances after {ran} and stage {move.stage}: must sum to 1 in every state")
        worth.append(-move.cost + move.chances @ value[after(ran, move.stage)])
        stages.append(move.stage)
    if not stages:
        raise ReplayError(f"stopping: states after {ran}: need an answer or a stage to run, got neither")
    return np.stack(worth), stages


def sequential_nodes(
    costs: Sequence[float], qualities: Sequence[Floats], chances: Sequence[Floats]
) -> dict[Ran, Node]:
    """Give the nodes of a cascade that runs its stages in order and answers with the last one that ran.

    `qualities[i]` (n_i,): E[q_i | state after stage i]. `chances[0]` (n_0,): of the states after the first stage;
    `chances[i]` (n_{i-1}, n_i): of those after stage i, by the state before.
    """
    nodes: dict[Ran, Node] = {}
    for i in range(len(costs) + 1):
        moves: tuple[Move, ...] = ()
        states = 1 if i == 0 else len(qualities[i - 1])
        if i < len(costs):
            table = np.asarray(chances[i], dtype=np.float64).reshape(states, -1)
            moves = (Move(i, np.full(states, float(costs[i])), table),)
        nodes[tuple(range(i))] = Node(None if i == 0 else np.asarray(qualities[i - 1]), moves)
    return nodes


def continue_above(nodes: Mapping[Ran, Node], ran: Ran, high: float) -> tuple[float | None, ...]:
    """Give per state after `ran` the lambda above which the optimum runs on; None where it does not up to `high`.

    One number says it all: continuing minus stopping is convex in lambda (a maximum of lines, less a line) and
    negative at 0, so it turns positive at most once. By bisection, to a relative 1e-9.
    """
    if nodes[ran].quality is None or not nodes[ran].moves:
        raise ReplayError(f"stopping: states after {ran}: need both an answer and a stage to run")
    ever = solve(nodes, high).action[ran] != STOP
    low, up = np.zeros(len(ever)), np.full(len(ever), high)
    for state in np.flatnonzero(ever):
        while up[state] - low[state] > 1e-9 * up[state]:
            middle = (low[state] + up[state]) / 2
            if solve(nodes, float(middle)).action[ran][state] == STOP:
                low[state] = middle
            else:
                up[state] = middle
    return tuple(float(at) if yes else None for at, yes in zip(up, ever, strict=True))
