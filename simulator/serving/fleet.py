"""The fleet: one or several engines behind a router that hands arrivals to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import simpy

from simulator.serving.batching import Order
from simulator.serving.engine import Engine
from simulator.serving.job import Job
from simulator.serving.replica_routing import ReplicaPolicy
from simulator.workload import Source

_ALL = 1 << 60


class Fleet:
    """Routes every request at its arrival, and again when its replica fails; the `Inbox` of its engines.

    Without a `policy` there is one engine, which looks for arrivals itself when it is idle. With one, a timer wakes
    the router at each arrival, and requests wait here while every replica is down.
    """

    def __init__(
        self,
        env: simpy.Environment,
        source: Source,
        order: Order,
        policy: ReplicaPolicy | None = None,
        ended: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.engines: list[Engine] = []
        self.requeued = 0
        self._env, self._source, self._order, self._policy, self._ended = env, source, order, policy, ended
        self._homeless: list[Job] = []
        self._armed_s = math.inf

    @property
    def done(self) -> bool:
        """Whether every counted request has ended."""
        return self._source.done

    def start(self) -> None:
        """Route what is there at the beginning, and wait for the next arrival."""
        if self._policy is not None:
            self.deliver(self._env.now)

    def deliver(self, now: float) -> None:
        """Route what has arrived; the timer is set for the arrival after that."""
        for request in self._source.admit(now, _ALL):
            self._route(Job(request, self._order(request)))
        if self._policy is not None and self._source.next_arrival_s < self._armed_s:
            self._arm(self._source.next_arrival_s, now)

    def _arm(self, due_s: float, now: float) -> None:
        """Set the timer to `due_s`; an older one that is due later rings in vain."""
        self._armed_s = due_s

        def ring(_: simpy.Event) -> None:
            if self._armed_s == due_s:
                self._armed_s = math.inf
            self.deliver(self._env.now)

        callbacks = self._env.timeout(due_s - now).callbacks
        assert callbacks is not None
        callbacks.append(ring)

    def _route(self, job: Job) -> None:
        if self._policy is None:
            self.engines[0].submit(job)
            return
        up = [engine for engine in self.engines if engine.up]
        if not up:
            self._homeless.append(job)
            return
        self._policy.choose(job, up).submit(job)

    def wait(self, engine: Engine) -> simpy.Event:
        """Give the event that ends the idle time of `engine`."""
        if self._policy is None:
            return self._env.timeout(self._source.next_arrival_s - self._env.now)
        engine.awakening = self._env.event()
        return engine.awakening

    def ended(self, jobs: list[Job], now: float) -> None:
        """Tell the source, whose clients may answer with new requests."""
        counted = 0
        for job in jobs:
            counted += job.request.counted
            self._source.end(job.request, now)
        self._ended(counted)

    def requeue(self, jobs: list[Job]) -> None:
        """Route what a failed engine had, and what waited for an engine to come back."""
        self.requeued += len(jobs)
        waiting, self._homeless = self._homeless + jobs, []
        for job in waiting:
            self._route(job)
