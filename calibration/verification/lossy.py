"""Lossy rules: they accept more than a lossless rule may, and what is emitted is no longer distributed as p.

Each gives, beside the shape that all rules share, the exact distribution of the emitted token (`output`) and its
total variation to p (`total_variation`), at one position. Over a text the deviations add up.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError
from calibration.verification.chains import one_draft
from calibration.verification.common import (
    Drafting,
    Drafts,
    Law,
    Sampled,
    choice,
    distribution,
    draft_count,
    draft_tokens,
    entropy,
    norm,
    pair,
    residual,
    total_variation,
)
from calibration.verification.gumbel import draw_drafts, draw_iid, top_k


class Lossy(Sampled):
    """Mixin of the lossy rules: their distance from p."""

    lossless: ClassVar[bool] = False

    @abstractmethod
    def output(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give the exact distribution [V] of the emitted token with k drafts."""

    def total_variation(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact total variation between the emitted token and p."""
        return total_variation(p, self.output(p, q, k))


@dataclass(frozen=True)
class Typical(Lossy):
    """Medusa's typical acceptance: accept x iff p(x) > min(epsilon, delta exp(-H(p))), H the entropy in nats. LOSSY.

    Of several drafts that pass, the one most probable under p is taken; none: emit from p itself (our reading: that
    token is the verifier's own sampling). The defaults are Medusa's. Replay: acceptance is a function of p at the
    draft (T3 for what is emitted, since the text leaves the verifier's own). Cai et al. 2024.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    drafting: Drafting = "top"

    def __post_init__(self) -> None:
        """Refuse thresholds without a meaning."""
        _share("epsilon", self.epsilon, "Typical")
        if not self.delta > 0:
            raise CalibrationError(f"Typical: delta must be > 0, got {self.delta!r}")
        choice("drafting", self.drafting, ("iid", "top"), "Typical")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw up to k drafts from q [V]."""
        return draw_drafts(q, k, rng, self.drafting)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact probability that one of k drafts is typical; O(V)."""
        p, q = pair(p, q, "Typical.acceptance")
        k = draft_count(k, "Typical.acceptance")
        if self.drafting == "top":
            return float(self._typical(p)[top_k(q, k)].any())
        return float(1.0 - (1.0 - min(1.0, q[self._typical(p)].sum())) ** k)

    def output(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give the exact distribution [V] of the emitted token; O(V log V)."""
        p, q = pair(p, q, "Typical.output")
        if self.drafting == "top":
            return self.law(p, q, top_k(q, k)).tokens
        k = draft_count(k, "Typical.output")
        order = np.argsort(-p, kind="stable")
        order = order[self._typical(p)[order]]
        none_yet: Floats = (1.0 - np.minimum(1.0, np.concatenate([[0.0], np.cumsum(q[order])]))) ** k
        emitted: Floats = none_yet[-1] * p
        emitted[order] += none_yet[:-1] - none_yet[1:]
        return emitted

    def law(self, p: ArrayLike, q: ArrayLike | None, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k], from any drafter; q is not looked at. O(V)."""
        p = distribution("p", p, "Typical.law")
        tokens = draft_tokens(drafts, p, "Typical.law", drawn=False)
        accepted = np.zeros(tokens.size)
        passing = np.flatnonzero(self._typical(p)[tokens])
        if passing.size:
            accepted[min(passing.tolist(), key=lambda i: (-p[tokens[i]], tokens[i], i))] = 1.0
        return Law(tokens, accepted, p)

    def _typical(self, p: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return p > min(self.epsilon, self.delta * float(np.exp(-entropy(p))))


@dataclass(frozen=True)
class Lenient(Lossy):
    """Lenience: accept x ~ q with probability min(1, p(x) / (lenience q(x))), 0 < lenience <= 1. LOSSY below 1.

    A rejected draft is replaced from norm([p - q]+), as by the lossless rule (our choice; the paper bounds the result
    only): no token is emitted more often than p(x) / lenience. Acceptance is sum min(q, p / lenience).
    Leviathan et al. 2023, appendix on lenience.
    """

    lenience: float = 0.5
    drafting: ClassVar[Drafting] = "iid"

    def __post_init__(self) -> None:
        """Refuse a lenience without a meaning."""
        _share("lenience", self.lenience, "Lenient")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw the one draft [1] from q [V]."""
        return draw_iid(q, one_draft(k, "Lenient.draw"), rng)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> float:
        """Give sum min(q, p / lenience), exact; O(V)."""
        return float(self.acceptance_by_token(p, q, k).sum())

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> Floats:
        """Give [V] the mass accepted via each token; it may exceed p."""
        one_draft(k, "Lenient.acceptance")
        p, q = pair(p, q, "Lenient.acceptance")
        return np.minimum(q, p / self.lenience)

    def output(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> Floats:
        """Give the exact distribution [V] of the emitted token; O(V)."""
        return _replaced(p, q, self.acceptance_by_token(p, q, k))

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [1]; O(V)."""
        p, q = pair(p, q, "Lenient.law")
        tokens = draft_tokens(drafts, q, "Lenient.law")
        one_draft(tokens.size, "Lenient.law")
        return Law(tokens, np.minimum(1.0, p[tokens] / (self.lenience * q[tokens])), residual(p, q))


@dataclass(frozen=True, eq=False)
class Judge(Lossy):
    """Judge decoding: accept x if judged[x] > threshold or the lossless rule accepts. LOSSY.

    `judged` [V] is the judge's probability at this position that each token is a correct continuation (a linear head
    on the verifier's embedding of the drafted token in the paper). A rejected draft is replaced from norm([p - q]+)
    (our choice). Replay: needs the judge's verdict on each drafted token (T4). Bachmann et al. 2025.
    """

    judged: ArrayLike
    threshold: float = 0.5
    drafting: ClassVar[Drafting] = "iid"

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw the one draft [1] from q [V]."""
        return draw_iid(q, one_draft(k, "Judge.draw"), rng)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> float:
        """Give q(good) + sum of min(p, q) over the others, exact; O(V)."""
        return float(self.acceptance_by_token(p, q, k).sum())

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> Floats:
        """Give [V] the mass accepted via each token: q where the judge agrees, else min(p, q); it may exceed p."""
        one_draft(k, "Judge.acceptance")
        p, q = pair(p, q, "Judge.acceptance")
        return np.where(self._good(p), q, np.minimum(p, q))

    def output(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> Floats:
        """Give the exact distribution [V] of the emitted token; O(V)."""
        return _replaced(p, q, self.acceptance_by_token(p, q, k))

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [1]; O(V)."""
        p, q = pair(p, q, "Judge.law")
        tokens = draft_tokens(drafts, q, "Judge.law")
        one_draft(tokens.size, "Judge.law")
        accepted = np.where(self._good(p)[tokens], 1.0, np.minimum(1.0, p[tokens] / q[tokens]))
        return Law(tokens, accepted, residual(p, q))

    def _good(self, p: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        judged = np.asarray(self.judged, dtype=np.float64)
        if judged.shape != p.shape or not np.all((judged >= 0) & (judged <= 1)):
            raise CalibrationError(
                f"Judge: judged must hold one probability for each of {p.size} tokens, got shape {judged.shape} with "
                f"values from {judged.min(initial=np.inf):g} to {judged.max(initial=-np.inf):g}"
            )
        return judged > self.threshold


@dataclass(frozen=True)
class Thresholds(Lossy):
    """SGLang's two thresholds over distinct drafts x_1, ..., x_k: LOSSY below 1, Naive at (1, 1).

    One uniform u for all: accept the first x_i with u <= (p(x_1) + ... + p(x_i)) / threshold_acc or p(x_i) >=
    threshold_single; none: emit from norm(p without the drafts). The drafts are a fixed set (`draw` gives the top of
    q); their order matters. Replay: acceptance from p at the drafts (T3 for what is emitted). SGLang's kernel
    TreeSpeculativeSamplingTargetOnly with its draft probabilities at zero.
    """

    threshold_single: float = 1.0
    threshold_acc: float = 1.0
    drafting: ClassVar[Drafting] = "top"

    def __post_init__(self) -> None:
        """Refuse thresholds without a meaning."""
        _share("threshold_single", self.threshold_single, "Thresholds")
        _share("threshold_acc", self.threshold_acc, "Thresholds")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Give the k most probable tokens of q [V]."""
        return top_k(q, k)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact probability that one of the k most probable tokens of q is accepted; O(V)."""
        return self.law(p, q, top_k(q, k)).acceptance

    def output(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give the exact distribution [V] of the emitted token; O(V)."""
        return self.law(p, q, top_k(q, k)).tokens

    def law(self, p: ArrayLike, q: ArrayLike | None, drafts: Drafts) -> Law:
        """Give the exact consequence for distinct drafts [k], from any drafter; q is not looked at. O(V)."""
        p = distribution("p", p, "Thresholds.law")
        tokens = draft_tokens(drafts, p, "Thresholds.law", distinct=True, drawn=False)
        reach = np.minimum(1.0, np.cumsum(p[tokens]) / self.threshold_acc)
        sure = np.flatnonzero(p[tokens] >= self.threshold_single)
        if sure.size:
            reach[sure[0] :] = 1.0
        missed = p.copy()
        missed[tokens] = 0.0
        return Law(tokens, np.diff(reach, prepend=0.0), norm(missed, p))


def _replaced(p: ArrayLike, q: ArrayLike, accepted: Floats) -> Floats:
    """Give [V] the accepted mass, and the rest drawn from norm([p - q]+)."""
    p, q = pair(p, q, "output")
    return np.asarray(accepted + max(0.0, 1.0 - float(accepted.sum())) * residual(p, q))


def _share(name: str, value: float, where: str) -> None:
    """Refuse a value outside (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise CalibrationError(f"{where}: {name} must lie in (0, 1], got {value!r}")
