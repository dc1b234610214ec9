"""Which domain a prompt belongs to, as calibrated probabilities out of fold, and the drafter that promises most.

Multinomial logistic regression on log-scaled, inverse-document-weighted token counts (scikit-learn), its logits
divided by a temperature that is fitted by cross-validation inside the training folds (Guo et al. 2017). A drafter is
chosen by expected cost, sum over domains of P(domain | prompt) * seconds a token of the drafter there, both learned
without the prompt: not by the likeliest domain. Capability vectors instead of one label are Model-SAT's idea (2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from analysis.common.bootstrap import ClusterBootstrap, Estimate, number
from analysis.routing.findings import ClassifierQuality, ReliabilityBin
from calibration.common.arrays import Floats, Ints

_BINS = 5
"""Bins of the reliability plot, of equally many prompts."""
_STRENGTH = 10.0
"""Inverse strength of the ridge penalty (scikit-learn's C)."""


@dataclass(frozen=True)
class Guesses:
    """Out-of-fold probabilities of each domain, shape (prompts, classes), and what they were made with."""

    classes: tuple[str, ...]
    labels: Ints
    probability: Floats
    uncalibrated: Floats
    fold: Ints
    temperatures: tuple[float, ...]


def folds(labels: Ints, groups: Ints, parts: int, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Give (training rows, held-out rows); equal prompts stay together, domains are spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    yield from splitter.split(np.zeros((len(labels), 1)), labels, groups)


def possible_folds(labels: Ints, groups: Ints, wanted: int) -> int:
    """Give the folds that leave every domain in training: at most its different prompts; below 2, none."""
    kinds = [len(set(groups[labels == label].tolist())) for label in set(labels.tolist())]
    return min(wanted, *kinds) if len(kinds) > 1 else 0


def guess(counts: csr_matrix, domains: Sequence[str], groups: Ints, parts: int, seed: int) -> Guesses:
    """Classify every prompt by a model that was trained without its fold. `counts`: (prompts, tokens)."""
    classes, labels = np.unique(np.asarray(domains), return_inverse=True)
    fold = np.zeros(len(labels), dtype=np.int64)
    logits = np.zeros((len(labels), len(classes)))
    scaled = logits.copy()
    temperatures = []
    for index, (train, held) in enumerate(folds(labels, groups, parts, seed)):
        raw, temperature = fit_predict(
            counts=counts, labels=labels, groups=groups, train=train, held=held, classes=len(classes), seed=seed
        )
        fold[held], logits[held], scaled[held] = index, raw, raw / temperature
        temperatures.append(number(temperature) or 1.0)
    return Guesses(
        tuple(str(name) for name in classes),
        labels.astype(np.int64),
        _softmax(scaled),
        _softmax(logits),
        fold,
        tuple(temperatures),
    )


def fit_predict(
    counts: csr_matrix, labels: Ints, groups: Ints, train: Ints, held: Ints, classes: int, seed: int
) -> tuple[Floats, float]:
    """Give (logits of the rows `held`, temperature), learned from the rows `train` alone.

    Domains that are not in training get a logit that says never. The temperature is fitted to logits out of fold
    within training; 1 where that has too few prompts.
    """
    inner = possible_folds(labels[train], groups[train], 3)
    temperature = 1.0
    if inner >= 2:
        out = np.zeros((len(train), classes))
        for fitted, left in folds(labels[train], groups[train], inner, seed):
            out[left] = _logits(counts[train[fitted]], labels[train[fitted]], counts[train[left]], classes)
        temperature = fit_temperature(out, labels[train])
    return _logits(counts[train], labels[train], counts[held], classes), temperature


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """Give the temperature in [1/20, 20] at which softmax(logits / T) has the least log loss on `labels`."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(_log_loss(_softmax(logits / np.exp(log_temperature)), labels).mean())

    bound = float(np.log(20))
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def quality(guesses: Guesses, bootstrap: ClusterBootstrap) -> ClassifierQuality:
    """Judge out-of-fold probabilities; intervals resample prompts."""
    labels, probability = guesses.labels, guesses.probability
    hit = (probability.argmax(axis=1) == labels).astype(np.float64)
    brier = ((probability - np.eye(len(guesses.classes))[labels]) ** 2).sum(axis=1)
    losses = [_log_loss(p, labels) for p in (probability, guesses.uncalibrated)]
    shares = np.bincount(labels) / len(labels)
    sums = np.column_stack([hit, *losses, brier, np.ones(len(labels))])
    accuracy, loss, raw, score = bootstrap.estimates(lambda s: s[..., :-1] / s[..., -1:], sums)
    bins = reliability(probability.max(axis=1), hit)
    error = sum(abs(b.confidence - (b.right.value or 0.0)) * b.right.requests for b in bins) / len(labels)
    return ClassifierQuality(
        folds=int(guesses.fold.max()) + 1,
        classes=guesses.classes,
        accuracy=accuracy.bounded(len(labels)),
        largest_share=number(float(shares.max())) or 0.0,
        log_loss=loss,
        log_loss_uncalibrated=raw,
        log_loss_shares=number(float(-(shares * np.log(shares)).sum())) or 0.0,
        brier=score,
        ece=number(error) or 0.0,
        temperatures=guesses.temperatures,
        reliability=bins,
    )


def reliability(confidence: Floats, hit: Floats) -> tuple[ReliabilityBin, ...]:
    """Give bins of equally many prompts by confidence; intervals by Clopper and Pearson 1934."""
    from statsmodels.stats.proportion import proportion_confint

    order = np.argsort(confidence, kind="stable")
    bins = []
    for rows in np.array_split(order, min(_BINS, len(order))):
        right = int(hit[rows].sum())
        low, high = proportion_confint(right, len(rows), method="beta")
        share = Estimate(number(right / len(rows)), number(float(low)), number(float(high)), len(rows))
        bins.append(ReliabilityBin(number(float(confidence[rows].mean())) or 0.0, share))
    return tuple(bins)


def cheapest(guesses: Guesses, seconds: Floats, tokens: Floats, *, certain: bool = False) -> Ints:
    """Give for each prompt the drafter of least expected seconds a token, shape (prompts,).

    `seconds` (prompts, drafters) and `tokens` (prompts,) are read on the training folds alone. `certain` takes the
    true domain for granted: what a perfect classifier would choose.
    """
    chosen = np.zeros(len(tokens), dtype=np.int64)
    known = np.eye(len(guesses.classes))[guesses.labels]
    belief = known if certain else guesses.probability
    for part in range(int(guesses.fold.max()) + 1):
        train, held = guesses.fold != part, guesses.fold == part
        per_token = seconds_per_token(known[train], seconds[train], tokens[train])
        chosen[held] = (belief[held] @ per_token).argmin(axis=1)
    return chosen


def seconds_per_token(member: Floats, seconds: Floats, tokens: Floats) -> Floats:
    """Give the seconds a token by domain and drafter; of all prompts together where a domain has none.

    `member`: one-hot domains, shape (prompts, domains); `seconds`: (prompts, drafters).
    """
    total = (member.T @ tokens)[:, None]
    pooled = seconds.sum(axis=0) / tokens.sum()
    return np.where(total > 0, (member.T @ seconds) / np.where(total > 0, total, 1.0), pooled)


def _logits(train: csr_matrix, labels: Ints, held: csr_matrix, classes: int) -> Floats:
    """Fit and give logits, shape (held, classes); -50 for classes that training lacks."""
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    known = np.unique(labels)
    out = np.full((held.shape[0], classes), -50.0)
    if len(known) == 1:
        out[:, known] = 0.0
        return out
    weigh = TfidfTransformer(sublinear_tf=True).fit(train)
    model = LogisticRegression(C=_STRENGTH, max_iter=2000).fit(weigh.transform(train), labels)
    found = model.decision_function(weigh.transform(held))
    out[:, known] = np.column_stack([np.zeros(len(found)), found]) if len(known) == 2 else found
    return out


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _log_loss(probability: Floats, labels: Ints) -> Floats:
    return np.asarray(-np.log(np.maximum(probability[np.arange(len(labels)), labels], 1e-15)))
