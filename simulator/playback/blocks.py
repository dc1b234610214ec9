"""Outputs longer than their recording, continued by blocks of recorded positions.

A trajectory of T recorded positions that is wanted longer goes on with blocks of consecutive positions, drawn from
all sequences of the same domain that were recorded with the same drafter: the moving-block bootstrap (Kuensch 1989;
Liu and Singh 1992). Within a block, neighbouring positions stay together, so acceptance keeps its autocorrelation.

This is an **approximation**. At a seam between blocks

- a recorded run length is *kept*, also where it reaches over the seam: the tokens that it stands for were accepted
  after that very context. Cutting runs at seams would lower acceptance by one cut run a block; keeping them leaves
  the law of a single round as recorded. The next round starts inside the next block, as far in as the run reached.
- acceptance probabilities (sampled traces) are those of the positions, one by one, so a run goes on over the seam.

Only the end of the recording itself still cuts the run that reaches it, once a request. Blocks begin at t = 1 at the
earliest (prefill emits x_0) and have as many recorded positions again behind them where the domain has such
sequences, so that no run in them is cut by the end of a recording unless it is longer than a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from calibration.common.errors import ReplayError

if TYPE_CHECKING:
    from calibration.common.arrays import Ints

_BLOCKS = 7
"""Top word of the Philox counter: keeps these draws apart from the luck of the same request."""


class BlockPool:
    """Blocks of recorded positions of one domain. `block` positions each; every possible start is equally likely.

    `starts` and `lengths` are the stretches of its sequences in the compiled arrays.
    """

    def __init__(self, domain: str, starts: Ints, lengths: Ints, block: int) -> None:
        self.block, room = _fit(lengths, block)
        if self.block < 1:
            raise ReplayError(
                f"traces: domain '{domain}': must have a sequence of at least 2 output tokens to continue longer "
                f"outputs with, got at most {int(lengths.max())}"
            )
        choices = np.maximum(lengths - room, 0)
        self._ends = np.cumsum(choices)
        # Choice c of sequence i is position 1 + c - (choices before i).
        self._shift = starts + 1 - (self._ends - choices)

    def positions(self, number: int, rng: np.random.Generator) -> Ints:
        """Give `number` positions (indices into the compiled arrays): blocks one after another, the last one cut."""
        blocks = -(-number // self.block)
        choice = rng.integers(0, self._ends[-1], blocks)
        first = choice + self._shift[np.searchsorted(self._ends, choice, side="right")]
        blocks_of: Ints = first[:, None] + np.arange(self.block)
        return blocks_of.ravel()[:number]


def _fit(lengths: Ints, block: int) -> tuple[int, int]:
    """Give (positions of a block, positions of a sequence that cannot be a start).

    A start t of a sequence of T positions needs t >= 1 and t + block + margin <= T.
    """
    longest = int(lengths.max())
    for margin in (block, 0):
        if longest >= 1 + block + margin:
            return block, block + margin
    return longest - 1, longest - 1


class Continuation:
    """Continues trajectories beyond their recording, by blocks of the same domain. See the module: an approximation.

    The positions depend on seed and request alone: policies that are compared share them.
    """

    def __init__(self, domains: Sequence[str], starts: Ints, lengths: Ints, block: int, seed: int) -> None:
        self._domains, self._starts, self._lengths = domains, starts, lengths
        self._block, self._seed = block, seed
        self._recorded: list[int] = lengths.tolist()
        self._pools: dict[str, BlockPool] = {}
        self.longest = max(self._recorded)

    def recorded(self, sequence: int) -> int:
        """Give how many output tokens of `sequence` are recorded."""
        return self._recorded[sequence]

    def trajectory(self, sequence: int, request: int, length: int) -> Ints:
        """Give the positions (indices into the compiled arrays) that answer for `length` output tokens."""
        start, recorded = int(self._starts[sequence]), self._recorded[sequence]
        if length <= recorded:
            return np.arange(start, start + length)
        key = np.array([self._seed, request], dtype=np.uint64)
        counter = np.array([0, 0, 0, _BLOCKS], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        more = self._pool(self._domains[sequence]).positions(length - recorded, rng)
        return np.concatenate((np.arange(start, start + recorded), more))

    def _pool(self, domain: str) -> BlockPool:
        if domain not in self._pools:
            own = np.flatnonzero([name == domain for name in self._domains])
            self._pools[domain] = BlockPool(domain, self._starts[own], self._lengths[own], self._block)
        return self._pools[domain]
