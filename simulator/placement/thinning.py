"""Thinning: the replay of a drafter whose tokens are lost with some probability, compared with the one recorded."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Ints
from simulator.playback.replay import Replay, runs_of
from simulator.playback.stretches import Stretches

THINNING = 7001
"""Stream of the luck of thinning, next to the seed and the request."""


class ThinnedRuns:
    """Accepts every token that `whole` accepts with probability 1 - `drop`, independently.

    Acceptance a becomes a (1 - drop). One number is drawn for each output token of a request; it depends on seed and
    request alone, so that all policies share their luck. Runs of neighbouring positions agree on it: a lost token
    ends every run that reaches it. An approximation of a drafter that was not recorded.

    `lengths`: output tokens of each recorded sequence.
    """

    def __init__(self, whole: Replay, lengths: tuple[int, ...], drop: float, seed: int) -> None:
        self.whole = whole
        self.shapes = whole.shapes
        self._lengths, self._drop, self._seed = lengths, drop, seed
        self._room = Stretches(0)
        self._start: dict[int, int] = {}
        self._cursor = np.zeros(0, dtype=np.int64)
        self.run_length = np.zeros(0, dtype=np.int64)
        self.proposal_length = None if whole.proposal_length is None else np.zeros(0, dtype=np.int64)

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Draw what `request` loses into a stretch of its own."""
        length = output_tokens or self._lengths[sequence]
        first = self.whole.open(sequence, request, output_tokens)
        start = self._room.take(length)
        self._start[start] = first
        kept = np.random.default_rng([self._seed, THINNING, request]).random(length) >= self._drop
        here, there = slice(start, start + length), slice(first, first + length)
        self.run_length, self._cursor = self._room.fit(self.run_length), self._room.fit(self._cursor)
        self.run_length[here] = np.minimum(self.whole.run_length[there], runs_of(kept))
        self._cursor[here] = np.arange(first, first + length)
        if self.proposal_length is not None and self.whole.proposal_length is not None:
            self.proposal_length = self._room.fit(self.proposal_length)
            self.proposal_length[here] = self.whole.proposal_length[there]
        return start

    def close(self, start: int) -> None:
        """Take the stretch back."""
        self.whole.close(self._start.pop(start))
        self._room.give(start)

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`."""
        return self.whole.positions(self._cursor[cursors])
