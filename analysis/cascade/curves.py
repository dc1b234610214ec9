"""A policy over lambda: quality, cost, utility, gain and shares, with paired intervals over items.

Every policy applied to held-out items at every lambda: learned ones, thresholds, and oracles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from analysis.cascade.findings import PolicyCurve, PolicyPoint
from analysis.cascade.predictor import Fold
from analysis.cascade.published import mixing_quality
from analysis.cascade.rules import Choice, Shape, information_sets, learn
from analysis.cascade.stopping import Ran
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import Bounds, ClusterBootstrap, Estimate, number
from calibration.common.arrays import Floats, Ints

TITLES = {
    "sequential": "sequential cascade (optimal stopping)",
    "cascade-routing": "cascade-routing (any stage next)",
    "route-once": "route once (before anything runs)",
    "score-threshold": "one threshold on the learned score",
    "confidence-threshold": "one threshold on the raw confidence",
    "oracle": "oracle that routes (knows correctness)",
    "oracle-sequential": "oracle that stops (knows correctness)",
}
"""Policies by key, in the order of a report."""

ROUTING_STAGES = 5
"""Cascade-routing has 2^L sets of stages to learn; it is left out for more stages than this."""

_THRESHOLDS = 41


def shapes(stages: int) -> tuple[Shape, ...]:
    """Give the learned rules for so many stages."""
    return ("sequential", "routing") if stages <= ROUTING_STAGES else ("sequential",)


def sets_needed(stages: int) -> tuple[Ran, ...]:
    """Give every set of stages after which a posterior is wanted."""
    return tuple(dict.fromkeys(ran for shape in shapes(stages) for ran in information_sets(stages, shape)))


def choices(table: QualityTable, folds: Sequence[Fold], lambdas: Sequence[float]) -> dict[str, tuple[Choice, ...]]:
    """Give what each policy does on every item (out of fold) at each lambda.

    A policy that learns or is tuned does so on the training items of a fold and acts on the held-out ones.
    """
    per_fold = [_fold_choices(table, fold, lambdas) for fold in folds]
    found = {
        name: tuple(_joined(table, folds, [one[name][at] for one in per_fold]) for at in range(len(lambdas)))
        for name in per_fold[0]
    }
    found["oracle"] = tuple(_oracle(table, lam, sequential=False) for lam in lambdas)
    found["oracle-sequential"] = tuple(_oracle(table, lam, sequential=True) for lam in lambdas)
    return {name: found[name] for name in TITLES if name in found}


def _fold_choices(table: QualityTable, fold: Fold, lambdas: Sequence[float]) -> dict[str, list[Choice]]:
    stages = len(table.stages)
    train = table.subset(fold.train)
    found: dict[str, list[Choice]] = {}
    for shape in shapes(stages):
        rule = learn({ran: fold.trained[ran] for ran in information_sets(stages, shape)}, train, shape)
        name = "sequential" if shape == "sequential" else "cascade-routing"
        found[name] = [rule.choose(fold.unseen, lam) for lam in lambdas]
    prior, mean_cost = fold.unseen[()], train.cost.mean(axis=0)
    found["route-once"] = [_alone(np.argmax(lam * prior - mean_cost, axis=1), stages) for lam in lambdas]
    trained, unseen = _scores(fold.trained, stages), _scores(fold.unseen, stages)
    found["score-threshold"] = _thresholds(train, trained, unseen, lambdas)
    confidence = table.signals.get("confidence")
    if confidence is not None and np.isfinite(confidence[:, :-1]).all():
        scores = (confidence[fold.train], confidence[fold.held])
        found["confidence-threshold"] = _thresholds(train, *scores, lambdas)
    return found


def _scores(posteriors: Mapping[Ran, Floats], stages: int) -> Floats:
    """The learned score of each stage's own answer once it ran in order, (items, stages)."""
    return np.stack([posteriors[tuple(range(i + 1))][:, i] for i in range(stages)], axis=1)


def _thresholds(train: QualityTable, trained: Floats, unseen: Floats, lambdas: Sequence[float]) -> list[Choice]:
    """Stop at the first stage whose score reaches one threshold for all stages (in the manner of FrugalGPT, Chen et
    al. 2023, which has one for each stage), the threshold of highest utility on the training items at each lambda."""
    early = trained[:, :-1]
    levels = np.unique(np.quantile(early, np.linspace(0, 1, _THRESHOLDS)))
    levels = np.append(levels, np.inf)  # never stop early
    stops = [_first_reaching(trained, level) for level in levels]
    rows = np.arange(len(trained))
    paid = train.spent_in_order()
    quality = np.array([train.correct[rows, stop].mean() for stop in stops])
    cost = np.array([paid[rows, stop].mean() for stop in stops])
    best = [levels[int(np.argmax(lam * quality - cost))] for lam in lambdas]
    return [_in_order(_first_reaching(unseen, level), unseen.shape[1]) for level in best]


def _first_reaching(scores: Floats, level: float) -> Ints:
    """The first stage whose score is at least `level`; the last where none is."""
    reached = scores >= level
    reached[:, -1] = True
    return np.asarray(np.argmax(reached, axis=1), dtype=np.int64)


def _in_order(last: Ints, stages: int) -> Choice:
    """Stages run in order up to `last`, whose answer goes out."""
    return Choice(np.arange(stages) <= last[:, None], last)


