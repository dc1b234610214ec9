"""How well acceptance is foreseen on prompts that the regression has not seen: Brier score, calibration, AUROC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from analysis.common.bootstrap import ClusterBootstrap, Estimate, number
from analysis.tokens.rows import TokenRows
from calibration.common.arrays import Floats
from calibration.common.errors import ReportError

ROWS = 40_000
"""Rows that are scored; more are thinned, the same share of every prompt's."""

FOLDS = 5
BINS = 10
_AUROC_BINS = 400
"""Scores are sorted into so many equally full bins for the AUROC; ties within a bin count one half."""

_UNPENALISED = 30.0
"""Factor on columns whose coefficients the unit ridge penalty shall leave alone."""


@dataclass(frozen=True)
class CalibrationBin:
    """Tokens of like prediction: the mean prediction, the share that was accepted, and how many they are."""

    predicted: float
    observed: Estimate
    tokens: int


@dataclass(frozen=True)
class Score:
    """How one predictor does on held-out tokens; intervals over prompts.

    ``brier`` is the mean of (prediction - accepted)^2 (Brier 1950), ``skill`` 1 - Brier / Brier of the base rate,
    ``gain`` the Brier score of raw confidence less this one (positive: better), paired. ``ece`` is the mean absolute
    gap between predicted and observed over the bins (biased upwards by chance). ``auroc`` is the probability that an
    accepted token is scored above a rejected one (by definition one half for the base rate). ``calibration``: ten
    equally full bins.
    """

    predictor: str
    known: str
    tokens: int
    brier: Estimate
    skill: Estimate
    gain: Estimate
    ece: Estimate
    auroc: Estimate
    calibration: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class HeldOut:
    """Scores of all predictors: on every token, and (``later``) on the second half of every output.

    The predictors of ``later`` include one that was also fitted to the first half of the same output: what knowing
    the prompt is worth.
    """

    folds: int
    prompts: int
    scores: tuple[Score, ...]
    later: tuple[Score, ...]

    def score(self, predictor: str, *, later: bool = False) -> Score:
        """Give the score of `predictor`. Raises `KeyError` where it was not scored."""
        return {each.predictor: each for each in (self.later if later else self.scores)}[predictor]


BASE, BY_DRAFTER, CONFIDENCE = "base rate", "rate of the drafter", "raw confidence"
NEW_PROMPT, NEW_DRAFTER, SEEN_PROMPT = "regression", "regression, new drafter", "regression, prompt seen"

_KNOWN = {
    BASE: "nothing",
    BY_DRAFTER: "the drafter",
    CONFIDENCE: "confidence alone",
    NEW_PROMPT: "features, domain and drafter; a new prompt",
    NEW_DRAFTER: "features and domain; a new prompt and a new drafter",
    SEEN_PROMPT: "features, domain, drafter, and the first half of the output",
}


def hold_out(rows: TokenRows, rng: Generator, *, prompt_sd: float | None = None) -> HeldOut:
    """Score predictors of acceptance on held-out prompts, five folds of whole prompts.

    `prompt_sd` is the standard deviation of the prompt's effect in log-odds, the prior of the effect of a seen prompt
    (0.5 where unknown). The regression is logistic (scikit-learn), in the features, the domain and the drafter; for a
    new drafter that drafter's tokens are left out as well. Raises `ReportError` for fewer than five prompts.
    """
    some = rows.thinned(ROWS, rng)
    prompts = len(np.unique(some.prompt))
    if prompts < FOLDS:
        raise ReportError(f"held-out scores: need {FOLDS} prompts at least, got {prompts}")
    later = _second_half(some)
    predicted = _predictions(some, later, prompt_sd or 0.5)
    domains = _domain_of_prompt(some)
    used = np.unique(some.prompt, return_inverse=True)[1]
    bootstrap = ClusterBootstrap(domains, rng)
    whole = [n for n in predicted if n != SEEN_PROMPT]
    return HeldOut(
        FOLDS,
        prompts,
        _scores({n: predicted[n] for n in whole}, some.accepted, used, bootstrap),
        _scores({n: p[later] for n, p in predicted.items()}, some.accepted[later], used[later], bootstrap),
    )


