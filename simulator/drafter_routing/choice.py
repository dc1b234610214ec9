"""Choosing one drafter for a request when it begins to decode: the protocol, and rules that do not learn.

A choice holds until the request ends (or its replica fails). A policy sees the prompt, its label and what came of
earlier requests; an oracle says that it is one.

Signals of several drafters: each slot feels what the drafter at its cursor feels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.replay import ManyRuns
from simulator.playback.signals import RecordedSignals


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request that needs a drafter. `sequence`: which recorded prompt it is; `number`: its id.

    `start` and `tokens` are where its trajectory begins in the replay and how long it is: for oracles alone.
    """

    number: int
    sequence: int
    start: int
    tokens: int


class Choice(Protocol):
    """Chooses a drafter for each request."""

    def choose(self, newcomer: Newcomer) -> int:
        """Give the index of the drafter."""
        ...

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Hear what a request came to that `drafter` drafted for, when it has ended."""
        ...

    def describe(self) -> dict[str, Any]:
        """Give what is worth knowing of it after a run."""
        ...


class Table:
    """One drafter for each sequence, fixed before the run: see `StaticDrafter`, `ByDomain` and `ByClassifier`."""

    def __init__(self, drafter_of: Sequence[int], told: dict[str, Any] | None = None) -> None:
        self._drafter_of, self._told = drafter_of, told or {}

    def choose(self, newcomer: Newcomer) -> int:
        """Give the drafter of its sequence."""
        return self._drafter_of[newcomer.sequence]

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Nothing to learn."""

    def describe(self) -> dict[str, Any]:
        """Give what was known beforehand."""
        return self._told


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
