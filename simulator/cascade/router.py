"""The router of a cascade: takes requests from outside, sends them from stage to stage, and hears when they end.

Each stage is a `Fleet` with a `StageSource`; the router fills these. All stages live in one SimPy environment.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import simpy

from calibration.common.arrays import Ints
from simulator.cascade.items import Transfer
from simulator.serving.fleet import Fleet
from simulator.workload import Request, Source

_ALL = 1 << 60


@dataclass(slots=True)
class CascadeRequest:
    """One request on its way through the stages of `path`; `transfers` are those made so far."""

    request: Request
    path: tuple[int, ...]
    step: int = 0
    transfers: list[Transfer] = field(default_factory=list)
    finish_s: float = math.nan


@dataclass(frozen=True)
class StageItems:
    """What one stage knows of the items: which recorded sequence answers for each, and its output tokens."""

    sequence: Ints
    output_tokens: Ints


class StageSource:
    """The queue of requests on their way to one stage: the `Source` of its fleet."""

    def __init__(self, router: CascadeRouter, stage: int) -> None:
        self._desk, self._stage = router, stage
        self._queue: list[tuple[float, int, Request]] = []
        self.counted = self.truncated = self.resampled_requests = self.resampled_tokens = 0
        self.provenance: dict[str, Any] = {"arrivals": "cascade", "lengths": "items"}

    def put(self, request: Request) -> None:
        """Let `request` arrive at its time."""
        heapq.heappush(self._queue, (request.arrival_s, request.id, request))

    @property
    def done(self) -> bool:
        """Whether every counted request has its answer."""
        return self._desk.done

    @property
    def next_arrival_s(self) -> float:
        """When the next request arrives that is on its way."""
        return self._queue[0][0] if self._queue else math.inf

    def admit(self, now: float, slots: int) -> list[Request]:
        """Take the oldest requests that have arrived."""
        self._desk.pump(now)
        taken: list[Request] = []
        while self._queue and self._queue[0][0] <= now and len(taken) < slots:
            taken.append(heapq.heappop(self._queue)[2])
        return taken

    def waiting(self, now: float) -> int:
        """How many have arrived and were not admitted."""
        return sum(arrival <= now for arrival, _, _ in self._queue)

    def end(self, request: Request, now: float) -> None:
        """Tell the router that this stage has answered."""
        self._desk.answered(request, now)


class CascadeRouter:
    """Sends every request along the path of its item, and its last answer back to where it came from.

    `paths` and `prompt_tokens` per item, `items_of` per stage. `entry` binds requests to items: the ``sequence`` of
    its requests is an item. `hand` gives the transfer from a stage to another of a prompt. A request is at one stage
    at a time; it arrives at the next when its transfer is through.
    """

    def __init__(
        self,
        env: simpy.Environment,
        entry: Source,
        paths: tuple[tuple[int, ...], ...],
        prompt_tokens: tuple[int, ...],
        items_of: list[StageItems],
        hand: Callable[[int, int, int], Transfer],
        ended: Callable[[int], None],
    ) -> None:
        self.sources = [StageSource(self, stage) for stage in range(len(items_of))]
        self.sent: dict[int, CascadeRequest] = {}
        self._env, self._entry, self._paths, self._prompt_tokens = env, entry, paths, prompt_tokens
        self._lots, self._hand, self._ended = items_of, hand, ended
        self._fleets: list[Fleet] = []
        self._armed_s = math.inf

    @property
    def done(self) -> bool:
        """Whether every counted request has its answer."""
        return self._entry.done

    def open(self, fleets: list[Fleet]) -> None:
        """Let requests in, now that there is a fleet for every stage."""
        self._fleets = fleets
        self.pump(self._env.now)

    def pump(self, now: float) -> None:
        """Send what has come in by now to its first stage; the timer is set for the arrival after that."""
        if not self._fleets:
            return
        for request in self._entry.admit(now, _ALL):
            one = CascadeRequest(request, self._paths[request.sequence])
            self.sent[request.id] = one
            self._send(one, request.arrival_s, Transfer(), now)
        if self._entry.next_arrival_s < self._armed_s:
            self._arm(self._entry.next_arrival_s, now)

    def _arm(self, due_s: float, now: float) -> None:
        """Set the timer to `due_s`; an older one that is due later rings in vain."""
        self._armed_s = due_s

        def ring(_: simpy.Event) -> None:
            if self._armed_s == due_s:
                self._armed_s = math.inf
            self.pump(self._env.now)

        callbacks = self._env.timeout(due_s - now).callbacks
        assert callbacks is not None
        callbacks.append(ring)

    def _send(self, one: CascadeRequest, arrival_s: float, transfer: Transfer, now: float) -> None:
        """Let `one` arrive at the stage where it now belongs."""
        stage, origin = one.path[one.step], one.request
        stage_items = self._lots[stage]
        self.sources[stage].put(
            Request(
                origin.id,
                int(stage_items.sequence[origin.sequence]),
                self._prompt_tokens[origin.sequence],
                int(stage_items.output_tokens[origin.sequence]),
                arrival_s,
                origin.counted,
                client=origin.client,
                priority=origin.priority,
                deadline_s=origin.deadline_s,
                carried_tokens=transfer.carried_tokens,
            )
        )
        self._fleets[stage].deliver(now)

    def answered(self, request: Request, now: float) -> None:
        """Hear that a stage has answered: hand the request on, or give its answer back."""
        one = self.sent[request.id]
        if one.step + 1 < len(one.path):
            here, there = one.path[one.step : one.step + 2]
            transfer = self._hand(here, there, request.prompt_tokens)
            one.step += 1
            one.transfers.append(transfer)
            self._send(one, now + transfer.seconds, transfer, now)
            return
        one.finish_s = now
        self._entry.end(one.request, now)
        self._ended(one.request.counted)
        self.pump(now)