def _domain_of_prompt(rows: TokenRows) -> list[str]:
    first = np.unique(rows.prompt, return_index=True)[1]
    return [rows.domains[code] for code in rows.domain[first]]


def _second_half(rows: TokenRows) -> NDArray[np.bool_]:
    """Tokens beyond the middle of the positions drafted in their output."""
    last = np.zeros(len(rows.prompts))
    np.maximum.at(last, rows.prompt, rows.position)
    return np.asarray(rows.position > last[rows.prompt] / 2)


def _features(rows: TokenRows) -> dict[str, Floats]:
    """Blocks of columns, standardised over all rows; the standardisation sees no outcome."""
    sd = rows.numeric.std(axis=0)
    numeric = (rows.numeric - rows.numeric.mean(axis=0)) / np.where(sd > 1e-9, sd, 1.0)
    felt = np.clip(rows.numeric[:, 0], 1e-4, 1 - 1e-4)
    log_odds = np.log(felt / (1 - felt))[:, None]
    return {
        "numeric": np.concatenate([numeric, log_odds / max(float(log_odds.std()), 1e-9)], axis=1),
        "domain": _one_hot(rows.domain),
        "drafter": _one_hot(rows.drafter),
    }


def _one_hot(index: NDArray[Any]) -> Floats:
    labels, place = np.unique(index, return_inverse=True)
    return np.asarray(np.eye(len(labels))[place])


def _predictions(rows: TokenRows, later: NDArray[np.bool_], prompt_sd: float) -> dict[str, Floats]:
    """Out-of-fold predictions by predictor; `SEEN_PROMPT` holds those of the later tokens alone, else NaN."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.model_selection import GroupKFold

    y = rows.accepted.astype(int)
    blocks = _features(rows)
    plain = np.concatenate([blocks["numeric"], blocks["domain"]], axis=1) * _UNPENALISED
    full = np.concatenate([plain, blocks["drafter"] * _UNPENALISED], axis=1)
    seen = hstack([csr_matrix(full), csr_matrix(_one_hot(rows.prompt) * prompt_sd)], format="csr")
    out = {name: np.full(len(rows), np.nan) for name in _KNOWN}
    out[CONFIDENCE] = rows.numeric[:, 0].copy()
    for train, test in GroupKFold(FOLDS).split(full, y, rows.prompt):
        out[BASE][test] = y[train].mean()
        out[BY_DRAFTER][test] = _rates(rows.drafter[train], y[train])[rows.drafter[test]]
        out[NEW_PROMPT][test] = _fitted(full[train], y[train])(full[test])
        first = np.concatenate([train, test[~later[test]]])
        out[SEEN_PROMPT][test[later[test]]] = _fitted(seen[first], y[first])(seen[test[later[test]]])
        for drafter in np.unique(rows.drafter):
            others, mine = train[rows.drafter[train] != drafter], test[rows.drafter[test] == drafter]
            if len(others) and len(mine):
                out[NEW_DRAFTER][mine] = _fitted(plain[others], y[others])(plain[mine])
    return {name: p for name, p in out.items() if not (name == NEW_DRAFTER and np.isnan(p).any())}


def _rates(index: NDArray[Any], y: NDArray[Any]) -> Floats:
    counts = np.bincount(index, minlength=index.max() + 1)
    return np.asarray(np.bincount(index, weights=y, minlength=index.max() + 1) / np.maximum(counts, 1))


def _fitted(x: Any, y: NDArray[Any]) -> Callable[[Any], Floats]:
    """Logistic regression with a unit ridge penalty: the normal prior of a prompt's effect, in units of its SD."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y)) < 2:
        rate = float(y.mean())
        return lambda rows: np.full(rows.shape[0], rate)
    model = LogisticRegression(C=1.0, solver="newton-cholesky", max_iter=100)
    model.fit(x.toarray() if hasattr(x, "toarray") else x, y)
    return lambda rows: np.asarray(model.predict_proba(rows)[:, 1])


