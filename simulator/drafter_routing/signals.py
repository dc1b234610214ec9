"""Signals of several drafters: each slot feels what the drafter at its cursor feels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.replay import ManyRuns
from simulator.playback.signals import RecordedSignals


class ManySignals:
    """Signals by cursor; as exact as those of the drafter there."""

    def __init__(self, replay: ManyRuns, parts: Sequence[RecordedSignals]) -> None:
        self.steps = self.estimated_steps = 0
        self._replay, self._parts = replay, parts

    def confidence(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's largest probability, shape (slots, steps)."""
        return self._each(cursor, steps, lambda part: part.confidence)

    def entropy(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's entropy in nats, shape (slots, steps)."""
        return self._each(cursor, steps, lambda part: part.entropy)

    def acceptance(self, cursor: Ints, steps: int) -> Floats:
        """Give the predicted probability of acceptance of each step's token, given those before it."""
        return self._each(cursor, steps, lambda part: part.acceptance)

    def _each(
        self,
        cursor: Ints,
        steps: int,
        feel: Callable[[RecordedSignals], Callable[[Ints, int], Floats]],
    ) -> Floats:
        row = self._replay.row[cursor]
        values = np.empty((len(cursor), steps))
        for drafter in np.unique(row).tolist():
            mine = np.flatnonzero(row == drafter)
            values[mine] = feel(self._parts[drafter])(cursor[mine], steps)
        self.steps = sum(part.steps for part in self._parts)
        self.estimated_steps = sum(part.estimated_steps for part in self._parts)
        return values