def _alone(stage: Ints, stages: int) -> Choice:
    """One stage alone runs."""
    return Choice(np.arange(stages) == stage[:, None], stage)


def _oracle(table: QualityTable, lam: float, *, sequential: bool) -> Choice:
    """The best that can be done on each item with its correctness and costs known."""
    paid = table.spent_in_order() if sequential else table.cost
    best = np.argmax(lam * table.correct - paid, axis=1)
    return _in_order(best, len(table.stages)) if sequential else _alone(best, len(table.stages))


def _joined(table: QualityTable, folds: Sequence[Fold], parts: Sequence[Choice]) -> Choice:
    """The held-out items of all folds in the order of the table."""
    ran = np.zeros(table.correct.shape, dtype=np.bool_)
    answer = np.zeros(len(table.items), dtype=np.int64)
    for fold, part in zip(folds, parts, strict=True):
        ran[fold.held], answer[fold.held] = part.ran, part.answer
    return Choice(ran, answer)


def outcome(table: QualityTable, choice: Choice) -> tuple[Floats, Floats]:
    """Give quality and cost of every item under `choice`: looked up, since every stage ran on every item."""
    quality = table.correct[np.arange(len(table.items)), choice.answer]
    return quality, table.spent(choice.ran)


NO_BOUNDS: Bounds = (None, None)


def evaluate(
    table: QualityTable,
    name: str,
    done: Sequence[Choice],
    grid: Sequence[float],
    bootstrap: ClusterBootstrap,
    gains: Mapping[tuple[str, float], Bounds],
    mean_gains: Mapping[str, Bounds],
) -> PolicyCurve:
    """Give the curve of policy `name`, which did `done` at each lambda of `grid`.

    All points at once, so that the resampled items are summed once. `gains` and `mean_gains`: those of
    `together.Together`.
    """
    stages = len(table.stages)
    columns = [_columns(table, choice, lam) for choice, lam in zip(done, grid, strict=True)]
    width = columns[0].shape[1]

    def statistic(rows: Floats) -> Floats:
        mean = means(rows)
        alone = mean[..., : 2 * stages]
        parts = [
            _statistics(mean[..., 2 * stages + k * width :][..., :width], alone, lam, best_fixed(table, lam))
            for k, lam in enumerate(grid)
        ]
        gains = np.stack([part[..., 3] / lam for part, lam in zip(parts, grid, strict=True)], axis=-1)
        return np.concatenate([*parts, gains.mean(axis=-1, keepdims=True)], axis=-1)

    found = bootstrap.estimates(statistic, sums(table.correct, table.cost, *columns))
    each = len(found) // len(grid)
    points = []
    for k, lam in enumerate(grid):
        mine = found[k * each : (k + 1) * each]
        shares = tuple(one.bounded(len(table.items)) for one in mine[6:])
        quality, cost, utility, gain, mixing, closed = mine[:6]
        ran = shares[stages:]
        beyond = _bounded(gain, gains.get((name, lam), NO_BOUNDS), lam)
        points.append(
            PolicyPoint(
                lam=lam,
                quality=quality,
                cost=cost,
                utility=utility,
                gain=gain,
                gain_together=beyond,
                over_mixing=mixing,
                gap_closed=closed,
                answered=shares[:stages],
                ran=ran,
            )
        )
    mean = found[-1]
    return PolicyCurve(name, TITLES[name], tuple(points), mean, _bounded(mean, mean_gains.get(name, NO_BOUNDS)))


def _bounded(value: Estimate, bounds: Bounds, scale: float = 1.0) -> Estimate:
    """The same value with other bounds, times `scale`."""
    low, high = (None if one is None else number(one * scale) for one in bounds)
    return replace(value, low=low, high=high)


def _columns(table: QualityTable, choice: Choice, lam: float) -> Floats:
    """Per item: quality, cost, utility of the oracle that routes, then which stage answers, then which run."""
    quality, cost = outcome(table, choice)
    oracle = (lam * table.correct - table.cost).max(axis=1)
    answered = np.arange(len(table.stages)) == choice.answer[:, None]
    return np.column_stack([quality, cost, oracle, answered, choice.ran])


def _statistics(mean: Floats, alone: Floats, lam: float, best: int) -> Floats:
    """From means over items to quality, cost, utility, gain, quality over mixing, gap closed, and shares."""
    q, c, top = mean[..., 0], mean[..., 1], mean[..., 2]
    each, price = np.split(alone, 2, axis=-1)
    gain = lam * (q - each[..., best]) - (c - price[..., best])
    reach = top - (lam * each[..., best] - price[..., best])
    closed = np.where(reach > 1e-9 * lam, gain / reach, np.nan)
    mixed = q - mixing_quality(price, each, c)
    return np.concatenate([np.stack([q, c, lam * q - c, gain, mixed, closed], axis=-1), mean[..., 3:]], axis=-1)


def best_fixed(table: QualityTable, lam: float) -> int:
    """Give the stage whose utility is highest when it runs alone on every item, in hindsight."""
    return int(np.argmax(lam * table.correct.mean(axis=0) - table.cost.mean(axis=0)))


def sums(*columns: Floats) -> Floats:
    """Give columns for `means`: the values and, last, a 1 to count items."""
    return np.column_stack([*columns, np.ones(len(columns[0]))])


def means(rows: Floats) -> Floats:
    """Give means over items from sums over them."""
    return np.asarray(rows[..., :-1] / rows[..., -1:], dtype=np.float64)
