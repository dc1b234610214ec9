"""Greedy verification: a draft is accepted if it is the verifier's own first choice."""

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
