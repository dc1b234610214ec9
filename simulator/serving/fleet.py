"""The fleet: one or several engines behind a router that hands arrivals to them.

Routing to a replica: which of those that are up serves a request, by name from ``[routing] replica``.

A policy sees the request and, of every replica, what a router keeps count of: outstanding requests, their tokens of
prompt and output so far, and, where it says so, the prefix caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, assert_never

import simpy

from calibration.common.errors import ScenarioError
from calibration.common.plugins import make_plugin, need
from simulator.scenario.fleet import (
    LeastLoaded,
    PluginRouter,
    PowerOfTwo,
    PrefixAffinity,
    ReplicaRouting,
    RoundRobin,
    SessionHash,
)
from simulator.serving.engine import Engine
from simulator.serving.kv import Job
from simulator.serving.scheduler import Order
from simulator.workload import Source

_MASK = (1 << 64) - 1


class Replica(Protocol):
    """What a router knows of a replica."""

    name: str
    requests: int
    tokens: int

    def cached_tokens(self, job: Job) -> int:
        """Give how many tokens of the beginning of `job` are in the prefix cache."""
        ...


R = TypeVar("R", bound=Replica)


class ReplicaPolicy(Protocol):
    """Chooses among the replicas that are up."""

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Give the replica that is to serve `job`; `replicas` is never empty."""
        ...


class InTurn:
    """See `RoundRobin`."""

    def __init__(self) -> None:
        self._last = ""

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Give the one after the last one."""
        names = [replica.name for replica in replicas]
        chosen = replicas[(names.index(self._last) + 1) % len(names) if self._last in names else 0]
        self._last = chosen.name
        return chosen


class Emptiest:
    """See `LeastLoaded`."""

    def __init__(self, by: str) -> None:
        self._by = by

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Give the least loaded one."""
        return min(replicas, key=lambda replica: int(getattr(replica, self._by)))


class OfTwo:
    """See `PowerOfTwo`. The draw depends on seed and request alone."""

    def __init__(self, by: str, seed: int) -> None:
        self._emptiest, self._seed = Emptiest(by), seed

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Give the less loaded of two different ones."""
        number = len(replicas)
        if number == 1:
            return replicas[0]
        draw = mixed(mixed(self._seed) ^ job.request.id)
        first = draw % number
        second = (first + 1 + (draw >> 32) % (number - 1)) % number
        return self._emptiest.choose(job, (replicas[first], replicas[second]))


class Affine:
    """See `PrefixAffinity`."""

    def __init__(self, balance_requests: int) -> None:
        self._balance = balance_requests
        self._emptiest = Emptiest("requests")

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Give the one with the longest cached prefix, unless the fleet is out of balance."""
        loads = [replica.requests for replica in replicas]
        if max(loads) - min(loads) > self._balance:
            return self._emptiest.choose(job, replicas)
        cached = [replica.cached_tokens(job) for replica in replicas]
        best = max(cached)
        return self._emptiest.choose(job, [r for r, tokens in zip(replicas, cached, strict=True) if tokens == best])


class Rendezvous:
    """See `SessionHash`."""

    def __init__(self, seed: int) -> None:
        self._seed = mixed(seed)

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Give the one with the highest hash."""
        request = job.request
        session = f"client {request.client}" if request.client is not None else f"request {request.id}"
        return max(replicas, key=lambda replica: mixed(self._seed ^ hash_of(f"{session} on {replica.name}")))


def mixed(number: int) -> int:
    """Give 64 well mixed bits of `number` (the finaliser of SplitMix64; Steele, Lea and Flood 2014)."""
    z = (number + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def hash_of(text: str) -> int:
    """Give 64 bits of `text`, the same in every process (FNV-1a)."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value


def make_replica_policy(settings: ReplicaRouting, seed: int) -> ReplicaPolicy:
    """Give the policy that a scenario names."""
    match settings:
        case LeastLoaded(by=by):
            return Emptiest(by)
        case PowerOfTwo(by=by):
            return OfTwo(by, seed)
        case PrefixAffinity(balance_requests=balance):
            return Affine(balance)
        case SessionHash():
            return Rendezvous(seed)
        case PluginRouter():
            return _FromOutside(settings, seed)
        case RoundRobin():
            return InTurn()
    assert_never(settings)


class _FromOutside:
    """A router that an entry point (settings, seed) -> router makes; what it chooses is checked."""

    def __init__(self, settings: PluginRouter, seed: int) -> None:
        self._name, self._place = settings.name, "routing.replica.policy"
        self._router = make_plugin(settings, self._place, ScenarioError, seed)
        need(self._router, ("choose",), "a router", self._name, self._place, ScenarioError)

    def choose(self, job: Job, replicas: Sequence[R]) -> R:
        """Ask the router."""
        chosen: R = self._router.choose(job, replicas)
        if not any(chosen is replica for replica in replicas):
            raise ScenarioError(
                f"{self._place}: plugin '{self._name}' must choose one of the {len(replicas)} replicas that it is "
                f"given, got {chosen!r}"
            )
        return chosen


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
