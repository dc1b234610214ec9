"""A fitted stopping rule as plain numbers: read it, feed it what has been seen, and it says whether to run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.cascade.cells import Cells
from analysis.cascade.crossfit import fit
from analysis.cascade.features import MISSING, features
from analysis.cascade.predictor import Predictor
from analysis.cascade.rules import decisive, information_sets, learn
from analysis.cascade.stopping import continue_above
from analysis.cascade.table import QualityTable
from analysis.common.threads import one_thread
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError

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
        table.name,
        table.label,
        len(table.items),
        table.stages,
        costs,
        table.continued,
        fitted.kinds,
        highest,
        tuple(rules),
    )
