"""Token counts of prompts and outputs that do not come with the arrivals.

Streams of random numbers of a workload, next to the seed: what one stream is used for never shifts another.

The k-th draw of a stream belongs to the k-th request (of a client, where clients have streams of their own), so the
workload is the same for every policy and for any number of workers.

A request, and where requests come from.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.scenario.workload import (
    ConstantTokens,
    DrawnLengths,
    Lengths,
    LognormalTokens,
    PmfTokens,
    RecordedLengths,
    SampledLengths,
)
from simulator.workload.files import CsvColumns


@dataclass(slots=True)
class Request:
    """One request. `sequence` is its index among the sequences served; `counted` is false for a filler.

    Submitted at `arrival_s`; what becomes of it then, the engine remembers (`simulator.serving.kv`).
    """

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool = True
    client: str | None = None
    """Who sent it, where clients have names."""
    priority: int = 0
    """Smaller goes first, as in vLLM."""
    deadline_s: float = math.inf
    """When it should have ended, in simulated time."""
    prefix_hashes: tuple[int, ...] = ()
    """One id for each block of `prefix_block_tokens` prompt tokens, the last block maybe not full. Equal ids: equal
    tokens in the block and in all before it."""
    prefix_block_tokens: int = 0
    resampled_tokens: int = 0
    """Output tokens beyond its recording, continued by resampled blocks (`simulator.playback.replay`)."""
    carried_tokens: int = 0
    """Tokens of the beginning of its prompt whose keys and values come with it (`simulator.cascade.items`)."""

    @property
    def resampled(self) -> bool:
        """Whether a part of its trajectory was never recorded as such."""
        return self.resampled_tokens > 0


class Source(Protocol):
    """Where requests come from. `counted` requests make the run: it ends when `done`."""

    counted: int
    truncated: int
    """Counted requests that replay only the beginning of their recorded sequence."""
    resampled_requests: int
    resampled_tokens: int
    """Counted requests whose output is longer than their recording, and by how many tokens in all."""
    provenance: dict[str, Any]
    """Where arrivals and lengths come from."""

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


ORDER, ARRIVALS, MIX, LENGTHS, THINK, CLASSES = 1, 2, 3, 4, 5, 6


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """Give the generator of `seed` for the stream `key`; words stand for their CRC-32."""
    return np.random.default_rng(
        [seed, *(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key)]
    )


Draw = Callable[[int], Ints | None]
"""Gives so many token counts, or None where they are as recorded; drawing twice is like drawing once."""


class Pmf:
    """Token counts with probabilities in proportion to weights."""

    def __init__(self, tokens: Ints, weights: Floats) -> None:
        self.tokens = tokens
        self._cumulated = np.cumsum(weights) / np.sum(weights)

    def draw(self, number: int, rng: np.random.Generator) -> Ints:
        """Draw by inversion."""
        index = np.searchsorted(self._cumulated, rng.random(number), side="right")
        return self.tokens[np.minimum(index, len(self.tokens) - 1)]


class Lognormal:
    """Lognormal with a given mean and coefficient of variation: sigma^2 = ln(1 + cv^2), mu = ln(mean) - sigma^2 / 2.

    Rounded, at least 1, at most `max_tokens`.
    """

    def __init__(self, mean: float, cv: float, max_tokens: int | None) -> None:
        self._sigma = math.sqrt(math.log1p(cv**2))
        self._mu = math.log(mean) - self._sigma**2 / 2
        self._most = max_tokens if max_tokens is not None else 2**31

    def draw(self, number: int, rng: np.random.Generator) -> Ints:
        """Draw by the exponential of a normal."""
        return np.clip(np.rint(rng.lognormal(self._mu, self._sigma, number)), 1, self._most).astype(np.int64)


def _law(settings: ConstantTokens | LognormalTokens | PmfTokens) -> Pmf | Lognormal:
    if isinstance(settings, LognormalTokens):
        return Lognormal(settings.mean_tokens, settings.cv, settings.max_tokens)
    if isinstance(settings, PmfTokens):
        return Pmf(np.array(settings.tokens, dtype=np.int64), np.array(settings.weights))
    return Pmf(np.array([settings.tokens]), np.ones(1))


def make_lengths(settings: Lengths, locate: Callable[[str], Path], seed: int) -> tuple[Draw, Draw]:
    """Give what draws (prompt, output) tokens; `ScenarioError` where a file of samples is faulty."""
    if isinstance(settings, RecordedLengths):
        return _recorded, _recorded
    if isinstance(settings, SampledLengths):
        return _samples(settings, locate(settings.path), seed)
    return _drawn(settings, seed)


def _recorded(number: int) -> Ints | None:
    return None


def _drawn(settings: DrawnLengths, seed: int) -> tuple[Draw, Draw]:
    def one(which: int, law: Pmf | Lognormal) -> Draw:
        rng = stream(seed, LENGTHS, which)
        return lambda number: law.draw(number, rng)

    laws = (settings.prompt, settings.output)
    prompt, output = (_recorded if law is None else one(which, _law(law)) for which, law in enumerate(laws))
    return prompt, output


def _samples(settings: SampledLengths, path: Path, seed: int) -> tuple[Draw, Draw]:
    """Rows with replacement; the two streams are equal, so that prompt and output come from the same row."""
    names = (settings.prompt_column, settings.output_column)
    table = CsvColumns.read(path, tuple(dict.fromkeys(names)))
    columns = [table.numbers(name, low=1, whole=True).astype(np.int64) for name in names]
    if not len(table):
        table.faults.add(None, names[0], "must hold at least one row")
    table.faults.raise_if_any()

    def one(values: Ints) -> Draw:
        rng = stream(seed, LENGTHS, 0)
        return lambda number: values[rng.integers(0, len(values), number)]

    return one(columns[0]), one(columns[1])
