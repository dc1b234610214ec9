"""Room for the trajectories of live requests: stretches of growing arrays, handed out and taken back."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from calibration.common.arrays import Ints


class Stretches:
    """Hands out stretches from index `first` on, in sizes of 2^k, and reuses those given back.

    So memory follows the requests that are live at once, not those that have ended.
    """

    def __init__(self, first: int) -> None:
        self._first = self.end = first
        """`end`: how long an array must be to hold every stretch."""
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._taken: dict[int, int] = {}

    def take(self, length: int) -> int:
        """Give the start of a stretch of at least `length`."""
        size = 1 << (length - 1).bit_length()
        if self._free[size]:
            start = self._free[size].pop()
        else:
            start = self.end
            self.end += size
        self._taken[start] = size
        return start

    def give(self, start: int) -> None:
        """Take back the stretch at `start`; one before the first is nobody's to give."""
        if start >= self._first:
            self._free[self._taken.pop(start)].append(start)

    def fit(self, array: Ints) -> Ints:
        """Give `array`, or a longer one that begins with it, so that every stretch is in it."""
        if len(array) >= self.end:
            return array
        # NOTE: grown by half at least, so that copying stays linear in all.
        longer = np.zeros(max(self.end, len(array) * 3 // 2), dtype=np.int64)
        longer[: len(array)] = array
        return longer
