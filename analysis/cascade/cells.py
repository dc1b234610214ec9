"""Cells of a posterior: quantile splits in as many directions as there are, so that each holds enough items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.common.arrays import Floats, Ints


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
