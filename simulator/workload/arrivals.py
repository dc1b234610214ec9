"""What is known of an open loop before requests are bound to recordings.

Arrival processes: times in seconds, sorted, from a law and a generator. All exact in distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ScenarioError


@dataclass(frozen=True)
class Prefixes:
    """Prefix blocks of all prompts: request k has `hashes[ends[k-1]:ends[k]]`, ids of `block_tokens` tokens each."""

    block_tokens: int
    hashes: Ints
    ends: Ints

    def of(self, row: int) -> tuple[int, ...]:
        """Give the ids of one request."""
        first = int(self.ends[row - 1]) if row else 0
        return tuple(self.hashes[first : int(self.ends[row])].tolist())

    def rows(self, chosen: Ints) -> Prefixes:
        """Give those of some requests, in that order."""
        sizes = np.diff(self.ends, prepend=0)[chosen]
        ends = np.cumsum(sizes)
        index = np.repeat(self.ends[chosen] - ends, sizes) + np.arange(int(sizes.sum()))
        return Prefixes(self.block_tokens, self.hashes[index], ends)


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival; what is None is not the source's to say. `client` indexes `clients`."""

    arrival_s: Floats
    prompt_tokens: Ints | None = None
    output_tokens: Ints | None = None
    client: Ints | None = None
    clients: tuple[str, ...] = ()
    prefixes: Prefixes | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Give the number of requests."""
        return len(self.arrival_s)

    def rows(self, chosen: Ints) -> Arrivals:
        """Give some requests, in that order."""
        prompt, output, client = (
            None if column is None else column[chosen]
            for column in (self.prompt_tokens, self.output_tokens, self.client)
        )
        prefixes = None if self.prefixes is None else self.prefixes.rows(chosen)
        return Arrivals(
            arrival_s=self.arrival_s[chosen],
            prompt_tokens=prompt,
            output_tokens=output,
            client=client,
            clients=self.clients,
            prefixes=prefixes,
            provenance=self.provenance,
        )

    def limited(self, requests: int | None, duration_s: float | None, rate_multiplier: float | None) -> Arrivals:
        """Give them sorted (equal times as they were), compressed in time, and cut.

        Raises `ScenarioError` where none is left, or fewer than `requests` without a `duration_s` to explain it.
        """
        times = self.arrival_s / rate_multiplier if rate_multiplier is not None else self.arrival_s
        order = np.argsort(times, kind="stable")
        if duration_s is not None:
            order = order[times[order] < duration_s]
        elif requests is not None and len(order) < requests:
            raise ScenarioError(f"workload.requests: must be at most the {len(order)} that there are, got {requests}")
        if len(order) == 0:
            raise ScenarioError("workload: must have at least one request" + _before(duration_s))
        chosen = self.rows(order[:requests])
        return replace(chosen, arrival_s=times[order[:requests]])


def _before(duration_s: float | None) -> str:
    return f" before duration_s = {duration_s:g}, got none" if duration_s is not None else ", got none"


Gaps = Callable[[int], Floats]
"""Draws so many gaps; drawing twice is like drawing once."""


@dataclass(frozen=True)
class Limits:
    """Where arrivals end: after `number` of them, or before `until_s`, whichever comes first."""

    number: int | None = None
    until_s: float = math.inf


def cumulate(gaps: Gaps, mean: float, limits: Limits) -> Floats:
    """Give the times that `gaps` (of the mean `mean`) lead to, from the first gap after 0 on."""

    def block(left: float) -> int:
        enough = 16 + int(1.1 * left / mean) if left < math.inf else math.inf
        return int(min(enough, math.inf if limits.number is None else limits.number))

    drawn = gaps(block(limits.until_s))
    times = np.cumsum(drawn)
    while times[-1] < limits.until_s and (limits.number is None or len(times) < limits.number):
        drawn = np.concatenate((drawn, gaps(block(limits.until_s - float(times[-1])))))
        times = np.cumsum(drawn)
    times = times[: limits.number]
    return times[times < limits.until_s]


def poisson(rate_rps: float, limits: Limits, rng: np.random.Generator) -> Floats:
    """Give Poisson arrivals: independent exponential gaps."""
    return cumulate(lambda number: rng.exponential(1 / rate_rps, number), 1 / rate_rps, limits)


def gamma(rate_rps: float, cv: float, limits: Limits, rng: np.random.Generator) -> Floats:
    """Give a renewal process with gamma gaps of shape 1 / cv^2, the first gap included; cv = 1 is Poisson."""
    shape = 1 / cv**2
    return cumulate(lambda number: rng.gamma(shape, cv**2 / rate_rps, number), 1 / rate_rps, limits)


class PiecewiseRate:
    """A rate that is constant between instants: (start_s, rate_rps) pairs, the last one for ever or until `repeat_s`.

    `mass` is its integral L(t), the arrivals expected until t; `when` is the inverse.
    """

    def __init__(self, rates: Sequence[tuple[float, float]], repeat_s: float | None = None) -> None:
        self._starts, self._rates = (np.array(column, dtype=np.float64) for column in zip(*rates, strict=True))
        self._masses = np.concatenate(([0.0], np.cumsum(np.diff(self._starts) * self._rates[:-1])))
        self._repeat_s = repeat_s
        self._period = math.inf
        if repeat_s is not None:
            self._period = float(self._masses[-1] + (repeat_s - self._starts[-1]) * self._rates[-1])

    def mass(self, time_s: float) -> float:
        """Give L(time_s)."""
        if time_s == math.inf:
            return math.inf
        periods, rest = divmod(time_s, self._repeat_s) if self._repeat_s is not None else (0.0, time_s)
        i = int(np.searchsorted(self._starts, rest, side="right")) - 1
        here = float(self._masses[i] + (rest - self._starts[i]) * self._rates[i])
        return here if periods == 0 else periods * self._period + here

    def when(self, mass: Floats) -> Floats:
        """Give the times at which L reaches `mass`; no time with a rate of zero is ever given."""
        periods, rest = np.zeros_like(mass), mass
        if self._repeat_s is not None:
            periods, rest = np.divmod(mass, self._period)
        # Where the rate is zero two masses are equal: take the later start.
        i = np.searchsorted(self._masses, rest, side="right") - 1
        times = self._starts[i] + (rest - self._masses[i]) / self._rates[i]
        return times if self._repeat_s is None else times + periods * self._repeat_s


def piecewise(rate: PiecewiseRate, limits: Limits, rng: np.random.Generator) -> Floats:
    """Give an inhomogeneous Poisson process by time rescaling: the unit-rate process mapped through 1 / L.

    Cinlar 1975: N is Poisson with rate r(t) iff its times, mapped by L(t) = integral of r, are Poisson with rate 1.
    """
    within = Limits(limits.number, rate.mass(limits.until_s))
    return rate.when(cumulate(lambda number: rng.exponential(1.0, number), 1.0, within))
