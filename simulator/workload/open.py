"""Open loops: requests that arrive at given times, whatever the engine does."""

from __future__ import annotations

import bisect
from typing import Any

from simulator.workload.arrivals import Arrivals
from simulator.workload.binding import Bindings
from simulator.workload.request import Request


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
