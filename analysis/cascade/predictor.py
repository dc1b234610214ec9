"""The quality predictor: chances that each stage is correct, from what has been seen, with monotone calibration.

Fitted by scikit-learn and kept as plain numbers, so that a written rule can be applied without it.

What is known of an item once some stages have run, as the columns of a predictor.

Posteriors out of fold: nobody's answer is judged by a predictor, a calibration or a rule that has seen it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator
from scipy.special import expit, logit

from analysis.cascade.stopping import Ran
from analysis.cascade.table import QualityTable
from calibration.common.arrays import Floats, Ints

MISSING = " missing"
"""Ends the name of a column that is 1 where another is missing."""


def features(table: QualityTable, ran: Ran, *, known_domain: bool) -> tuple[tuple[str, ...], Floats]:
    """Give names and values (items, features) of what is known after the stages `ran`; NaN where missing.

    Item features, then the signals of each stage that ran, named ``stage.signal``. Signals that a stage never has
    are left out; where one is missing on some items, a column ``... missing`` says so. `known_domain`: the domain is
    known before any stage runs, and enters as a column per domain.
    """
    columns: dict[str, Floats] = dict(table.item_features)
    if known_domain:
        for domain in sorted(set(table.domains)):
            columns[f"domain={domain}"] = np.array([d == domain for d in table.domains], dtype=np.float64)
    for stage in ran:
        for name, values in table.signals.items():
            columns[f"{table.stages[stage]}.{name}"] = values[:, stage]
    kept: dict[str, Floats] = {}
    for name, values in columns.items():
        absent = np.isnan(values)
        if absent.all():
            continue
        kept[name] = values
        if absent.any():
            kept[f"{name}{MISSING}"] = absent.astype(np.float64)
    if not kept:
        return (), np.empty((len(table.items), 0))
    return tuple(kept), np.stack(list(kept.values()), axis=1)


Kind = Literal["logistic", "network"]

KINDS: tuple[Kind, ...] = ("logistic", "network")
"""Logistic regression, and a network of one hidden layer; both on standardised columns, ridge penalties 1 and 5."""

HIDDEN = 8
"""Units of the hidden layer (tanh)."""

GRADES = 8
"""Copies of an item of graded correctness, correct where the grade is above (k + 1/2) / 8: right to 1/16."""

_ITERATIONS = 40
_RIDGE = 5.0
_EDGE = 1e-6


@dataclass(frozen=True)
class Layer:
    """Weights (inputs, outputs) and biases (outputs,) of one layer."""

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True)
class Predictor:
    """Columns -> chance of a correct answer for every stage.

    Missing values become `fill`; columns are standardised by `mean` and `scale`; layers follow with tanh between
    them; the last gives logits z; the calibrated chance of stage j is 1 / (1 + exp(-(slope_j z_j + offset_j))) with
    slope_j >= 0 (Platt 1999): order is never turned.
    """

    features: tuple[str, ...]
    fill: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    layers: tuple[Layer, ...]
    slope: tuple[float, ...]
    offset: tuple[float, ...]

    def logits(self, x: Floats) -> Floats:
        """Give logits before calibration, (n, stages)."""
        width = len(self.features)
        h = (np.where(np.isnan(x), np.reshape(self.fill, (1, width)), x) - self.mean) / np.asarray(self.scale)
        for at, layer in enumerate(self.layers):
            weights = np.asarray(layer.weights).reshape(h.shape[1], len(layer.bias))
            h = (np.tanh(h) if at else h) @ weights + np.asarray(layer.bias)
        return np.asarray(h, dtype=np.float64)

    def __call__(self, x: Floats) -> Floats:
        """Give calibrated chances (n, stages) from columns (n, features), NaN where missing."""
        return calibrated(self.logits(x), self.slope, self.offset)


def calibrated(logits: Floats, slope: tuple[float, ...], offset: tuple[float, ...]) -> Floats:
    """Give chances from logits by the sigmoid of each stage."""
    return np.asarray(expit(logits * np.asarray(slope) + np.asarray(offset)), dtype=np.float64)


def fit_predictor(names: tuple[str, ...], x: Floats, y: Floats, kind: Kind, seed: int) -> Predictor:
    """Fit a predictor to columns `x` (n, features) and correctness `y` (n, stages) in 0..1; not yet calibrated."""
    fill = np.array([np.nanmedian(c) if np.isfinite(c).any() else 0.0 for c in x.T])
    x = np.where(np.isnan(x), fill, x)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    z, labels, copies = _expanded((x - mean) / scale, y)
    layers: tuple[Layer, ...]
    if x.shape[1] == 0:
        layers = (Layer((), _numbers(_base_logit(y))),)
    elif kind == "logistic":
        layers = (_logistic(z, labels, copies),)
    else:
        layers = _network(z, labels, copies, seed)
    stages = y.shape[1]
    return Predictor(
        features=names,
        fill=_numbers(fill),
        mean=_numbers(mean),
        scale=_numbers(scale),
        layers=layers,
        slope=(1.0,) * stages,
        offset=(0.0,) * stages,
    )


def calibrate(predictor: Predictor, logits: Floats, y: Floats) -> Predictor:
    """Give `predictor` with sigmoids fitted to held-out `logits` (n, stages) and correctness `y`."""
    fits = [_sigmoid(logits[:, j], y[:, j]) for j in range(y.shape[1])]
    return replace(predictor, slope=tuple(a for a, _ in fits), offset=tuple(b for _, b in fits))


def log_loss(p: Floats, y: Floats) -> Floats:
    """Give -(y log p + (1 - y) log(1 - p)) in nats, element by element; p is kept off 0 and 1 by 1e-6."""
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def _numbers(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _base_logit(y: Floats) -> Floats:
    """Logit of the rate of each column, half an item off 0 and 1."""
    return np.asarray(logit((y.sum(axis=0) + 0.5) / (len(y) + 1)), dtype=np.float64)


def _expanded(x: Floats, y: Floats) -> tuple[Floats, Floats, int]:
    """Rows with labels of 0 and 1, and how many copies each item became."""
    if np.all((y == 0) | (y == 1)):
        return x, y, 1
    cuts = (np.arange(GRADES) + 0.5) / GRADES
    labels = (y[:, None, :] > cuts[:, None]).reshape(-1, y.shape[1]).astype(np.float64)
    return np.repeat(x, GRADES, axis=0), labels, GRADES


def _logistic(x: Floats, y: Floats, copies: int) -> Layer:
    weights, bias = np.zeros((x.shape[1], y.shape[1])), _base_logit(y)
    for j in range(y.shape[1]):
        if 0 < y[:, j].sum() < len(y):
            weights[:, j], bias[j] = _regression(x, y[:, j], 1.0 / copies)
    return _layer(weights, bias)


def _regression(x: Floats, y: Floats, strength: float) -> tuple[Floats, float]:
    """Weights and bias of a ridge logistic regression; Newton's method, for few columns."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time of a fit
        fitted = LogisticRegression(C=strength, solver="newton-cholesky", max_iter=100).fit(x, y)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _network(x: Floats, y: Floats, copies: int, seed: int) -> tuple[Layer, ...]:
    """One hidden layer; stopped after 40 iterations of L-BFGS, which regularises as the ridge does."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier(
        (HIDDEN,), activation="tanh", solver="lbfgs", alpha=_RIDGE * copies, max_iter=_ITERATIONS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(x, y.astype(np.int64))
    (first, last), (inner, outer) = network.coefs_, network.intercepts_
    fixed = (y.sum(axis=0) == 0) | (y.sum(axis=0) == len(y))  # nothing to learn: the base rate
    return _layer(first, inner), _layer(np.where(fixed, 0.0, last), np.where(fixed, _base_logit(y), outer))


def _layer(weights: Floats, bias: Floats) -> Layer:
    return Layer(tuple(_numbers(row) for row in weights), _numbers(bias))


def _sigmoid(z: Floats, y: Floats) -> tuple[float, float]:
    """Slope and offset of the sigmoid that makes logits `z` chances of `y`; slope 0 where z says nothing."""
    base = float(_base_logit(y[:, None])[0])
    if z.std() < 1e-9 or y.sum() in (0, len(y)):
        return 0.0, base
    rows, labels, copies = _expanded(z[:, None], y[:, None])
    (slope,), offset = _regression(rows, labels[:, 0], 10.0 / copies)
    return (float(slope), offset) if slope > 0 else (0.0, base)


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
