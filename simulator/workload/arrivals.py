"""What is known of an open loop before requests are bound to recordings."""

from __future__ import annotations

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
        return Arrivals(self.arrival_s[chosen], prompt, output, client, self.clients, prefixes, self.provenance)

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
