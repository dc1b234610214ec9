"""A stopping rule learned from posteriors: cells of what the decision turns on, and chances between them.

A fitted stopping rule as plain numbers: read it, feed it what has been seen, and it says whether to run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.cascade.predictor import MISSING, Predictor, features, fit
from analysis.cascade.stopping import STOP, Move, Node, Ran, after, continue_above, solve
from analysis.cascade.table import Cells, QualityTable, fit_cells
from analysis.common.threads import one_thread
from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError

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


_HIGH = 1e4
"""Highest lambda that thresholds are looked for at, as a multiple of the cost of all stages."""


@dataclass(frozen=True)
class CellRule:
    """One cell: posterior quality of the answer at hand, the items it was fitted on, and when to run on.

    The next stage runs where lambda is above `continue_above_lambda`; None: at none up to `CascadeRule.highest`.
    """

    quality: float
    items: int
    continue_above_lambda: float | None


@dataclass(frozen=True)
class StageRule:
    """What to do once the stages up to `stage` have run in order: posteriors, the cell they fall in, its rule."""

    stage: str
    predictor: Predictor
    cells: Cells
    rules: tuple[CellRule, ...]


@dataclass(frozen=True)
class CascadeRule:
    """The sequential rule for every lambda, fitted on all items of a table.

    `costs`: mean cost of each stage from nothing. `continued`: a later stage pays only what it adds. `forms`: of the
    predictor after 0, 1, ... stages.

    To apply it after a stage: standardise the columns that its predictor names, follow its layers to a calibrated
    posterior p of every stage, take the point (p of this stage, p of each later stage minus it), find its cell.
    """

    name: str
    label: str
    items: int
    stages: tuple[str, ...]
    costs: tuple[float, ...]
    continued: bool
    forms: tuple[str, ...]
    highest: float
    rules: tuple[StageRule, ...]

    def posterior(self, stage: str, seen: Mapping[str, float]) -> Floats:
        """Give the chance of a correct answer of every stage, once the stages up to `stage` have run.

        `seen`: value by column, as ``13B.confidence`` or ``item_prompt_tokens``; what is not there is missing.
        """
        rule = self._rule(stage)
        columns = [
            float(np.isnan(seen.get(name.removesuffix(MISSING), np.nan)))
            if name.endswith(MISSING)
            else seen.get(name, np.nan)
            for name in rule.predictor.features
        ]
        return np.asarray(rule.predictor(np.array([columns], dtype=np.float64))[0])

    def runs_on(self, stage: str, seen: Mapping[str, float], lam: float) -> bool:
        """Say whether the next stage should run at `lam`, given what has been `seen` up to `stage`."""
        at = self.stages.index(stage) if stage in self.stages else -1
        if at == len(self.stages) - 1:
            return False
        rule = self._rule(stage)
        point = decisive(self.posterior(stage, seen)[None], tuple(range(at + 1)), "sequential")
        threshold = rule.rules[int(rule.cells.find(point)[0])].continue_above_lambda
        return threshold is not None and lam > threshold

    def _rule(self, stage: str) -> StageRule:
        for rule in self.rules:
            if rule.stage == stage:
                return rule
        raise ReplayError(f"stage '{stage}': must be one of {', '.join(r.stage for r in self.rules)}")


@one_thread
def fit_rule(table: QualityTable, seed: int = 0, *, known_domain: bool = False) -> CascadeRule:
    """Fit the sequential rule on all items of `table` (its value is what `study_cascade` finds out of fold)."""
    stages = len(table.stages)
    sets = information_sets(stages, "sequential")
    columns = {ran: features(table, ran, known_domain=known_domain) for ran in sets}
    fitted = fit(table, columns, np.arange(len(table.items)), seed)
    learned = learn(fitted.posteriors, table, "sequential")
    highest = _HIGH * float(table.cost.mean(axis=0).sum())
    rules = []
    for ran in sets[1:-1]:
        cells, quality = learned.cells[ran], learned.nodes[ran].quality
        counts = np.bincount(cells.find(decisive(fitted.posteriors[ran], ran, "sequential")), minlength=cells.count)
        above = continue_above(learned.nodes, ran, highest)
        each = zip(np.atleast_1d(np.asarray(quality, dtype=np.float64)), counts, above, strict=True)
        found = tuple(CellRule(float(q), int(n), lam) for q, n, lam in each)
        rules.append(StageRule(table.stages[ran[-1]], fitted.predictors[ran], cells, found))
    costs = tuple(table.cost.mean(axis=0).tolist())
    return CascadeRule(
        name=table.name,
        label=table.label,
        items=len(table.items),
        stages=table.stages,
        costs=costs,
        continued=table.continued,
        forms=fitted.kinds,
        highest=highest,
        rules=tuple(rules),
    )
