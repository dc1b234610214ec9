"""Stopping policies: how many tokens each slot drafts in the next round, found by name from a scenario.

A policy sees only what an engine would know at that moment; an oracle says that it is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simulator.replay import IntArray
from simulator.scenario import FixedLength, OracleLength, Stopping


@dataclass(slots=True)
class Round:
    """What a policy may look at before a decode round.

    `active`: slots in the batch. `future_run_length` (shape: active): how many drafted tokens would be accepted;
    only an oracle may read it.
    """

    active: int
    future_run_length: IntArray


class StoppingPolicy(Protocol):
    """Chooses draft lengths. `longest_draft`: the most it ever asks for, None for an oracle."""

    longest_draft: int | None

    def draft_tokens(self, round_: Round) -> IntArray:
        """Give how many tokens each active slot asks its drafter for (shape: active)."""
        ...


class Fixed:
    """The same draft length k always; exact replay of greedy traces, exact in distribution of sampled ones."""

    def __init__(self, draft_tokens: int, max_num_seqs: int) -> None:
        self.longest_draft: int | None = draft_tokens
        self._lengths = np.full(max_num_seqs, draft_tokens, dtype=np.int64)

    def draft_tokens(self, round_: Round) -> IntArray:
        """Give k for every slot."""
        return self._lengths[: round_.active]


class Oracle:
    """Drafts exactly as many tokens as will be accepted: an oracle, no engine can do it; its replay is exact.

    No draft token is wasted and every round emits as much as it can, so it bounds the accepted tokens of every
    chain policy from above. It does not bound time where drafting an accepted token costs more than verifying one.
    """

    longest_draft: int | None = None

    def draft_tokens(self, round_: Round) -> IntArray:
        """Give the true run lengths."""
        return round_.future_run_length


def make_policy(stopping: Stopping, max_num_seqs: int) -> StoppingPolicy | None:
    """Give the policy that a scenario names; None where nothing is drafted at all (``none``)."""
    if isinstance(stopping, FixedLength):
        return Fixed(stopping.draft_tokens, max_num_seqs)
    if isinstance(stopping, OracleLength):
        return Oracle()
    return None