def _scores(
    predicted: Mapping[str, Floats], accepted: NDArray[np.bool_], prompt: NDArray[Any], bootstrap: ClusterBootstrap
) -> tuple[Score, ...]:
    y = accepted.astype(float)
    base, raw = ((predicted[name] - y) ** 2 for name in (BASE, CONFIDENCE))
    found = []
    for name, p in predicted.items():
        squared = (p - y) ** 2
        brier, skill, gain = bootstrap.estimates(
            lambda s: np.stack(
                [s[..., 1] / s[..., 0], 1 - s[..., 1] / s[..., 2], (s[..., 3] - s[..., 1]) / s[..., 0]], axis=-1
            ),
            _by_prompt(prompt, bootstrap, [np.ones(len(y)), squared, base, raw]),
        )
        calibration, ece = _calibration(p, y, prompt, bootstrap)
        auroc = Estimate(0.5, None, None, brier.requests) if name == BASE else _auroc(p, y, prompt, bootstrap)
        found.append(
            Score(
                predictor=name,
                known=_KNOWN[name],
                tokens=len(y),
                brier=brier,
                skill=skill,
                gain=gain,
                ece=ece,
                auroc=auroc,
                calibration=calibration,
            )
        )
    return tuple(found)


def _by_prompt(prompt: NDArray[Any], bootstrap: ClusterBootstrap, columns: list[Floats]) -> Floats:
    count = len(bootstrap.request_domains)
    return np.stack([np.bincount(prompt, weights=c, minlength=count) for c in columns], axis=1)


def _bins(p: Floats, count: int) -> NDArray[Any]:
    """Index of the equally full bin of each prediction; equal predictions share a bin."""
    edges = np.unique(np.quantile(p, np.linspace(0, 1, count + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)[1]


def _spread(prompt: NDArray[Any], bins: NDArray[Any], bootstrap: ClusterBootstrap, values: Floats) -> Floats:
    """Sums of `values` by prompt and bin: shape (prompts, bins)."""
    count, width = len(bootstrap.request_domains), int(bins.max()) + 1
    flat = np.bincount(prompt * width + bins, weights=values, minlength=count * width)
    return np.asarray(flat.reshape(count, width), dtype=np.float64)


def _calibration(
    p: Floats, y: Floats, prompt: NDArray[Any], bootstrap: ClusterBootstrap
) -> tuple[tuple[CalibrationBin, ...], Estimate]:
    bins = _bins(p, BINS)
    width = int(bins.max()) + 1
    tokens, accepted, predicted = (_spread(prompt, bins, bootstrap, v) for v in (np.ones_like(p), y, p))
    sums = np.concatenate([tokens, accepted, predicted], axis=1)

    def observed(s: Floats) -> Floats:
        n, hits, _ = np.split(s, 3, axis=-1)
        return np.asarray(hits / n)

    def error(s: Floats) -> Floats:
        n, hits, wanted = np.split(s, 3, axis=-1)
        return np.asarray(np.abs(hits - wanted).sum(axis=-1, keepdims=True) / n.sum(axis=-1, keepdims=True))

    points = bootstrap.estimates(observed, sums)
    (ece,) = bootstrap.estimates(error, sums)
    total = tokens.sum(axis=0)
    return (
        tuple(
            CalibrationBin(
                number(float(predicted[:, i].sum() / total[i])) or 0.0,
                points[i].bounded(int(np.count_nonzero(tokens[:, i]))),
                int(total[i]),
            )
            for i in range(width)
        ),
        ece,
    )


def _auroc(p: Floats, y: Floats, prompt: NDArray[Any], bootstrap: ClusterBootstrap) -> Estimate:
    """Area under the ROC curve of the binned predictions: pairs in one bin count one half (Mann and Whitney)."""
    bins = _bins(p, _AUROC_BINS)
    hits, misses = (_spread(prompt, bins, bootstrap, v) for v in (y, 1 - y))

    def area(s: Floats) -> Floats:
        good, bad = np.split(s, 2, axis=-1)
        below = np.cumsum(bad, axis=-1) - bad / 2
        pairs = good.sum(axis=-1, keepdims=True) * bad.sum(axis=-1, keepdims=True)
        return np.asarray((good * below).sum(axis=-1, keepdims=True) / pairs)

    (found,) = bootstrap.estimates(area, np.concatenate([hits, misses], axis=1))
    return found
