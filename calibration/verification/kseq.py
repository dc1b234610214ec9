"""SpecTr's k-sequential selection: independent drafts, each held to the same lowered bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.verification.common import Drafting, Drafts, Law, Sampled, draft_count, draft_tokens, norm, pair
from calibration.verification.gumbel import draw_iid


@dataclass(frozen=True)
class KSequential(Sampled):
    """Accept x_i ~ q with probability min(1, p(x_i) / (g q(x_i))) at each of k independent drafts (K-SEQ).

    With beta(g) = sum min(q, p / g), one is accepted with probability alpha = 1 - (1 - beta)^k; all rejected: emit
    from norm(p - min(q, p / g) alpha / beta). Lossless for every g with alpha <= g beta; used is the smallest,
    g* in [1, k] (`division_factor`), where alpha = sum min(g* q, p). At least 1 - 1/e of the optimum.
    Replay: exact in distribution from p and q at the target's path (T2): accept y_t with probability
    acceptance_by_token(p, q, k)[y_t] / p[y_t]. Sun et al. 2023 (SpecTr; its p and q are swapped).
    """

    drafting: ClassVar[Drafting] = "iid"
    lossless: ClassVar[bool] = True

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw k independent drafts from q [V]."""
        return draw_iid(q, k, rng)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give alpha, exact; O(V) at each of about 50 bisections."""
        p, q = pair(p, q, "KSequential.acceptance")
        k = draft_count(k, "KSequential.acceptance")
        return _accepted(_beta(p, q, _factor(p, q, k)), k)

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give [V] the mass accepted via each token, min(q, p / g*) alpha / beta."""
        p, q = pair(p, q, "KSequential.acceptance")
        k = draft_count(k, "KSequential.acceptance")
        return _mass(p, q, _factor(p, q, k), k)

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k], all k of one draw: g* depends on k."""
        p, q = pair(p, q, "KSequential.law")
        tokens = draft_tokens(drafts, q, "KSequential.law")
        factor = _factor(p, q, tokens.size)
        chance = np.minimum(1.0, p[tokens] / (factor * q[tokens]))
        reached = np.concatenate([[1.0], np.cumprod(1.0 - chance)[:-1]])
        left = np.maximum(p - _mass(p, q, factor, tokens.size), 0.0)
        return Law(tokens, reached * chance, norm(left, p))


def division_factor(p: ArrayLike, q: ArrayLike, k: int) -> float:
    """Give g*, the smallest g in [1, k] with 1 - (1 - beta(g))^k <= g beta(g), by bisection to rounding."""
    checked_p, checked_q = pair(p, q, "division_factor")
    return _factor(checked_p, checked_q, draft_count(k, "division_factor"))


def _beta(p: Floats, q: Floats, factor: float) -> float:
    return min(1.0, float(np.minimum(q, p / factor).sum()))


def _accepted(beta: float, k: int) -> float:
    """Give 1 - (1 - beta)^k without cancellation."""
    return 1.0 if beta >= 1.0 else float(-np.expm1(k * np.log1p(-beta)))


def _factor(p: Floats, q: Floats, k: int) -> float:
    """Bisect for g*; the upper end is kept, where the rule is valid."""

    def valid(factor: float) -> bool:
        beta = _beta(p, q, factor)
        return _accepted(beta, k) <= factor * beta

    low, high = 1.0, float(k)
    if valid(low):
        return low
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return high
        if valid(middle):
            high = middle
        else:
            low = middle


def _mass(p: Floats, q: Floats, factor: float, k: int) -> Floats:
    """Give [V] the mass accepted via each token."""
    share = np.minimum(q, p / factor)
    beta = min(1.0, float(share.sum()))
    return share * (_accepted(beta, k) / beta) if beta > 0 else share
