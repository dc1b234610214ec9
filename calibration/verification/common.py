"""What every rule shares: checked distributions, the residual, and the shape of a rule and of its outcome.

A rule looks at k drafts at ONE position. `p` [V] is the verifier's distribution of the next token, `q` [V] the one
that the drafts came from, `drafts` [k] token ids in the order in which they are tried.

What a round of several drafted positions gives: a path of accepted tokens and one token more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError

__all__ = ["NextToken", "RoundLaw", "RoundVerdict"]

Drafts = Sequence[int] | NDArray[np.integer[Any]]
Drafting = Literal["iid", "without_replacement", "top", "greedy"]
"""How k drafts come from q: independent draws, draws without replacement in order, its k most probable tokens, or its
k - 1 most probable tokens and one draw from the others."""

SUM_TOLERANCE = 1e-4
"""How far from 1 the sum of a distribution may lie (a float32 softmax over 150,000 tokens errs by 1e-6)."""


@dataclass(frozen=True)
class Verdict:
    """What one verification gave: the emitted token and the index of the accepted draft, None where none was."""

    token: int
    accepted_index: int | None

    @property
    def accepted(self) -> bool:
        """Whether the emitted token is an accepted draft."""
        return self.accepted_index is not None


@dataclass(frozen=True, eq=False)
class Law:
    """The exact consequence of a rule for given drafts.

    `drafts` [k]; `accepted` [k], the probability that exactly this draft is the accepted one; `correction` [V], the
    distribution of the emitted token when none is accepted.
    """

    drafts: Ints
    accepted: Floats
    correction: Floats

    @property
    def acceptance(self) -> float:
        """The probability that one of the drafts is accepted."""
        return float(self.accepted.sum())

    @property
    def tokens(self) -> Floats:
        """The distribution [V] of the emitted token."""
        emitted = max(0.0, 1.0 - self.acceptance) * self.correction
        np.add.at(emitted, self.drafts, self.accepted)
        return emitted

    def sample(self, rng: np.random.Generator) -> Verdict:
        """Draw a verdict: one uniform number for the accepted draft and, where none is, one for the correction."""
        index = int(np.searchsorted(np.cumsum(self.accepted), rng.random(), side="right"))
        if index < len(self.drafts):
            return Verdict(int(self.drafts[index]), index)
        return Verdict(draw(self.correction, rng), None)


class Rule(Protocol):
    """What every rule offers, so that one can take another's place. Rules are small frozen objects without state."""

    lossless: ClassVar[bool]
    """Whether the emitted token is distributed as p (as the argmax of p in greedy decoding), whatever q is."""

    @property
    def drafting(self) -> Drafting:
        """How `draw` takes the drafts from q, and how they must have been drawn for the rule to be lossless."""

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw up to k drafts the way the rule asks for: fewer where distinct drafts outgrow the support of q."""

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact probability that one of k such drafts is accepted."""

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for these drafts."""

    def verify(self, p: ArrayLike, q: ArrayLike, drafts: Drafts, rng: np.random.Generator) -> Verdict:
        """Accept one of these drafts or none, and emit a token."""


class Sampled(ABC):
    """Mixin: `verify` draws from the rule's own `law`."""

    @abstractmethod
    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for these drafts."""

    def verify(self, p: ArrayLike, q: ArrayLike, drafts: Drafts, rng: np.random.Generator) -> Verdict:
        """Accept one of these drafts or none, and emit a token; O(V k)."""
        return self.law(p, q, drafts).sample(rng)


def distribution(name: str, values: ArrayLike, where: str) -> Floats:
    """Give `values` as float64 [V] with sum 1, or raise CalibrationError naming the argument, the rule and the value.

    Sums within SUM_TOLERANCE of 1 are normalised: losslessness is towards the normalised p.
    """
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or row.size == 0:
        raise CalibrationError(f"{where}: {name} must be one distribution of shape [V], got shape {row.shape}")
    total, least = float(row.sum()), float(row.min())
    if not np.isfinite(total):
        bad = int(np.flatnonzero(~np.isfinite(row))[0])
        raise CalibrationError(f"{where}: {name} must be finite, got {row[bad]} at token {bad}")
    if least < 0:
        raise CalibrationError(f"{where}: {name} must not be negative, got {least:g} at token {int(row.argmin())}")
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise CalibrationError(f"{where}: {name} must sum to 1 within {SUM_TOLERANCE:g}, got {total:.6g}")
    return row / total


def pair(p: ArrayLike, q: ArrayLike, where: str) -> tuple[Floats, Floats]:
    """Give p and q checked, over one vocabulary."""
    checked_p, checked_q = distribution("p", p, where), distribution("q", q, where)
    if checked_p.size != checked_q.size:
        raise CalibrationError(
            f"{where}: p and q must share a vocabulary, got {checked_p.size} and {checked_q.size} tokens"
        )
    return checked_p, checked_q


def draft_count(k: int, where: str) -> int:
    """Give k, refused below 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise CalibrationError(f"{where}: k must be a whole number of drafts >= 1, got {k!r}")
    return int(k)


