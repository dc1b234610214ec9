"""Posteriors out of fold: nobody's answer is judged by a predictor, a calibration or a rule that has seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from analysis.cascade.predictor import (
    KINDS,
    Kind,
    Predictor,
    calibrate,
    calibrated,
    features,
    fit_predictor,
    log_loss,
)
from analysis.cascade.stopping import Ran
from analysis.cascade.table import QualityTable
from calibration.common.arrays import Floats, Ints

FOLDS = 5
"""Folds of items; each is held out once."""

INNER = 4
"""Folds within the training items: they choose the form, fit the calibration, and give a rule its posteriors."""

Columns = Mapping[Ran, tuple[tuple[str, ...], Floats]]


@dataclass(frozen=True, eq=False)
class Fold:
    """One split. Posteriors (items, stages) by the stages that ran: of `train`, cross-fitted; of `held`, unseen.

    `kinds`: the form chosen after 0, 1, ... stages; `losses`: the log loss of each form there.
    """

    train: Ints
    held: Ints
    kinds: tuple[Kind, ...]
    losses: tuple[Mapping[Kind, float], ...]
    trained: Mapping[Ran, Floats]
    unseen: Mapping[Ran, Floats]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Predictors fitted on some items, by the stages that ran, with cross-fitted posteriors of the same items."""

    kinds: tuple[Kind, ...]
    losses: tuple[Mapping[Kind, float], ...]
    predictors: Mapping[Ran, Predictor]
    posteriors: Mapping[Ran, Floats]


def split(domains: Sequence[str], parts: int, rng: Generator) -> Ints:
    """Give each item one of `parts` folds at random, evenly within every domain."""
    fold = np.zeros(len(domains), dtype=np.int64)
    labels = np.asarray(domains, dtype=object)
    begin = 0
    for domain in sorted(set(domains)):
        rows = rng.permutation(np.flatnonzero(labels == domain))
        fold[rows] = (begin + np.arange(len(rows))) % parts
        begin += len(rows)
    return fold


def crossfit(table: QualityTable, sets: Sequence[Ran], seed: int, *, known_domain: bool) -> tuple[Fold, ...]:
    """Give the folds of `table` with posteriors after each of the `sets` of stages.

    The form (logistic or network) is chosen within the training items of each fold, by log loss, for each number of
    stages that ran: on the first ones, in order.
    """
    columns = {ran: features(table, ran, known_domain=known_domain) for ran in sets}
    place = split(table.domains, FOLDS, np.random.default_rng(seed))
    folds = []
    for k in range(FOLDS):
        train, held = np.flatnonzero(place != k), np.flatnonzero(place == k)
        fitted = fit(table, columns, train, seed + k)
        unseen = {ran: fitted.predictors[ran](x[held]) for ran, (_, x) in columns.items()}
        folds.append(Fold(train, held, fitted.kinds, fitted.losses, fitted.posteriors, unseen))
    return tuple(folds)


def fit(table: QualityTable, columns: Columns, train: Ints, seed: int) -> Fitted:
    """Fit the predictors after each set of stages on the items `train`."""
    y = table.correct[train]
    place = split([table.domains[i] for i in train], INNER, np.random.default_rng(seed))
    kinds: list[Kind] = []
    losses: list[Mapping[Kind, float]] = []
    logits: dict[Ran, Floats] = {}
    for ran in _prefixes(columns):
        each = {kind: _crossed(columns[ran], y, train, place, kind, seed) for kind in KINDS}
        losses.append({kind: _loss(z, y) for kind, z in each.items()})
        kinds.append(min(KINDS, key=lambda one: losses[-1][one]))
        logits[ran] = each[kinds[-1]]
    predictors, posteriors = {}, {}
    for ran, (names, x) in columns.items():
        kind = kinds[len(ran)]
        crossed = logits[ran] if ran in logits else _crossed(columns[ran], y, train, place, kind, seed)
        predictor = calibrate(fit_predictor(names, x[train], y, kind, seed), crossed, y)
        predictors[ran] = predictor
        posteriors[ran] = calibrated(crossed, predictor.slope, predictor.offset)
    return Fitted(tuple(kinds), tuple(losses), predictors, posteriors)


def _prefixes(columns: Columns) -> list[Ran]:
    """The sets of stages that ran in order, shortest first."""
    return sorted((ran for ran in columns if ran == tuple(range(len(ran)))), key=len)


def _crossed(
    column: tuple[tuple[str, ...], Floats], y: Floats, train: Ints, place: Ints, kind: Kind, seed: int
) -> Floats:
    """Logits of the training items, each from a predictor fitted without its inner fold."""
    names, x = column[0], column[1][train]
    logits = np.zeros_like(y)
    for k in range(INNER):
        inside = place != k
        logits[~inside] = fit_predictor(names, x[inside], y[inside], kind, seed).logits(x[~inside])
    return logits


def _loss(logits: Floats, y: Floats) -> float:
    """Mean log loss over items and stages."""
    return float(log_loss(calibrated(logits, (1.0,), (0.0,)), y).mean())
