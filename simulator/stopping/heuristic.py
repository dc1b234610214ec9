"""The schedule of transformers' assisted generation."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Ints
from simulator.rounds.policy import Policy
from simulator.rounds.round import Played, Round


class Heuristic(Policy):
    """k grows by 2 where every drafted token matched and falls by 1, not below 1, where one did not.

    transformers, `AssistedCandidateGenerator.update_candidate_strategy`, schedule ``heuristic_transient``: every
    request starts anew (``heuristic`` carries k over to the next call, which in a batch of requests means nothing). A
    round in which nothing was drafted teaches nothing. transformers knows no cap but the longest output; here
    `max_draft_tokens` is one. Exact replay of greedy traces, exact in distribution of sampled ones.
    """

    def __init__(self, start_tokens: int, max_draft_tokens: int, max_num_seqs: int) -> None:
        self.longest_draft = max_draft_tokens
        self._longest = max_draft_tokens
        self._start = start_tokens
        self._lengths = np.full(max_num_seqs, start_tokens, dtype=np.int64)

    def opened(self, slots: Ints) -> None:
        """Start these anew."""
        self._lengths[slots] = self._start

    def draft_tokens(self, round_: Round) -> Ints:
        """Give each slot's current k."""
        return self._lengths[round_.slots]

    def observe(self, round_: Round, played: Played) -> None:
        """Step k up or down."""
        step = np.where(played.accepted == played.drafted, 2, -1)
        step[played.drafted == 0] = 0
        self._lengths[round_.slots] = np.clip(self._lengths[round_.slots] + step, 1, self._longest)
