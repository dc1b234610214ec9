"""Models as functions of a prefix, and the exact text that verified rounds emit, up to a fixed horizon.

A round emits a few tokens; the verifier writes the rest up to the horizon. Losslessness: that text has the verifier's
own distribution. Nothing here is imported from the package under test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

Model = Callable[[tuple[int, ...]], np.ndarray]


def random_model(seed: int, size: int, *, zeros: bool = False, concentration: float = 0.7) -> Model:
    """A model whose rows depend on the whole prefix; with `zeros`, some tokens have no probability."""

    @cache
    def row(prefix: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, size, len(prefix), *prefix])
        weights = rng.dirichlet(np.full(size, concentration)) + 1e-3
        if zeros:
            weights = weights * (rng.random(size) < 0.7)
            weights[int(rng.integers(size))] += 0.3
        return np.asarray(weights / weights.sum())

    return row


def same_everywhere(*rows: Iterable[float]) -> Model:
    """A model that looks at the position alone; the last row goes on for ever."""
    arrays = [np.asarray(row, float) for row in rows]
    return lambda prefix: arrays[min(len(prefix), len(arrays) - 1)]


def path_probability(model: Model, path: Iterable[int]) -> float:
    """The probability that the model writes this path."""
    tokens = tuple(path)
    return float(np.prod([model(tokens[:i])[token] for i, token in enumerate(tokens)]))


def continuation(model: Model, prefix: tuple[int, ...], length: int) -> np.ndarray:
    """The joint distribution [V] * length of what the model writes after a prefix."""
    if length == 0:
        return np.array(1.0)
    row = model(prefix)
    return np.array([row[x] * continuation(model, (*prefix, x), length - 1) for x in range(len(row))])


def emitted(laws: Iterable[tuple[Any, float]], model: Model, horizon: int) -> np.ndarray:
    """The joint distribution [V] * horizon of what rounds with these (law, weight) emit and the model then writes."""
    size = len(model(()))
    mass: dict[tuple[int, ...], float] = {}
    for law, weight in laws:
        assert abs(law.ends.sum() - 1) < 1e-12
        for prefix, end, correction in zip(law.prefixes, law.ends, law.corrections, strict=True):
            if end:
                for token in range(size):
                    text = (*prefix, token)
                    mass[text] = mass.get(text, 0.0) + weight * end * correction[token]
    joint = np.zeros((size,) * horizon)
    for text, share in mass.items():
        if share:
            joint[text] += share * continuation(model, text, horizon - len(text))
    return joint


def chains(drafter: Model, gamma: int) -> Iterable[tuple[tuple[int, ...], float]]:
    """Every drafted chain with its probability."""
    for path in itertools.product(range(len(drafter(()))), repeat=gamma):
        weight = path_probability(drafter, path)
        if weight > 0:
            yield path, weight


def rows_along(model: Model, path: tuple[int, ...], rows: int) -> np.ndarray:
    """The model's rows [rows, V] after the first 0, 1, .. tokens of a path."""
    return np.array([model(path[:i]) for i in range(rows)])
