"""Workloads: which requests arrive, and when.

The engine asks a source for the requests that may start now; the source decides the order and the moment.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simulator.arrivals import bind_rows, read_arrivals
from simulator.replay import SequenceTable
from simulator.scenario import ArrivalFile, ClosedLoop, Order, PoissonArrivals, Scenario

_ORDER, _ARRIVALS = 1, 2
"""Streams of random numbers, next to the seed."""


@dataclass(slots=True)
class Request:
    """One request. `sequence` is its index among the sequences served; `counted` is false for a filler.

    Submitted at `arrival_s`, it waits, starts (its prefill begins), emits its first token, and ends.
    """

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool = True
    start_s: float = 0.0
    first_token_s: float = 0.0
    prefill_share_s: float = 0.0
    first_round: int = 0
    replay_start: int = 0


class Source(Protocol):
    """Where requests come from. `counted` requests make the run: it ends when `done`."""

    counted: int
    truncated: int
    """Counted requests that replay only the beginning of their recorded sequence."""

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


def serving_order(sequences: SequenceTable, order: Order, seed: int) -> Iterator[int]:
    """Give indices of sequences forever: pass after pass in trace order, or each pass newly shuffled."""
    rng = np.random.default_rng([seed, _ORDER])
    while True:
        yield from range(len(sequences)) if order == "trace" else rng.permutation(len(sequences)).tolist()


class ClosedSource:
    """A fixed number of clients; see `ClosedLoop`."""

    truncated = 0

    def __init__(self, loop: ClosedLoop, sequences: SequenceTable, seed: int) -> None:
        self.counted = loop.requests or len(sequences) * loop.copies
        order = serving_order(sequences, loop.order, seed)
        self._order = itertools.chain.from_iterable(itertools.repeat(i, loop.copies) for i in order)
        self._sequences = sequences
        self._loop = loop
        self._submitted = self._ended = self._in_flight = 0
        self._queue: deque[Request] = deque()
        self._submit(min(loop.concurrency, self.counted) if not loop.keep_full else loop.concurrency, 0.0)

    def _submit(self, number: int, now: float) -> None:
        for _ in range(number):
            counted = self._submitted < self.counted
            if not counted and not self._loop.keep_full:
                return
            i = next(self._order)
            table = self._sequences
            self._queue.append(
                Request(self._submitted, i, table.prompt_tokens[i], table.output_tokens[i], now, counted)
            )
            self._submitted += 1
            self._in_flight += 1

    @property
    def done(self) -> bool:
        """Whether every counted request has ended."""
        return self._ended == self.counted

    @property
    def next_arrival_s(self) -> float:
        """Never: clients only answer to ends."""
        return float("inf")

    def admit(self, now: float, slots: int) -> list[Request]:
        """Take the oldest of the queue."""
        return [self._queue.popleft() for _ in range(min(slots, len(self._queue)))]

    def waiting(self, now: float) -> int:
        """Length of the queue."""
        return len(self._queue)

    def end(self, request: Request, now: float) -> None:
        """Let the client submit its next request; with copies, when the whole batch has ended."""
        self._ended += request.counted
        self._in_flight -= 1
        if self._loop.copies == 1:
            self._submit(1, now)
        elif self._in_flight == 0:
            self._submit(self._loop.copies, now)


class OpenSource:
    """Requests that arrive at given times, whatever the engine does."""

    def __init__(self, requests: list[Request], truncated: int = 0) -> None:
        self.counted = len(requests)
        self.truncated = truncated
        self._requests = requests
        self._times = [request.arrival_s for request in requests]
        self._next = self._ended = 0

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return self._ended == self.counted

    @property
    def next_arrival_s(self) -> float:
        """Arrival time of the first request that was not admitted."""
        return self._times[self._next] if self._next < self.counted else float("inf")

    def admit(self, now: float, slots: int) -> list[Request]:
        """Take the oldest requests that have arrived."""
        number = min(slots, self.waiting(now))
        taken = self._requests[self._next : self._next + number]
        self._next += number
        return taken

    def waiting(self, now: float) -> int:
        """How many have arrived and were not admitted."""
        return bisect.bisect_right(self._times, now, lo=self._next) - self._next

    def end(self, request: Request, now: float) -> None:
        """Count it."""
        self._ended += 1


def make_source(scenario: Scenario, sequences: SequenceTable) -> Source:
    """Give the source that the scenario's workload describes."""
    load = scenario.workload
    if isinstance(load, ClosedLoop):
        return ClosedSource(load, sequences, scenario.seed)
    if isinstance(load, PoissonArrivals):
        return _poisson(load, sequences, scenario.seed)
    return _from_file(scenario, load, sequences)


def _poisson(load: PoissonArrivals, sequences: SequenceTable, seed: int) -> OpenSource:
    number = load.requests or len(sequences)
    gaps = np.random.default_rng([seed, _ARRIVALS]).exponential(1 / load.rate_rps, number)
    order = itertools.islice(serving_order(sequences, load.order, seed), number)
    return OpenSource(
        [
            Request(k, i, sequences.prompt_tokens[i], sequences.output_tokens[i], time)
            for k, (i, time) in enumerate(zip(order, np.cumsum(gaps).tolist(), strict=True))
        ]
    )


def _from_file(scenario: Scenario, load: ArrivalFile, sequences: SequenceTable) -> OpenSource:
    path = scenario.locate(load.path)
    rows = read_arrivals(path, load.requests)
    bound = bind_rows(rows, sequences, path)
    requests = [
        Request(k, i, row.prompt_tokens, row.output_tokens, row.arrival_s)
        for k, (row, i) in enumerate(zip(rows, bound, strict=True))
    ]
    truncated = sum(r.output_tokens < sequences.output_tokens[r.sequence] for r in requests)
    return OpenSource(requests, truncated)
