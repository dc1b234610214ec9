"""Choosing one drafter for a request when it begins to decode: the protocol, and rules that do not learn.

A choice holds until the request ends (or its replica fails). A policy sees the prompt, its label and what came of
earlier requests; an oracle says that it is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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
