"""Made-up cascades whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator

from analysis.cascade import QualityTable
from calibration.common.arrays import Floats


def table_of(
    correct: Floats,
    costs: Sequence[float],
    signals: dict[str, Floats] | None = None,
    features: dict[str, Floats] | None = None,
    domains: Sequence[str] = ("a", "b"),
) -> QualityTable:
    """A table with these columns; domains take turns."""
    items, stages = correct.shape
    return QualityTable(
        "made up",
        tuple(f"item-{k}" for k in range(items)),
        tuple(domains[k % len(domains)] for k in range(items)),
        tuple(f"stage-{k}" for k in range(stages)),
        correct.astype(float),
        np.tile(np.asarray(costs, dtype=float), (items, 1)),
        signals or {},
        features or {},
        "made up",
    )


def graded_by_difficulty(rng: Generator, items: int, costs: Sequence[float] = (1.0, 4.0, 16.0)) -> QualityTable:
    """Items of normal difficulty; each stage is right more often, and its confidence knows much of whether it is."""
    hard = rng.normal(size=(items, 1))
    z = -1.5 * hard - 0.3 + 1.1 * np.arange(len(costs))
    chance = 1 / (1 + np.exp(-1.5 * z))
    correct = rng.random(z.shape) < chance
    seen = z + 0.3 * rng.normal(size=z.shape) + 0.8 * (correct - chance)
    features = {"item_prompt_tokens": 3 * hard[:, 0] + 4 * rng.normal(size=items)}
    return table_of(correct, costs, {"confidence": 1 / (1 + np.exp(-seen))}, features)


def two_valued(rng: Generator, items: int) -> tuple[QualityTable, Floats]:
    """Three stages, each with a signal of 0 or 1; and the chances behind it.

    chances[s0, s1, s2, q0, q1, q2]: the joint law of signals and correctness. An item is easy (0.6) or hard; a stage
    is right with a chance that depends on that; its signal repeats its correctness with chance 0.9.
    """
    right = np.array([[0.85, 0.95, 0.98], [0.1, 0.35, 0.85]])
    chances = np.zeros((2,) * 6)
    for kind, share in enumerate((0.6, 0.4)):
        for index in np.ndindex(chances.shape):
            s, q = np.array(index[:3]), np.array(index[3:])
            p = np.where(q == 1, right[kind], 1 - right[kind]) * np.where(s == q, 0.9, 0.1)
            chances[index] += share * p.prod()
    drawn = rng.choice(chances.size, size=items, p=chances.ravel() / chances.sum())
    cells = np.stack(np.unravel_index(drawn, chances.shape), axis=1).astype(float)
    return table_of(cells[:, 3:], (1.0, 3.0, 9.0), {"signal": cells[:, :3]}), chances


def write_long(table: QualityTable, path: Path) -> Path:
    """Write `table` as the long CSV that the reader takes."""
    names = [*table.signals, *table.item_features]
    lines = [",".join(["item", "domain", "stage", "correct", "cost", *names])]
    for i, item in enumerate(table.items):
        for s, stage in enumerate(table.stages):
            values = [table.correct[i, s], table.cost[i, s], *(v[i, s] for v in table.signals.values())]
            values += [v[i] for v in table.item_features.values()]
            cells = ["" if np.isnan(v) else repr(float(v)) for v in values]
            lines.append(",".join([item, table.domains[i], stage, *cells]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
