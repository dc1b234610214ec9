"""Closed loop: a fixed number of clients that wait for their answers, and maybe think before they ask again.

Open loops: requests that arrive at given times, whatever the engine does.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from simulator.scenario.workload import ClosedLoop
from simulator.workload.arrivals import Arrivals
from simulator.workload.binding import Binder, Bindings
from simulator.workload.lengths import THINK, Request, stream


class OpenSource:
    """Serves `arrivals` bound by `bindings`.

    A `Request` is made when it is admitted, so that those which have ended leave nothing behind.
    """

    def __init__(self, arrivals: Arrivals, bindings: Bindings) -> None:
        self.counted = len(arrivals)
        self.truncated = bindings.truncated
        resampled = bindings.resampled_tokens
        self.resampled_requests = int((resampled > 0).sum())
        self.resampled_tokens = int(resampled.sum())
        self.provenance: dict[str, Any] = arrivals.provenance
        self._times: list[float] = arrivals.arrival_s.tolist()
        self._arrivals, self._bindings, self._resampled = arrivals, bindings, resampled
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
        taken = [self._request(row) for row in range(self._next, self._next + number)]
        self._next += number
        return taken

    def waiting(self, now: float) -> int:
        """How many have arrived and were not admitted."""
        return bisect.bisect_right(self._times, now, lo=self._next) - self._next

    def end(self, request: Request, now: float) -> None:
        """Count it."""
        self._ended += 1

    def _request(self, row: int) -> Request:
        arrivals, bound = self._arrivals, self._bindings
        code = int(arrivals.client[row]) if arrivals.client is not None else -1
        prefixes = arrivals.prefixes
        return Request(
            row,
            int(bound.sequence[row]),
            int(bound.prompt_tokens[row]),
            int(bound.output_tokens[row]),
            self._times[row],
            client=arrivals.clients[code] if code >= 0 else None,
            priority=int(bound.priority[row]),
            deadline_s=self._times[row] + float(bound.deadline_s[row]),
            prefix_hashes=() if prefixes is None else prefixes.of(row),
            prefix_block_tokens=0 if prefixes is None else prefixes.block_tokens,
            resampled_tokens=int(self._resampled[row]),
        )


_BLOCK = 256
"""Requests that are bound, and think times that are drawn, at once."""
Bound = tuple[int, int, int, int, int, float]
"""sequence, prompt tokens, output tokens, output tokens recorded, priority, deadline after arrival."""


class ClosedSource:
    """A fixed number of clients; see `ClosedLoop`.

    Request k is the k-th that any client decides to send; what it replays and how long its client thinks before it
    depend on k and the seed alone. In the long run X = N / (R + Z): throughput, clients, mean response and think time
    (interactive response time law; Denning and Buzen 1978).
    """

    def __init__(self, loop: ClosedLoop, binder: Binder, sequences: int, seed: int) -> None:
        self.counted = loop.requests or sequences * loop.copies
        self.truncated = self.resampled_requests = self.resampled_tokens = 0
        self.provenance: dict[str, Any] = {"arrivals": "closed loop"}
        self._loop = loop
        self._rows = itertools.chain.from_iterable(itertools.repeat(row, loop.copies) for row in _rows(binder))
        self._think = _think_times(loop, seed)
        self._submitted = self._ended = self._in_flight = 0
        self._thinking: list[tuple[float, int, Request]] = []
        self._queue: deque[Request] = deque()
        first = loop.concurrency if loop.keep_full else min(loop.concurrency, self.counted)
        for client in range(first):
            self._submit(str(client), client * loop.starts_apart_s)

    def _submit(self, client: str | None, now: float) -> None:
        """Let `client` think, and then send its next request."""
        counted = self._submitted < self.counted
        if not counted and not self._loop.keep_full:
            return
        sequence, prompt, output, recorded, priority, deadline = next(self._rows)
        resampled = max(output - recorded, 0)
        arrival = now + next(self._think)
        request = Request(
            self._submitted,
            sequence,
            prompt,
            output,
            arrival,
            counted,
            client=client,
            priority=priority,
            deadline_s=arrival + deadline,
            resampled_tokens=resampled,
        )
        if counted:
            self.truncated += output < recorded
            self.resampled_requests += resampled > 0
            self.resampled_tokens += resampled
        self._submitted += 1
        self._in_flight += 1
        heapq.heappush(self._thinking, (arrival, request.id, request))

    def _arrive(self, now: float) -> None:
        while self._thinking and self._thinking[0][0] <= now:
            self._queue.append(heapq.heappop(self._thinking)[2])

    @property
    def done(self) -> bool:
        """Whether every counted request has ended."""
        return self._ended == self.counted

    @property
    def next_arrival_s(self) -> float:
        """When the first client has thought enough; never, where all wait for answers."""
        if self._queue:
            return self._queue[0].arrival_s
        return self._thinking[0][0] if self._thinking else float("inf")

    def admit(self, now: float, slots: int) -> list[Request]:
        """Take the oldest of the queue."""
        self._arrive(now)
        return [self._queue.popleft() for _ in range(min(slots, len(self._queue)))]

    def waiting(self, now: float) -> int:
        """Length of the queue."""
        self._arrive(now)
        return len(self._queue)

    def end(self, request: Request, now: float) -> None:
        """Let its client go on; with copies, when the whole batch has ended."""
        self._ended += request.counted
        self._in_flight -= 1
        if self._loop.copies == 1:
            self._submit(request.client, now)
        elif self._in_flight == 0:
            for client in range(self._loop.copies):
                self._submit(str(client), now)


def _rows(binder: Binder) -> Iterator[Bound]:
    """Give bound requests without end."""
    while True:
        bound = binder.bind(_BLOCK)
        columns = (
            bound.sequence,
            bound.prompt_tokens,
            bound.output_tokens,
            bound.recorded_tokens,
            bound.priority,
            bound.deadline_s,
        )
        yield from zip(*(column.tolist() for column in columns), strict=True)


def _think_times(loop: ClosedLoop, seed: int) -> Iterator[float]:
    """Give think times without end."""
    mean = loop.think_s or 0.0
    if loop.think_law != "exponential":
        return itertools.repeat(mean)
    rng = stream(seed, THINK)
    return itertools.chain.from_iterable(rng.exponential(mean, _BLOCK).tolist() for _ in itertools.count())
