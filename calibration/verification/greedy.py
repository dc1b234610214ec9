"""Greedy verification: a draft is accepted if it is the verifier's own first choice.

Naive multi-draft verification: sample the verifier, and see whether its token was drafted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.verification.common import (
    Drafting,
    Drafts,
    Law,
    Sampled,
    choice,
    distribution,
    draft_count,
    draft_tokens,
    first_occurrences,
    norm,
    pair,
)
from calibration.verification.gumbel import draw_drafts, top_k
from calibration.verification.race import inclusion_probabilities


@dataclass(frozen=True)
class Greedy(Sampled):
    """Accept the first draft that equals argmax p (the lowest id among equals); emit argmax p in any case.

    Lossless towards greedy decoding: the emitted token is argmax p, whatever was drafted; the drafts may come from
    anywhere. `drafting` says how `draw` and `acceptance` take them from q. Replay: exact from whether each drafted
    rank equals the argmax (T0). Leviathan et al. 2023; Stern et al. 2018 for the greedy form.
    """

    drafting: Drafting = "top"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse an unknown way of drafting."""
        choice("drafting", self.drafting, ("iid", "without_replacement", "top"), "Greedy")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw up to k drafts from q [V]."""
        return draw_drafts(q, k, rng, self.drafting)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact probability that argmax p is among k drafts; O(V), without replacement as Naive's."""
        return float(self.acceptance_by_token(p, q, k).sum())

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give [V] the mass accepted via each token: all of it at argmax p."""
        p, q = pair(p, q, "Greedy.acceptance")
        best, k = int(np.argmax(p)), draft_count(k, "Greedy.acceptance")
        accepted = np.zeros_like(p)
        accepted[best] = drafted_probabilities(q, k, self.drafting)[best]
        return accepted

    def law(self, p: ArrayLike, q: ArrayLike | None, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k], which any drafter may have made; q is not looked at."""
        p = distribution("p", p, "Greedy.law")
        tokens = draft_tokens(drafts, p, "Greedy.law", drawn=False)
        best = int(np.argmax(p))
        accepted = np.zeros(tokens.size)
        accepted[np.flatnonzero(tokens == best)[:1]] = 1.0
        correction = np.zeros_like(p)
        correction[best] = 1.0
        return Law(tokens, accepted, correction)


def drafted_probabilities(q: Floats, k: int, drafting: Drafting) -> Floats:
    """Give [V] the probability that each token is among k drafts from q [V]."""
    if drafting == "iid":
        with np.errstate(divide="ignore"):
            return np.asarray(-np.expm1(k * np.log1p(-np.minimum(q, 1.0))))
    if drafting == "without_replacement":
        return inclusion_probabilities(q, k)
    drafted = np.zeros_like(q)
    drafted[top_k(q, k)] = 1.0
    return drafted


@dataclass(frozen=True)
class Naive(Sampled):
    """Sample y ~ p and accept it if y is among the drafts (NSS): the set S is accepted with probability p(S).

    Lossless for any drafts whatever, also for a fixed set: `law` and `verify` never look at q, so the children of an
    EAGLE tree, n-gram matches and retrieved tokens are all verified by it. EAGLE's own loop (accept child x with
    probability p(x), else strike x from p and renormalise) is the same law. Replay: exact in distribution from q at
    the target's token (T1), accept y_t with the probability that y_t was drafted.
    Miao et al. 2024 (SpecInfer, its naive baseline); Li et al. 2024 (EAGLE).

    `drafting` says how `draw` and `acceptance` take the k drafts from q: "top" (a fixed set), "iid" or
    "without_replacement".
    """

    drafting: Drafting = "top"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse an unknown way of drafting."""
        choice("drafting", self.drafting, ("iid", "without_replacement", "top"), "Naive")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw up to k drafts from q [V]."""
        return draw_drafts(q, k, rng, self.drafting)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact probability that a draft is accepted: sum over x of p(x) P(x is drafted).

        iid: P = 1 - (1 - q(x))^k; top: 0 or 1. O(V). Without replacement: O(V) for k <= 2, a numerical integral of
        O(V k) at each of about 50 times beyond (about 1e-12).
        """
        return float(self.acceptance_by_token(p, q, k).sum())

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give [V] the mass accepted via each token, p(x) P(x is drafted)."""
        p, q = pair(p, q, "Naive.acceptance")
        return p * drafted_probabilities(q, draft_count(k, "Naive.acceptance"), self.drafting)

    def law(self, p: ArrayLike, q: ArrayLike | None, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k]; q is not looked at; of equal drafts the first counts. O(V)."""
        p = distribution("p", p, "Naive.law")
        tokens = draft_tokens(drafts, p, "Naive.law", drawn=False)
        accepted = np.where(first_occurrences(tokens), p[tokens], 0.0)
        missed = p.copy()
        missed[tokens] = 0.0
        return Law(tokens, accepted, norm(missed, p))
