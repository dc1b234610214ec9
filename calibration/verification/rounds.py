"""What a round of several drafted positions gives: a path of accepted tokens and one token more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calibration.common.arrays import Floats
from calibration.verification.common import draw

__all__ = ["NextToken", "RoundLaw", "RoundVerdict"]

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
