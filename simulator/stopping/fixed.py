"""Draft lengths that a person has chosen: one, or one for each range of batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibration.common.arrays import Ints
from simulator.rounds.policy import Policy
from simulator.rounds.round import Round


class Fixed(Policy):
    """The same draft length k always; exact replay of greedy traces, exact in distribution of sampled ones."""

    def __init__(self, draft_tokens: int, max_num_seqs: int) -> None:
        self.longest_draft = draft_tokens
        self._lengths = np.full(max_num_seqs, draft_tokens, dtype=np.int64)

    def draft_tokens(self, round_: Round) -> Ints:
        """Give k for every slot."""
        return self._lengths[: round_.active]


class ByBatch(Policy):
    """A draft length for each range of batch sizes, ``[first, last, K]``; as exact as `Fixed`.

    vLLM's `num_speculative_tokens_per_batch_size` (dynamic speculative decoding): the batch size is the number of
    requests scheduled in the step; sizes beyond the table take its last K.
    """

    def __init__(self, table: Sequence[tuple[int, int, int]], max_num_seqs: int) -> None:
        self.longest_draft = max(draft_tokens for _, _, draft_tokens in table)
        by_size = np.full(max_num_seqs + 1, table[-1][2], dtype=np.int64)
        for first, last, draft_tokens in table:
            by_size[first : last + 1] = draft_tokens
        self._by_size: list[int] = by_size.tolist()

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the K of this batch size for every slot."""
        return np.full(round_.active, self._by_size[round_.active], dtype=np.int64)
