"""Rules over a drafted chain: token-level verification, and block verification, which judges all positions together.

Both take `drafts` [gamma] token ids, `p` [gamma + 1, V] with row i the verifier's distribution after the first i
drafts, and `q` [gamma, V] with row i the distribution that draft i came from.

Token-level speculative sampling: one draft, accepted with probability min(1, p/q).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError
from calibration.verification.common import (
    Drafting,
    Drafts,
    Law,
    NextToken,
    RoundLaw,
    RoundVerdict,
    Sampled,
    distribution,
    draft_count,
    draft_tokens,
    draw,
    norm,
    pair,
    residual,
)
from calibration.verification.gumbel import draw_iid

__all__ = ["BlockVerification", "TokenLevelChain"]


@dataclass(frozen=True)
class TokenLevel(Sampled):
    """Accept x ~ q with probability min(1, p(x) / q(x)); otherwise emit from norm([p - q]+).

    Lossless. Acceptance is sum min(p, q) = 1 - TV(p, q), the most that one draft from q allows. A deterministic
    proposal (prompt lookup, retrieval, top-1) is q = one-hot: it is accepted with probability p(x). Replay: exact in
    distribution on a sampled target path, accept y_t with probability min(1, q(y_t) / p(y_t)) (T1).
    Leviathan et al. 2023; Chen et al. 2023.
    """

    drafting: ClassVar[Drafting] = "iid"
    lossless: ClassVar[bool] = True

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw the one draft [1] from q [V]."""
        return draw_iid(q, one_draft(k, "TokenLevel.draw"), rng)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> float:
        """Give sum min(p, q), exact; O(V)."""
        return float(self.acceptance_by_token(p, q, k).sum())

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int = 1) -> Floats:
        """Give [V] the mass accepted via each token, min(p, q)."""
        one_draft(k, "TokenLevel.acceptance")
        p, q = pair(p, q, "TokenLevel.acceptance")
        return np.minimum(p, q)

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [1] from q; O(V)."""
        p, q = pair(p, q, "TokenLevel.law")
        tokens = draft_tokens(drafts, q, "TokenLevel.law")
        one_draft(tokens.size, "TokenLevel.law")
        return Law(tokens, np.minimum(1.0, p[tokens] / q[tokens]), residual(p, q))


def one_draft(k: int, where: str) -> int:
    """Give k, refused unless it is 1."""
    if k != 1:
        raise CalibrationError(f"{where}: k must be 1, this rule verifies a single draft, got {k!r}")
    return 1


@dataclass(frozen=True)
class TokenLevelChain:
    """Token-level speculative sampling along a chain (Leviathan et al. 2023; Chen et al. 2023).

    Draft i, if all before it are accepted, is accepted with probability min(1, p(x)/q(x)); the first rejected one is
    replaced by a token from norm([p - q]+), and a bonus token from p follows when none is.
    """

    lossless: ClassVar[bool] = True

    def law(self, drafts: Drafts, p: ArrayLike, q: ArrayLike) -> RoundLaw:
        """Give the exact consequence for these drafts. O(gamma V)."""
        chain = _Chain.checked(drafts, p, q, "TokenLevelChain.law")
        accept = np.minimum(chain.ratios, 1.0)
        ends = np.concatenate(([1.0], np.cumprod(accept))) * np.append(1.0 - accept, 1.0)
        corrections = np.zeros((chain.gamma + 1, chain.bonus.size))
        for i in np.flatnonzero(ends):
            corrections[i] = residual(*chain.rows[i]) if i < chain.gamma else chain.bonus
        return RoundLaw(chain.prefixes, ends, corrections)

    def verify(self, drafts: Drafts, p: ArrayLike, q: ArrayLike, rng: np.random.Generator) -> RoundVerdict:
        """Accept a prefix of the drafts and emit one token more. O(gamma V)."""
        chain = _Chain.checked(drafts, p, q, "TokenLevelChain.verify")
        for i, ratio in enumerate(chain.ratios):
            if rng.random() >= ratio:
                return RoundVerdict(chain.prefixes[i], draw(residual(*chain.rows[i]), rng))
        return RoundVerdict(chain.prefixes[-1], draw(chain.bonus, rng))

    def expected_accepted(self, target: NextToken, drafter: NextToken, gamma: int) -> float:
        """Give E[tau], drafts from the drafter: sum_i P(first i accepted), with P = sum min(p, q) along the path.

        Exact, bonus excluded. Visits every prefix shorter than gamma: V^(gamma - 1) of them, small vocabularies only.
        """

        def below(prefix: tuple[int, ...], left: int) -> float:
            accepted = np.minimum(*pair(target(prefix), drafter(prefix), "TokenLevelChain.expected_accepted"))
            if left == 1:
                return float(accepted.sum())
            inside = np.flatnonzero(accepted)
            return float(accepted.sum()) + sum(
                float(accepted[x]) * below((*prefix, int(x)), left - 1) for x in inside
            )

        return below((), draft_count(gamma, "TokenLevelChain.expected_accepted"))


@dataclass(frozen=True)
class BlockVerification:
    """Block verification (Sun et al. 2024, arXiv 2403.10444): the longest expected acceptance of a chain.

    With pi_0 = 1 and pi_i = min(1, pi_{i-1} p(x_i)/q(x_i)), every length i is accepted independently with

        h_i = S_i / (S_i + 1 - pi_i),   S_i = sum_x [pi_i p(x) - q(x)]+  after x_1..x_i   (i < gamma),
        h_gamma = pi_gamma,

    and tau is the LAST accepted i (0 if none). A token from norm([pi_tau p - q]+) follows, from p where tau = gamma.
    Optimal among valid verifiers of a chain that see p and q along the drafted path.
    """

    lossless: ClassVar[bool] = True

    def law(self, drafts: Drafts, p: ArrayLike, q: ArrayLike) -> RoundLaw:
        """Give the exact consequence for these drafts: P(tau = i) = h_i prod_{j > i} (1 - h_j). O(gamma V)."""
        chain = _Chain.checked(drafts, p, q, "BlockVerification.law")
        ends = np.zeros(chain.gamma + 1)
        corrections = np.zeros((chain.gamma + 1, chain.bonus.size))
        left = 1.0
        for i, accept, correction in chain.blocks():
            ends[i] = left * accept
            if accept > 0.0:
                corrections[i] = correction
            left *= 1.0 - accept
            if left <= 0.0:
                break
        return RoundLaw(chain.prefixes, ends, corrections)

    def verify(self, drafts: Drafts, p: ArrayLike, q: ArrayLike, rng: np.random.Generator) -> RoundVerdict:
        """Accept a prefix of the drafts and emit one token more. O(V) per length tried, longest first."""
        chain = _Chain.checked(drafts, p, q, "BlockVerification.verify")
        return next(
            RoundVerdict(chain.prefixes[i], draw(correction, rng))
            for i, accept, correction in chain.blocks()
            if rng.random() < accept
        )

    def expected_accepted(self, target: NextToken, drafter: NextToken, gamma: int) -> float:
        """Give E[tau] = sum_{i=1..gamma} E_q[pi_i], drafts from the drafter.

        Exact, bonus excluded. Visits every prefix shorter than gamma: V^(gamma - 1) of them, small vocabularies only.
        """

        def below(prefix: tuple[int, ...], pi: float, left: int) -> float:
            p, q = pair(target(prefix), drafter(prefix), "BlockVerification.expected_accepted")
            total = float(np.minimum(pi * p, q).sum())  # E of the next pi, sum_x q(x) min(1, pi p(x) / q(x))
            if left > 1:
                for x in np.flatnonzero(q):
                    after = min(1.0, pi * float(p[x] / q[x]))
                    total += float(q[x]) * below((*prefix, int(x)), after, left - 1)
            return total

        return below((), 1.0, draft_count(gamma, "BlockVerification.expected_accepted"))


@dataclass(frozen=True, eq=False)
class _Chain:
    """A checked chain: gamma tokens, the (p, q) that each is judged by, and the verifier's row after the last."""

    tokens: tuple[int, ...]
    rows: list[tuple[Floats, Floats]]
    bonus: Floats

    @classmethod
    def checked(cls, drafts: Drafts, p: ArrayLike, q: ArrayLike, where: str) -> _Chain:
        """Give the chain, or raise CalibrationError where shapes do not fit or a draft cannot come from q."""
        tokens, targets, drafters = np.asarray(drafts), np.asarray(p), np.asarray(q)
        gamma = tokens.size
        if gamma == 0:
            raise CalibrationError(f"{where}: drafts must be at least one, got none")
        if targets.ndim != 2 or drafters.ndim != 2 or (len(targets), len(drafters)) != (gamma + 1, gamma):
            raise CalibrationError(
                f"{where}: p must be [gamma + 1, V] and q [gamma, V] for gamma = {gamma} drafts, got shapes "
                f"{targets.shape} and {drafters.shape}"
            )
        rows = [pair(targets[i], drafters[i], where) for i in range(gamma)]
        for i in range(gamma):
            draft_tokens(tokens[i : i + 1], rows[i][1], where)
        return cls(tuple(tokens.tolist()), rows, distribution("p", targets[gamma], where))

    @property
    def gamma(self) -> int:
        """Number of drafts."""
        return len(self.tokens)

    @property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The first 0, 1, .. gamma drafts."""
        return tuple(self.tokens[:i] for i in range(self.gamma + 1))

    @property
    def ratios(self) -> Floats:
        """p(x) / q(x) of every draft, [gamma]."""
        return np.array([p[x] / q[x] for x, (p, q) in zip(self.tokens, self.rows, strict=True)])

    def blocks(self) -> Iterator[tuple[int, float, Floats]]:
        """Give (i, h_i, distribution of the token after i drafts) of block verification, from gamma down to 0."""
        pi = [1.0]
        for ratio in self.ratios:
            pi.append(min(1.0, pi[-1] * float(ratio)))
        yield self.gamma, pi[-1], self.bonus
        for i in reversed(range(self.gamma)):
            p, q = self.rows[i]
            left = np.maximum(pi[i] * p - q, 0.0)
            mass = float(left.sum())
            unclaimed = mass + (1.0 - pi[i])
            # Nothing is left only where p = q and pi = 1: then the next draft is accepted and i is never asked.
            yield i, mass / unclaimed if i > 0 and unclaimed > 0 else 1.0, norm(left, p)
