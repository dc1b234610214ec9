"""A request, and where requests come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class Request:
    """One request. `sequence` is its index among the sequences served; `counted` is false for a filler.

    Submitted at `arrival_s`; what becomes of it then, the engine remembers (`simulator.serving.slots`).
    """

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool = True
    client: str | None = None
    """Who sent it, where clients have names."""
    priority: int = 0
    """Smaller goes first, as in vLLM."""
    deadline_s: float = math.inf
    """When it should have ended, in simulated time."""
    prefix_hashes: tuple[int, ...] = ()
    """One id for each block of `prefix_block_tokens` prompt tokens, the last block maybe not full. Equal ids: equal
    tokens in the block and in all before it."""
    prefix_block_tokens: int = 0
    resampled_tokens: int = 0
    """Output tokens beyond its recording, continued by resampled blocks (`simulator.playback.replay`)."""
    carried_tokens: int = 0
    """Tokens of the beginning of its prompt whose keys and values come with it (`simulator.cascade.items`)."""

    @property
    def resampled(self) -> bool:
        """Whether a part of its trajectory was never recorded as such."""
        return self.resampled_tokens > 0


class Source(Protocol):
    """Where requests come from. `counted` requests make the run: it ends when `done`."""

    counted: int
    truncated: int
    """Counted requests that replay only the beginning of their recorded sequence."""
    resampled_requests: int
    resampled_tokens: int
    """Counted requests whose output is longer than their recording, and by how many tokens in all."""
    provenance: dict[str, Any]
    """Where arrivals and lengths come from."""

    @property
    def done(self) -> bool:
        """Whether every counted request has ended."""
        ...

    @property
    def next_arrival_s(self) -> float:
        """When the next request arrives, if nothing else happens before."""
        ...

    def admit(self, now: float, slots: int) -> list[Request]:
        """Take at most `slots` waiting requests, oldest first."""
        ...

    def waiting(self, now: float) -> int:
        """How many have arrived and were not admitted."""
        ...

    def end(self, request: Request, now: float) -> None:
        """Hear that `request` has ended."""
        ...
