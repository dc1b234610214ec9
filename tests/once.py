"""Every prompt once: the workload of a run that is there for its text, before any TraceSet or scenario is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from calibration.common.errors import CalibrationError
from calibration.observe.prompts import Prompt


@dataclass(frozen=True)
class Turn:
    """A request for one of the prompts."""

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool = True


class Once:
    """Serves every prompt once, in order, `concurrency` at a time, each with an output of `output_tokens`.

    A workload for `calibration.engines.drive`; what comes of it is a measured run for
    `calibration.importers.measured_run`. `CalibrationError` for sizes below 1 and prompts without token ids.
    """

    def __init__(self, prompts: Sequence[Prompt], output_tokens: int, *, concurrency: int = 1) -> None:
        for name, value in (
            ("output_tokens", output_tokens),
            ("concurrency", concurrency),
            ("prompts", len(prompts)),
        ):
            if value < 1:
                raise CalibrationError(f"workload: {name}: must be at least 1, got {value}")
        for prompt in prompts:
            if not prompt.token_ids:
                raise CalibrationError(
                    f"prompt of {prompt.sequence_id}: must have token ids to be submitted, has none"
                )
        self.counted = len(prompts)
        self._lengths = [len(prompt.token_ids or ()) for prompt in prompts]
        self._output_tokens = output_tokens
        self._next = self._ended = 0
        self._queue: deque[Turn] = deque()
        for _ in range(min(concurrency, self.counted)):
            self._arrive(0.0)

    def _arrive(self, now: float) -> None:
        if self._next < self.counted:
            self._queue.append(Turn(self._next, self._next, self._lengths[self._next], self._output_tokens, now))
            self._next += 1

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return self._ended == self.counted

    @property
    def next_arrival_s(self) -> float:
        """When the oldest request that waits arrived; never, where none does."""
        return self._queue[0].arrival_s if self._queue else math.inf

    def admit(self, now: float, slots: int) -> list[Turn]:
        """Take the oldest requests that wait."""
        return [self._queue.popleft() for _ in range(min(slots, len(self._queue)))]

    def end(self, request: Turn, now: float) -> None:
        """Let the next one come."""
        self._ended += 1
        self._arrive(now)
