"""What an observed run asks of a workload: its protocol, stated by its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Request(Protocol):
    """One request of a workload; `sequence` is the index of its prompt, `counted` is false for a filler."""

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool


R = TypeVar("R", bound=Request)
R_co = TypeVar("R_co", bound=Request, covariant=True)


class Source(Protocol[R]):
    """Where the requests of one repeat come from, which ends when it is `done`; times are seconds from its start.

    An open loop knows every arrival beforehand; in a closed one the next request arrives when one has ended.
    """

    counted: int

    @property
    def done(self) -> bool:
        """Whether every counted request has ended."""
        ...

    @property
    def next_arrival_s(self) -> float:
        """When the next request arrives, if nothing else happens before; infinite where none will."""
        ...

    def admit(self, now: float, slots: int) -> Sequence[R]:
        """Take at most `slots` requests that have arrived, oldest first."""
        ...

    def end(self, request: R, now: float) -> None:
        """Hear that `request` has ended."""
        ...
