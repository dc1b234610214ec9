"""A stopping rule learned from posteriors: cells of what the decision turns on, and chances between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.cascade.cells import Cells, fit_cells
from analysis.cascade.stopping import STOP, Move, Node, Ran, after, solve
from analysis.cascade.table import QualityTable
from calibration.common.arrays import Floats, Ints

Shape = Literal["sequential", "routing"]

SMALLEST_CELL = 25
"""Training items that a cell holds at least, where it can be chosen: a rate of one half is known to about 0.1."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a policy did: stages that ran (items, stages), and the stage whose answer went out (items,)."""

    ran: NDArray[np.bool_]
    answer: Ints


@dataclass(frozen=True, eq=False)
class Learned:
    """States (cells) of each set of stages, and the decision problem on them."""

    shape: Shape
    stages: int
    cells: Mapping[Ran, Cells]
    nodes: Mapping[Ran, Node]

    def choose(self, posteriors: Mapping[Ran, Floats], lam: float) -> Choice:
        """Follow the optimum at `lam` for items with these posteriors after each set of stages."""
        action = solve(self.nodes, lam).action
        items = len(posteriors[()])
        ran, answer = np.zeros((items, self.stages), dtype=np.bool_), np.zeros(items, dtype=np.int64)
        waiting: list[tuple[Ran, Ints]] = [((), np.arange(items))]
        while waiting:
            known, rows = waiting.pop()
            posterior = posteriors[known][rows]
            next_stage = action[known][self.cells[known].find(decisive(posterior, known, self.shape))]
            stop = next_stage == STOP
            answer[rows[stop]] = answered(posterior[stop], known, self.shape)
            for stage in np.unique(next_stage[~stop]):
                chosen = rows[next_stage == stage]
                ran[chosen, stage] = True
                waiting.append((after(known, int(stage)), chosen))
        return Choice(ran, answer)


def information_sets(stages: int, shape: Shape) -> tuple[Ran, ...]:
    """Give the sets of stages that may have run: prefixes, or all subsets."""
    if shape == "sequential":
        return tuple(tuple(range(k)) for k in range(stages + 1))
    return tuple(ran for k in range(stages + 1) for ran in combinations(range(stages), k))


def decisive(posterior: Floats, ran: Ran, shape: Shape) -> Floats:
    """Give what a decision turns on, (n, d): quality of the answer at hand, and what each open stage would add.

    A stage is open that has not run and, in a sequential cascade, comes later. Before any has run: all posteriors.
    """
    if not ran:
        return posterior
    hand = _at_hand(posterior, ran, shape)
    still = [j for j in range(posterior.shape[1]) if j not in ran]
    return np.column_stack([hand, *(posterior[:, j] - hand for j in still)])


def answered(posterior: Floats, ran: Ran, shape: Shape) -> Ints:
    """Give the stage whose answer goes out: the last that ran, or (routing) the one of highest posterior."""
    if not ran:
        return np.zeros(len(posterior), dtype=np.int64)
    if shape == "sequential":
        return np.full(len(posterior), ran[-1], dtype=np.int64)
    order = np.asarray(ran, dtype=np.int64)
    return np.asarray(order[np.argmax(posterior[:, order], axis=1)], dtype=np.int64)


def learn(
    posteriors: Mapping[Ran, Floats], table: QualityTable, shape: Shape, *, smallest: int = SMALLEST_CELL
) -> Learned:
    """Learn the decision problem from cross-fitted posteriors of training items, the rows of `table`.

    Quality of a cell: the mean posterior of its answer. Costs and chances of the cells after a stage: their means
    over the items of the cell, all of them, since every stage ran on every item. An approximation in that a cell
    stands for all posteriors in it.
    """
    items, stages = table.cost.shape
    cells: dict[Ran, Cells] = {}
    where: dict[Ran, Ints] = {}
    for ran in information_sets(stages, shape):
        points = decisive(posteriors[ran], ran, shape)
        cells[ran] = fit_cells(points, smallest)
        where[ran] = cells[ran].find(points)
    nodes: dict[Ran, Node] = {}
    for ran, tree in cells.items():
        member = np.zeros((tree.count, items))
        member[where[ran], np.arange(items)] = 1
        member /= member.sum(axis=1, keepdims=True)
        quality = member @ _at_hand(posteriors[ran], ran, shape) if ran else None
        moves = []
        for j in _open(ran, stages, shape):
            then = after(ran, j)
            added = table.spent(_mask(then, stages)) - table.spent(_mask(ran, stages))
            moves.append(Move(j, member @ added, member @ np.eye(cells[then].count)[where[then]]))
        nodes[ran] = Node(quality, tuple(moves))
    return Learned(shape, stages, cells, nodes)


def _at_hand(posterior: Floats, ran: Ran, shape: Shape) -> Floats:
    """Posterior quality of the answer that would go out now."""
    return posterior[np.arange(len(posterior)), answered(posterior, ran, shape)]


def _mask(ran: Ran, stages: int) -> NDArray[np.bool_]:
    """The stages that ran, as booleans."""
    return np.isin(np.arange(stages), ran)


def _open(ran: Ran, stages: int, shape: Shape) -> list[int]:
    """The stages that may run next."""
    if shape == "sequential":
        return [len(ran)] if len(ran) < stages else []
    return [j for j in range(stages) if j not in ran]
