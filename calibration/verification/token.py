"""Token-level speculative sampling: one draft, accepted with probability min(1, p/q)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError
from calibration.verification.common import Drafting, Drafts, Law, Sampled, draft_tokens, pair, residual
from calibration.verification.gumbel import draw_iid


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
