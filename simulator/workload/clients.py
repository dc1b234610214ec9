"""Mixtures of clients as ServeGen (arXiv 2505.09999) describes production load.

Each client has its own rate over windows of time, its own burstiness and its own lengths; their arrivals are
superposed. As in ServeGen's generator, a window of rate r and length w holds the number of arrivals that was measured
in it, r * w, with gaps drawn from the window's law and scaled to fill it. So rates come out as stated even where gaps
are so bursty (Weibull with a shape of 0.1) that a free renewal process would not show its rate in days; that the gaps
of a window have their law is an approximation, the better the more of them there are. Unlike ServeGen, which rounds
up and then loses the last arrival, r * w is rounded at random, up or down, so that its mean is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.workload.arrivals import Arrivals
from simulator.workload.lengths import Pmf
from simulator.workload.processes import Limits
from simulator.workload.streams import ARRIVALS, LENGTHS, stream


@dataclass(frozen=True)
class Law:
    """Gaps up to a factor: gamma(`shape`), Weibull(`shape`) or exponential."""

    name: str
    shape: float

    def gaps(self, number: int, rng: np.random.Generator) -> Floats:
        """Draw gaps."""
        if self.name == "gamma":
            return rng.gamma(self.shape, 1.0, number)
        if self.name == "weibull":
            return rng.weibull(self.shape, number)
        return rng.exponential(1.0, number)


@dataclass(frozen=True)
class Window:
    """Seconds from `start_s` to `end_s`, the rate in them, and the law of the gaps."""

    start_s: float
    end_s: float
    rate_rps: float
    law: Law

    def arrivals(self, rng: np.random.Generator) -> Floats:
        """Give the arrival times within."""
        seconds = self.end_s - self.start_s
        number = int(self.rate_rps * seconds + rng.random())
        if number == 0:
            return np.zeros(0)
        points = np.cumsum(self.law.gaps(number + 1, rng))
        # NOTE: with shapes near SMALLEST_SHAPE all of a few gaps may underflow; then they are taken as equal.
        whole = points[-1] if points[-1] > 0 else np.inf
        inside = points[:-1] / whole if whole < np.inf else np.arange(1, number + 1) / (number + 1)
        times: Floats = self.start_s + seconds * inside
        return times


@dataclass(frozen=True)
class Client:
    """One client: its windows, in order, and the laws of its lengths where they are known."""

    name: str
    windows: tuple[Window, ...]
    prompt: Pmf | None = None
    output: Pmf | None = None

    def arrivals(self, until_s: float, rng: np.random.Generator) -> Floats:
        """Give its arrival times from 0 to `until_s`; a later `until_s` only adds to them."""
        times = [window.arrivals(rng) for window in self.windows if window.start_s < until_s]
        joined = np.concatenate(times) if times else np.zeros(0)
        return joined[(joined >= 0) & (joined < until_s)]


def superpose(clients: Iterable[Client], limits: Limits, seed: int) -> Arrivals:
    """Give the arrivals of all clients together, with the lengths of those that know them.

    A client's draws depend on seed and name alone: leaving another client out changes nothing for it.
    """
    crowd = tuple(clients)
    end = min(limits.until_s, max((window.end_s for client in crowd for window in client.windows), default=0.0))
    until = end if limits.number is None else min(end, _guess(crowd, limits.number))
    while True:
        per_client = [client.arrivals(until, stream(seed, ARRIVALS, client.name)) for client in crowd]
        if limits.number is None or sum(map(len, per_client)) >= limits.number or until >= end:
            break
        until = min(2 * until, end)
    who = np.repeat(np.arange(len(crowd)), [len(times) for times in per_client])
    times = np.concatenate(per_client) if crowd else np.zeros(0)
    prompt, output = _lengths(crowd, per_client, seed)
    arrivals = Arrivals(times, prompt, output, who, tuple(client.name for client in crowd))
    return arrivals.rows(np.argsort(times, kind="stable")[: limits.number])


def _guess(clients: tuple[Client, ...], number: int) -> float:
    """Give the end of the window in which `number` arrivals are expected to be reached."""
    windows = [window for client in clients for window in client.windows]
    ends = sorted({window.end_s for window in windows})
    for end in ends:
        mass = sum(w.rate_rps * (min(w.end_s, end) - w.start_s) for w in windows if w.start_s < end)
        if mass >= number:
            return end
    return ends[-1] if ends else 0.0


def _lengths(clients: tuple[Client, ...], per_client: list[Floats], seed: int) -> tuple[Ints | None, Ints | None]:
    """Draw prompt and output tokens of every client's arrivals; None where no lengths are known."""
    if not clients or clients[0].prompt is None or clients[0].output is None:
        return None, None
    drawn: tuple[list[Ints], list[Ints]] = ([], [])
    for client, times in zip(clients, per_client, strict=True):
        for which, law in enumerate((client.prompt, client.output)):
            assert law is not None  # all clients have lengths or none has
            drawn[which].append(law.draw(len(times), stream(seed, LENGTHS, client.name, which)))
    return np.concatenate(drawn[0]), np.concatenate(drawn[1])
