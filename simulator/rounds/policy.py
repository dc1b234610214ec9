"""What a stopping policy is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Ints
from simulator.rounds.round import Played, Round

if TYPE_CHECKING:
    from simulator.trees.trees import Tree


class StoppingPolicy(Protocol):
    """Chooses draft lengths. A policy sees only what an engine would know; `OraclePolicy` is the one exception.

    `longest_draft`: the most it ever asks for, None for an oracle alone. `needs_signals`: whether it reads
    `Round.signals`. `drafts_ahead`: every slot drafts so many tokens before the policy chooses how many of them are
    verified; None where what is drafted is verified. `tree`: drafted in place of chains, if any. `always_drafts`:
    the drafter runs (and a drafter charged by the round is paid) even in a round that asks nothing of any slot.
    """

    longest_draft: int | None
    needs_signals: bool
    drafts_ahead: int | None
    tree: Tree | None
    always_drafts: bool

    def opened(self, slots: Ints) -> None:
        """Hear that `slots` now hold other requests: forget what was known of the old ones."""
        ...

    def draft_tokens(self, round_: Round) -> Ints:
        """Give how many drafted tokens of each active slot are to be verified (shape: active)."""
        ...

    def observe(self, round_: Round, played: Played) -> None:
        """Hear what came of a round, before its requests move on."""
        ...


class Policy:
    """A policy that looks at nothing but the round, to build others on."""

    longest_draft: int | None = None
    needs_signals: bool = False
    drafts_ahead: int | None = None
    tree: Tree | None = None
    always_drafts: bool = False

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def observe(self, round_: Round, played: Played) -> None:
        """Nothing to learn."""


class OraclePolicy(Policy):
    """A policy that knows what will be accepted. No engine can do this, it bounds what can; results say so.

    It is asked by `foreseen_tokens` in place of `draft_tokens`.
    """

    def draft_tokens(self, round_: Round) -> Ints:
        """Refuse: an oracle that is not told the future is no oracle."""
        raise TypeError("an oracle is asked by foreseen_tokens")

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Give the draft lengths (shape: active); `run_length` tokens of each slot's next draft will be accepted."""
        raise NotImplementedError


def ask(policy: StoppingPolicy, round_: Round, run_length: Ints) -> Ints:
    """Give the draft lengths that `policy` chooses; only an oracle is told the `run_length` to come."""
    if isinstance(policy, OraclePolicy):
        return policy.foreseen_tokens(round_, run_length)
    return policy.draft_tokens(round_)


def first_stop(stop: NDArray[np.bool_]) -> Ints:
    """Give draft lengths: up to and with the first step where `stop` (slots, steps) is true, else all steps."""
    return np.asarray(np.where(stop.any(axis=1), stop.argmax(axis=1) + 1, stop.shape[1]), dtype=np.int64)
