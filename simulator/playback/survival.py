"""Forecasts of how far a draft survives: hazards by depth, learned from the requests of other folds.

P(run > j | run >= j) = logistic(x b), with x made of what the text tells (`simulator.playback.text_facts`), the depth
j, what the drafter did of late, and products of them: discrete-time survival analysis (Cox 1972; Allison 1982). The
survival curve S_j = P(run >= j) is the product of these; its sum over j <= k is the expected accepted length of a
draft of k tokens, bonus excluded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from simulator.playback.predictor import logistic

_RIDGE = 1.0
"""Penalty on half the squared coefficients, in hazards seen: keeps them finite where the facts decide."""
_TOKEN_RIDGE, _LARGEST_EFFECT = 3.0, 2.5
"""Penalty on the effect of a token, and how large it may be in log odds."""
_STEPS = 40
_ROWS = 60_000
"""Hazards that a fit looks at, at most: more of them no longer move the coefficients by what matters."""
RECENT_DECAY = 0.9
"""Weight of older rounds in the recent acceptance of a drafter, a round."""
RECENT_PRIOR = (2.0, 3.0)
"""Accepted and compared tokens that recent acceptance starts from, and always counts."""


def recent_acceptance(accepted: Floats, compared: Floats) -> Floats:
    """Give the log odds of faded counts of accepted over compared tokens, start values added."""
    hits, misses = accepted + RECENT_PRIOR[0], compared - accepted + RECENT_PRIOR[1] - RECENT_PRIOR[0]
    return np.asarray(np.log(hits / misses), dtype=np.float64)


@dataclass(frozen=True)
class Hazard:
    """A fitted hazard. `at_depth` (longest, columns of x): the coefficients of x at each depth, products included."""

    at_depth: Floats

    def curve(self, x: Floats) -> Floats:
        """Give S_1 .. S_longest for rows x (n, columns, constant first): shape (n, longest)."""
        return np.asarray(np.cumprod(logistic(x @ self.at_depth.T), axis=1), dtype=np.float64)


def fit_hazard(x: Floats, run: Ints, proposed: Ints, longest: int) -> Hazard:
    """Fit to rows x (constant first) where drafts ran `run` tokens deep of `proposed`; bonus excluded.

    A row counts once for each depth that its draft reached. A depth has its own constant (one for each of 0 to 3, one
    for each doubling beyond), and log(1 + depth) multiplies every column.
    """
    reach = np.minimum(np.minimum(run + 1, proposed), longest)
    rows = np.repeat(np.arange(len(x)), reach)
    first = np.concatenate(([0], np.cumsum(reach)[:-1]))
    depth = np.arange(len(rows)) - np.repeat(first, reach)
    if len(rows) > _ROWS:
        chosen = np.linspace(0, len(rows) - 1, _ROWS).astype(np.int64)
        rows, depth = rows[chosen], depth[chosen]
    step = _steps(longest)
    design = np.concatenate([x[rows], x[rows] * np.log1p(depth)[:, None], step[depth][:, 1:]], axis=1)
    b = fit_ridge(design, run[rows] > depth)
    width = x.shape[1]
    at_depth = b[:width] + b[width : 2 * width] * np.log1p(np.arange(longest))[:, None]
    at_depth[:, 0] += step[:, 1:] @ b[2 * width :]
    return Hazard(at_depth)


def fit_ridge(x: Floats, goes_on: NDArray[np.bool_]) -> Floats:
    """Fit P = logistic(x b) with a ridge penalty, by Newton's method with halved steps.

    le Cessie and van Houwelingen 1992. The penalised likelihood is strictly concave: it has one maximum, also without
    a row and where rows separate perfectly.
    """
    sign = np.where(goes_on, 1.0, -1.0)

    def loss(b: Floats) -> float:
        return float(np.logaddexp(0.0, -sign * (x @ b)).sum() + _RIDGE * (b @ b) / 2)

    b = np.zeros(x.shape[1])
    now = loss(b)
    for _ in range(_STEPS):
        p = logistic(x @ b)
        gradient = x.T @ (goes_on - p) - _RIDGE * b
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + _RIDGE * np.eye(len(b)), gradient)
        size = 1.0
        while (then := loss(b + size * step)) > now and size > 1e-6:
            size /= 2
        b, gained, now = b + size * step, now - then, then
        if gained < 1e-6:
            break
    return b


@dataclass(frozen=True)
class TokenEffects:
    """What tokens add to the log odds of a hazard: `own` of the one copied there, `before` of the one before it.

    Indexed by token id, -1 (the last place) for none. Shape (tokens + 1,) each.
    """

    own: Floats
    before: Floats

    def of(self, path: Ints) -> Floats:
        """Give what they add along `path` (rows, 1 + steps), the last known token first: shape (rows, steps)."""
        return np.asarray(self.own[path[:, 1:]] + self.before[path[:, :-1]])


def fit_effects(hazard: Hazard, x: Floats, path: Ints, run: Ints, proposed: Ints, tokens: int) -> TokenEffects:
    """Fit the effects of tokens to what `hazard` leaves open: first of the copied tokens, then of those before.

    One Newton step of a ridge penalty each, sum of (hit - P) over sum of P (1 - P) + penalty: shrunk to 0 where a
    token was seldom seen. Rows and `run`, `proposed` as in `fit_hazard`; `tokens`: how many ids there are.
    """
    steps = np.arange(len(hazard.at_depth))
    seen = steps < np.minimum(run + 1, proposed)[:, None]
    hit = steps < run[:, None]
    odds = x @ hazard.at_depth.T
    own = _effect(path[:, 1:], odds, hit, seen, tokens)
    before = _effect(path[:, :-1], odds + own[path[:, 1:]], hit, seen, tokens)
    return TokenEffects(own, before)


def _effect(path: Ints, odds: Floats, hit: NDArray[np.bool_], seen: NDArray[np.bool_], tokens: int) -> Floats:
    p = logistic(odds[seen])
    which = path[seen] % (tokens + 1)
    left = np.bincount(which, weights=hit[seen] - p, minlength=tokens + 1)
    weight = np.bincount(which, weights=p * (1 - p), minlength=tokens + 1)
    effect = np.clip(left / (weight + _TOKEN_RIDGE), -_LARGEST_EFFECT, _LARGEST_EFFECT)
    effect[-1] = 0.0
    return np.asarray(effect, dtype=np.float64)


def _steps(longest: int) -> Floats:
    """Give one-hot groups of depth: 0, 1, 2, 3, 4-7, 8-15, ..."""
    group = [depth if depth < 4 else 2 + (depth.bit_length() - 1) for depth in range(longest)]
    return np.eye(max(group) + 1)[group]
