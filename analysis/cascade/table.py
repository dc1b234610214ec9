"""Per-item correctness of every stage of a cascade: what each would have answered, whether or not it is asked.

Because every stage ran on every item, any policy can be evaluated exactly: its answer and its cost on an item are
looked up, never estimated (exact counterfactual).

Cells of a posterior: quantile splits in as many directions as there are, so that each holds enough items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import TraceError, did_you_mean


@dataclass(frozen=True)
class Split:
    """One place of the tree: at most `threshold` in `coordinate` goes to the split `below`, else to `above`.

    A leaf has a `cell`; its other fields say nothing.
    """

    coordinate: int = -1
    threshold: float = 0.0
    below: int = -1
    above: int = -1
    cell: int | None = None


@dataclass(frozen=True)
class Cells:
    """A tree of splits, the first of them its root."""

    splits: tuple[Split, ...]

    @property
    def count(self) -> int:
        """How many cells there are."""
        return sum(split.cell is not None for split in self.splits)

    def find(self, points: Floats) -> Ints:
        """Give the cell of every row of `points` (n, d)."""
        found = np.zeros(len(points), dtype=np.int64)
        waiting = [(0, np.arange(len(points)))]
        while waiting:
            at, rows = waiting.pop()
            split = self.splits[at]
            if split.cell is not None:
                found[rows] = split.cell
                continue
            low = points[rows, split.coordinate] <= split.threshold
            waiting += [(split.below, rows[low]), (split.above, rows[~low])]
        return found


def fit_cells(points: Floats, smallest: int) -> Cells:
    """Split `points` (n, d) at the median of the direction that varies most, down to `smallest` items a cell."""
    splits: list[Split] = []
    cells = 0

    def grow(rows: Ints) -> int:
        nonlocal cells
        at = len(splits)
        splits.append(Split())
        where = _median(points[rows], smallest)
        if where is None:
            splits[at] = Split(cell=cells)
            cells += 1
            return at
        coordinate, threshold = where
        low = points[rows, coordinate] <= threshold
        splits[at] = Split(coordinate, threshold, grow(rows[low]), grow(rows[~low]))
        return at

    grow(np.arange(len(points)))
    return Cells(tuple(splits))


def _median(points: Floats, smallest: int) -> tuple[int, float] | None:
    """Where to halve `points`: (coordinate, threshold); None where a half would hold fewer than `smallest`."""
    if len(points) < 2 * smallest or points.shape[1] == 0:
        return None
    for coordinate in np.argsort(-points.std(axis=0), kind="stable"):
        values = np.sort(points[:, coordinate])
        steps = np.flatnonzero(np.diff(values) > 1e-12)  # a split falls between two values
        if not len(steps):
            continue
        last = int(steps[np.argmin(np.abs(steps + 1 - len(values) / 2))])
        if min(last + 1, len(values) - last - 1) >= smallest:
            return int(coordinate), float((values[last] + values[last + 1]) / 2)
    return None


@dataclass(frozen=True, eq=False)
class QualityTable:
    """Correctness, cost and signals of every stage on every item.

    `correct` (items, stages) in 0..1; `cost` (items, stages), above 0, in one unit of the user's choice. `signals`:
    name -> (items, stages), seen once that stage has run, NaN where there is none. `item_features`: name ->
    (items,), known before any stage has run. `continued`: stages go on from each other (exits of one model), so
    that the cost of several is that of the dearest; else each pays from nothing, and costs add. `label` says where
    the numbers come from (measured, made up, given).
    """

    name: str
    items: tuple[str, ...]
    domains: tuple[str, ...]
    stages: tuple[str, ...]
    correct: Floats
    cost: Floats
    signals: Mapping[str, Floats] = field(default_factory=dict)
    item_features: Mapping[str, Floats] = field(default_factory=dict)
    label: str = "given"
    continued: bool = False

    def __post_init__(self) -> None:
        """Refuse (`TraceError`) a single stage, arrays of other shapes, and values out of range."""
        shape = (len(self.items), len(self.stages))
        if len(self.stages) < 2:
            raise TraceError(f"{self.name}: needs two stages or more, got {len(self.stages)}")
        for what, values in (("correct", self.correct), ("cost", self.cost), *self.signals.items()):
            if values.shape != shape:
                raise TraceError(f"{self.name}: {what}: must have shape {shape}, got {values.shape}")
        if not np.all((self.correct >= 0) & (self.correct <= 1)):
            raise TraceError(f"{self.name}: correct: must lie in 0..1 on every item and stage")
        if not np.all((self.cost > 0) & np.isfinite(self.cost)):
            raise TraceError(f"{self.name}: cost: must be above 0 and finite on every item and stage")

    def subset(self, rows: NDArray[np.int64]) -> QualityTable:
        """Give the table of the items at `rows`."""
        return replace(
            self,
            items=tuple(self.items[i] for i in rows),
            domains=tuple(self.domains[i] for i in rows),
            correct=self.correct[rows],
            cost=self.cost[rows],
            signals={name: values[rows] for name, values in self.signals.items()},
            item_features={name: values[rows] for name, values in self.item_features.items()},
        )

    def only(self, stages: Sequence[str]) -> QualityTable:
        """Give the table of these stages, in this order."""
        for stage in stages:
            if stage not in self.stages or list(stages).count(stage) > 1:
                hint = did_you_mean(stage, self.stages)
                raise TraceError(f"{self.name}: stages: must be stages of the table, once each, got '{stage}'{hint}")
        at = [self.stages.index(stage) for stage in stages]
        return replace(
            self,
            stages=tuple(stages),
            correct=self.correct[:, at],
            cost=self.cost[:, at],
            signals={name: values[:, at] for name, values in self.signals.items()},
        )

    def spent(self, ran: NDArray[np.bool_]) -> Floats:
        """Give the cost of every item (items,) when the stages `ran` (items, stages) or (stages,) have run."""
        paid = np.where(ran, self.cost, 0.0)
        return np.asarray(paid.max(axis=1) if self.continued else paid.sum(axis=1), dtype=np.float64)

    def spent_in_order(self) -> Floats:
        """Give the cost (items, stages) of running the stages in order up to each."""
        upto = np.tri(len(self.stages), dtype=np.bool_)
        return np.stack([self.spent(ran) for ran in upto], axis=1)
