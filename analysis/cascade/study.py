"""The study of a cascade: predictor, learned policies, baselines and oracles on one table, out of fold.

The one policy and the one point of a study that an answer names.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.cascade.curves import best_fixed, choices, evaluate, means, outcome, sets_needed, sums
from analysis.cascade.findings import (
    CascadeFindings,
    FormLoss,
    Headline,
    PolicyCurve,
    StageRange,
    StageScores,
    StageSummary,
)
from analysis.cascade.predictor import FOLDS, KINDS, Fold, crossfit
from analysis.cascade.published import published_facts, switch_points
from analysis.cascade.rules import Choice
from analysis.cascade.scores import Together, score
from analysis.cascade.table import QualityTable
from analysis.common.bootstrap import DRAWS, ClusterBootstrap, Estimate, number
from analysis.common.threads import one_thread
from calibration.common.errors import ConvergenceWarning, ReplayError

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
        policy=curve.policy,
        mean_gain=curve.mean_gain,
        mean_gain_together=mean,
        pays=mean.low is not None and mean.low > 0,
        lam=point.lam,
        best_stage=table.stages[best_fixed(table, point.lam)],
        gain=point.gain,
        gain_together=point.gain_together,
        saving=saving,
        saving_quality=quality,
        saving_lam=lam,
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


FEWEST_ITEMS = 60
"""Items that a study needs at least: twelve to hold out in each fold."""

USED, SHARED = 0.01, 0.05
"""A stage is used where it answers this share of items; a cascade shares work where two answer the second share."""


@one_thread
def study_cascade(
    table: QualityTable,
    lambdas: Sequence[float] | None = None,
    seed: int = 0,
    *,
    known_domain: bool = False,
    draws: int = DRAWS,
) -> CascadeFindings:
    """Study the cascade in `table` at `lambdas` (by default a grid over all that matter).

    `known_domain`: the domain of an item is known before any stage runs. Policies are evaluated by exact
    counterfactual on held-out items; intervals resample items within each domain and keep the fits. Raises
    `ReplayError` for too few items or a lambda that is not above 0.
    """
    if len(table.items) < FEWEST_ITEMS:
        raise ReplayError(
            f"{table.name}: needs {FEWEST_ITEMS} items or more to fit and to hold out, got {len(table.items)}"
        )
    grid = default_lambdas(table) if lambdas is None else tuple(sorted({float(lam) for lam in lambdas}))
    _check_lambdas(grid)
    bootstrap = ClusterBootstrap(table.domains, np.random.default_rng(seed), draws=draws)
    folds = crossfit(table, sets_needed(len(table.stages)), seed, known_domain=known_domain)
    done = choices(table, folds, grid)
    together = Together(table, done, grid, bootstrap)
    judged = together.gains(), together.mean_gains()
    curves = tuple(evaluate(table, name, done[name], grid, bootstrap, *judged) for name in done)
    mean_cost, mean_quality = table.cost.mean(axis=0), table.correct.mean(axis=0)
    in_order = table.spent_in_order().mean(axis=0)
    degenerate = _degenerate(next(curve for curve in curves if curve.policy == "sequential"))
    if degenerate:
        rule = f"no lambda of the grid lets two stages answer {SHARED:.0%} of the items each"
        warnings.warn(f"{table.name}: sequential cascade: {rule}", ConvergenceWarning, stacklevel=2)
    return CascadeFindings(
        name=table.name,
        label=table.label,
        items=len(table.items),
        domains=dict(sorted(Counter(table.domains).items())),
        stages=_stages(table, bootstrap),
        signals=tuple(table.signals),
        item_features=tuple(table.item_features),
        known_domain=known_domain,
        continued=table.continued,
        lambdas=grid,
        seed=seed,
        draws=draws,
        folds=FOLDS,
        forms=_forms(folds),
        scores=_scores(table, folds, bootstrap),
        policies=curves,
        best=together.best_at(),
        ranges=tuple(one for curve in curves if curve.policy in LEARNED for one in _ranges(table, curve)),
        switches_once=switch_points(mean_cost.tolist(), mean_quality.tolist()),
        switches_sequential=switch_points(in_order.tolist(), mean_quality.tolist()),
        degenerate=degenerate,
        headline=find_headline(table, curves, done, bootstrap),
        published=published_facts(),
    )


def _check_lambdas(grid: Sequence[float]) -> None:
    if not grid or not all(0 < lam < np.inf for lam in grid):
        raise ReplayError(f"lambda: must be above 0 and finite, got {', '.join(map(str, grid)) or 'none'}")


@one_thread
def runs_at(table: QualityTable, lam: float, seed: int = 0, *, known_domain: bool = False) -> dict[str, Choice]:
    """Give what each learned policy does on every item, out of fold, at `lam`: that of the study with this seed."""
    _check_lambdas((lam,))
    folds = crossfit(table, sets_needed(len(table.stages)), seed, known_domain=known_domain)
    done = choices(table, folds, (lam,))
    return {name: done[name][0] for name in LEARNED if name in done}


def default_lambdas(table: QualityTable, count: int = 25) -> tuple[float, ...]:
    """Give a geometric grid: from where no stage can be worth a second run to where single stages no longer switch.

    Below the least that a further stage costs nothing is worth running on: the lower end is half of that. The upper
    end is three times the last switch of stages run in order, and at least ten times the cost of all stages.
    """
    paid, quality = table.spent_in_order().mean(axis=0), table.correct.mean(axis=0)
    steps = np.diff(paid, prepend=0.0)
    low = float(steps[steps > 0].min()) / 2
    last = switch_points(paid.tolist(), quality.tolist())[-1].from_lambda
    high = max(3 * last, 10 * float(paid[-1]))
    return tuple(float(f"{lam:.3g}") for lam in np.geomspace(low, high, count))


def _stages(table: QualityTable, bootstrap: ClusterBootstrap) -> tuple[StageSummary, ...]:
    found = []
    for at, name in enumerate(table.stages):
        quality, cost = bootstrap.estimates(means, sums(table.correct[:, at], table.cost[:, at]))
        found.append(StageSummary(name, quality, cost))
    return tuple(found)


def _forms(folds: Sequence[Fold]) -> tuple[FormLoss, ...]:
    return tuple(
        FormLoss(
            after,
            kind,
            number(float(np.mean([fold.losses[after][kind] for fold in folds]))) or 0.0,
            sum(fold.kinds[after] == kind for fold in folds),
        )
        for after in range(len(folds[0].kinds))
        for kind in KINDS
    )


def _scores(table: QualityTable, folds: Sequence[Fold], bootstrap: ClusterBootstrap) -> tuple[StageScores, ...]:
    """Scores of every stage's correctness after each prefix of stages; nothing run included."""
    found = []
    base, place = np.empty_like(table.correct), np.empty(len(table.items), dtype=np.int64)
    for k, fold in enumerate(folds):
        place[fold.held] = k
        base[fold.held] = table.correct[fold.train].mean(axis=0)
    for after in range(len(table.stages) + 1):
        p = np.empty_like(table.correct)
        for fold in folds:
            p[fold.held] = fold.unseen[tuple(range(after))]
        for at in range(max(0, after - 1), len(table.stages)):
            columns = (p[:, at], base[:, at], table.correct[:, at])
            found.append(score(table.stages[at], after, *columns, place, bootstrap))
    return tuple(found)


def _ranges(table: QualityTable, curve: PolicyCurve) -> list[StageRange]:
    found = []
    for at, stage in enumerate(table.stages):
        shares = [(point.answered[at].value or 0.0, point.lam) for point in curve.points]
        used = [lam for share, lam in shares if share >= USED]
        most, where = max(shares, key=lambda one: (one[0], -one[1]))
        first, last = (used[0], used[-1]) if used else (None, None)
        found.append(
            StageRange(
                policy=curve.policy,
                stage=stage,
                from_lambda=first,
                to_lambda=last,
                edge=last == curve.points[-1].lam,
                most_share=most,
                most_at_lambda=where,
            )
        )
    return found


def _degenerate(curve: PolicyCurve) -> bool:
    """Whether no lambda lets two stages answer a share of items each."""
    return not any(sum((s.value or 0) >= SHARED for s in point.answered) >= 2 for point in curve.points)
