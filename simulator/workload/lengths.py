"""Token counts of prompts and outputs that do not come with the arrivals.

Streams of random numbers of a workload, next to the seed: what one stream is used for never shifts another.

The k-th draw of a stream belongs to the k-th request (of a client, where clients have streams of their own), so the
workload is the same for every policy and for any number of workers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path

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