def draft_tokens(drafts: Drafts, q: Floats, where: str, *, distinct: bool = False, drawn: bool = True) -> Ints:
    """Give the drafts as int64 [k]: tokens of the vocabulary, `drawn` from q's support, `distinct` where asked."""
    tokens = np.asarray(drafts)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise CalibrationError(f"{where}: drafts must be token ids of shape [k], k >= 1, got {drafts!r}")
    tokens = tokens.astype(np.int64)
    for token in tokens.tolist():
        if not 0 <= token < q.size:
            raise CalibrationError(f"{where}: drafts must lie in a vocabulary of {q.size} tokens, got {token}")
        if drawn and q[token] == 0.0:
            raise CalibrationError(f"{where}: drafts must have q > 0, got token {token} with q = 0")
    if distinct and np.unique(tokens).size != tokens.size:
        raise CalibrationError(f"{where}: drafts must be distinct, got {tokens.tolist()}")
    return tokens


def choice(name: str, value: str, allowed: Sequence[str], where: str) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise CalibrationError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def norm(mass: Floats, otherwise: Floats) -> Floats:
    """Give mass / sum(mass), [V]; where nothing is left, `otherwise`."""
    total = mass.sum()
    return mass / total if total > 0 else otherwise


def residual(p: Floats, q: Floats) -> Floats:
    """Give norm([p - q]+) [V], from which a rejected draft is replaced; p itself where p = q and nothing is rejected.

    Float arrays, not checked. Leviathan et al. 2023 and Chen et al. 2023.
    """
    return norm(np.maximum(p - q, 0.0), p)


def without(distribution: Floats, tokens: Ints) -> Floats:
    """Give the distribution with these tokens struck out and the rest normalised; all zeros where nothing is left."""
    rest = distribution.copy()
    rest[tokens] = 0.0
    return norm(rest, rest)


def draw(distribution: Floats, rng: np.random.Generator) -> int:
    """Draw one token by inverting the cumulative sum; a token of probability 0 is never drawn. O(V)."""
    cumulative = np.cumsum(distribution)
    token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return token if token < distribution.size else int(np.flatnonzero(distribution)[-1])


def first_occurrences(tokens: Ints) -> NDArray[np.bool_]:
    """Mark [k] the drafts that do not repeat an earlier one."""
    first = np.zeros(tokens.size, dtype=bool)
    first[np.unique(tokens, return_index=True)[1]] = True
    return first


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Give the total variation of two distributions [V]: half the summed absolute difference, 1 - sum min(p, q)."""
    one, other = pair(p, q, "total_variation")
    return float(0.5 * np.abs(one - other).sum())


def entropy(p: Floats) -> float:
    """Give the entropy in nats."""
    inside = p[p > 0]
    return float(-(inside * np.log(inside)).sum())


NextToken = Callable[[tuple[int, ...]], Floats]
"""A model as a function: the distribution [V] of the token that follows a prefix of drafted tokens."""


@dataclass(frozen=True)
class RoundVerdict:
    """What one verification of a chain or a tree gave: the accepted drafts and the token after them."""

    accepted: tuple[int, ...]
    token: int

    @property
    def emitted(self) -> tuple[int, ...]:
        """All tokens of the round, the bonus or correction included."""
        return (*self.accepted, self.token)


@dataclass(frozen=True, eq=False)
class RoundLaw:
    """The exact consequence of a rule for one drafted chain or tree of n nodes.

    Row 0 is the root, row i + 1 is node i: `prefixes[r]` are the drafts on the path to it, `ends` [n + 1] the
    probability that exactly these are accepted, `corrections` [n + 1, V] the distribution of the token after them
    (all zeros where the round cannot end there).
    """

    prefixes: tuple[tuple[int, ...], ...]
    ends: Floats
    corrections: Floats

    @property
    def expected_accepted(self) -> float:
        """The expected number of accepted drafts, the bonus token not counted."""
        return float(self.ends @ [len(prefix) for prefix in self.prefixes])

    def sample(self, rng: np.random.Generator) -> RoundVerdict:
        """Draw a verdict: one uniform number for the end, one for the token after it. O(V)."""
        row = draw(self.ends, rng)
        return RoundVerdict(self.prefixes[row], draw(self.corrections[row], rng))
