"""Keys and values of every sequence, for every layer of one model: paged or padded.

A cache is a row of *slots*, one per token: [slots, 2 (key, value), KV heads, head size] for every layer. The two
kinds differ in who holds which slots, and in how the keys of several sequences are read at once.

Who holds which part of a KV memory: blocks of some tokens (paged), or rows of one length (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


class BlockTables:
    """`number` blocks of `size` tokens; a sequence holds as many as its tokens need, in any order of the memory.

    Block b is the slots b * size .. b * size + size - 1. Free blocks are a stack: the one freed last is taken first.
    """

    def __init__(self, number: int, size: int) -> None:
        self.size = size
        self.tables: dict[int, list[int]] = {}
        self._free = list(range(number - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def open(self, sequence: int) -> None:
        """Begin a sequence; it holds nothing yet."""
        self.tables[sequence] = []

    def resize(self, sequence: int, tokens: int) -> None:
        """Take or give back blocks at the end of `sequence`, so that it holds what `tokens` tokens need."""
        table = self.tables[sequence]
        need = -(-tokens // self.size)
        while len(table) < need:
            table.append(self._free.pop())
        while len(table) > need:
            self._free.append(table.pop())

    def slots(self, sequence: int, first: int, stop: int) -> list[int]:
        """Give the slots of the tokens `first` .. `stop` - 1 of `sequence`."""
        table, size = self.tables[sequence], self.size
        return [table[place // size] * size + place % size for place in range(first, stop)]

    def close(self, sequence: int) -> None:
        """End a sequence: all its blocks are free."""
        self.resize(sequence, 0)
        del self.tables[sequence]


class Rows:
    """`number` rows, one per sequence. The sequences always hold the first of them, without a hole."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._sequences: list[int] = []
        self._row: dict[int, int] = {}

    def __len__(self) -> int:
        """Give how many rows are held."""
        return len(self._sequences)

    def of(self, sequence: int) -> int:
        """Give the row of `sequence`."""
        return self._row[sequence]

    def open(self, sequence: int) -> None:
        """Give `sequence` the first free row."""
        if len(self._sequences) == self.number:
            raise IndexError(f"all {self.number} rows are held")
        self._row[sequence] = len(self._sequences)
        self._sequences.append(sequence)

    def close(self, sequence: int) -> tuple[int, int] | None:
        """Free the row of `sequence`; where another one must move there, give its sequence and the row it left."""
        hole, last = self._row.pop(sequence), self._sequences.pop()
        if last == sequence:
            return None
        self._sequences[hole], self._row[last] = last, hole
        return last, len(self._sequences)


Kind = Literal["paged", "padded"]


@dataclass(frozen=True)
class CacheShape:
    """What one token takes in one of `layers` layers: a key and a value of `heads` heads of `head_dim` numbers."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class View:
    """How the first `keys` tokens of some `rows` sequences are read. ``index``: blocks, or rows; None: a slice."""

    rows: int
    keys: int
    first: int = 0
    index: Tensor | None = None


class KvCache:
    """What both kinds share: lengths, and the slots themselves, all of them zero at first.

    NOTE: zeros, as a masked slot has weight 0, and 0 times whatever lies in fresh memory may be NaN.
    """

    def __init__(self, shape: CacheShape, slots: int) -> None:
        size = (slots, 2, shape.heads, shape.head_dim)
        self.layers = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]
        self.device = shape.device
        self._lengths: dict[int, int] = {}

    def length(self, sequence: int) -> int:
        """Give how many tokens of `sequence` are in memory."""
        return self._lengths[sequence]

    def order(self, sequence: int) -> int:
        """Give what to sort sequences by before they are read together."""
        return 0

    def open(self, sequence: int) -> None:
        """Begin a sequence without tokens."""
        self._lengths[sequence] = 0

    def extend(self, sequence: int, tokens: int, width: int) -> list[int]:
        """Make room for `tokens` more tokens; give their slots, followed by those of padding up to `width`."""
        raise NotImplementedError

    def truncate(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of `sequence`."""
        self._lengths[sequence] = tokens

    def close(self, sequence: int) -> None:
        """End a sequence and free what it holds."""
        del self._lengths[sequence]

    def view(self, sequences: Sequence[int], tokens: int) -> View:
        """Plan to read the first `tokens` tokens of `sequences`, or a few more."""
        raise NotImplementedError

    def read(self, layer: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Give keys and values [rows, KV heads, keys, head size] of one of `layers`."""
        raise NotImplementedError


class PagedCache(KvCache):
    """Blocks of `block_size` tokens, taken as tokens come; reading copies the blocks of a batch side by side."""

    def __init__(self, shape: CacheShape, *, rows: int, capacity: int, block_size: int) -> None:
        number = rows * -(-capacity // block_size)
        super().__init__(shape, number * block_size)
        self.blocks = BlockTables(number, block_size)

    def open(self, sequence: int) -> None:
        """Begin a sequence without tokens."""
        super().open(sequence)
        self.blocks.open(sequence)

    def extend(self, sequence: int, tokens: int, width: int) -> list[int]:
        """Make room for `tokens` more tokens; give their slots. Nothing is padded here: `width` is `tokens`."""
        held = self._lengths[sequence]
        self._lengths[sequence] = held + tokens
        self.blocks.resize(sequence, held + tokens)
        return self.blocks.slots(sequence, held, held + tokens)

    def truncate(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of `sequence`, and free the blocks behind them."""
        super().truncate(sequence, tokens)
        self.blocks.resize(sequence, tokens)

    def close(self, sequence: int) -> None:
        """End a sequence and free its blocks."""
        super().close(sequence)
        self.blocks.close(sequence)

    def view(self, sequences: Sequence[int], tokens: int) -> View:
        """Plan to read whole blocks; shorter tables are filled up with blocks that nobody looks at."""
        width = -(-tokens // self.blocks.size)
        tables = [self.blocks.tables[sequence][:width] for sequence in sequences]
        index = [block for table in tables for block in (*table, *[0] * (width - len(table)))]
        return View(len(tables), width * self.blocks.size, index=torch.tensor(index, device=self.device))

    def read(self, layer: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Give copies of keys and values [rows, KV heads, keys, head size]."""
        assert view.index is not None
        found = layer.view(-1, self.blocks.size, *layer.shape[1:]).index_select(0, view.index)
        return _split(found.view(view.rows, view.keys, *layer.shape[1:]))


class PaddedCache(KvCache):
    """One row of `capacity` tokens per sequence; reading is a slice, as long as the longest sequence.

    Padding tokens are written to a slot of their own behind all rows, which nobody reads.
    """

    def __init__(self, shape: CacheShape, *, rows: int, capacity: int) -> None:
        super().__init__(shape, rows * capacity + 1)
        self.rows, self.capacity = Rows(rows), capacity

    def order(self, sequence: int) -> int:
        """Give the row of `sequence`."""
        return self.rows.of(sequence)

    def open(self, sequence: int) -> None:
        """Begin a sequence without tokens."""
        super().open(sequence)
        self.rows.open(sequence)

    def extend(self, sequence: int, tokens: int, width: int) -> list[int]:
        """Make room for `tokens` more tokens; give their slots, followed by those of padding up to `width`."""
        held = self._lengths[sequence]
        self._lengths[sequence] = held + tokens
        first = self.rows.of(sequence) * self.capacity + held
        return [*range(first, first + tokens), *[self.rows.number * self.capacity] * (width - tokens)]

    def close(self, sequence: int) -> None:
        """End a sequence; the one in the last row moves to its place, so that rows stay side by side."""
        hole = self.rows.of(sequence)
        super().close(sequence)
        moved = self.rows.close(sequence)
        if moved is not None:
            length = self._lengths[moved[0]]
            for layer in self.layers:
                rows = self._by_row(layer)
                rows[hole, :length] = rows[moved[1], :length]

    def view(self, sequences: Sequence[int], tokens: int) -> View:
        """Plan to read a slice where the sequences lie side by side in this order, else to pick their rows."""
        rows = [self.rows.of(sequence) for sequence in sequences]
        keys = min(-(-tokens // 8) * 8, self.capacity)  # masks in rows of 8 are not copied by the attention kernels
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return View(len(rows), keys, first=rows[0])
        return View(len(rows), keys, index=torch.tensor(rows, device=self.device))

    def read(self, layer: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Give keys and values [rows, KV heads, keys, head size]; of a slice, nothing is copied."""
        rows = self._by_row(layer)[:, : view.keys]
        if view.index is not None:
            return _split(rows.index_select(0, view.index))
        return _split(rows[view.first : view.first + view.rows])

    def _by_row(self, layer: Tensor) -> Tensor:
        return layer[:-1].view(-1, self.capacity, *layer.shape[1:])


def _split(found: Tensor) -> tuple[Tensor, Tensor]:
    """Give keys and values [rows, KV heads, keys, head size] of [rows, keys, 2, KV heads, head size]."""
    return found[:, :, 0].transpose(1, 2), found[:, :, 1].transpose(1, 2)


def make_cache(kind: Kind, shape: CacheShape, *, rows: int, capacity: int, block_size: int) -> KvCache:
    """Give a cache for `rows` sequences of up to `capacity` tokens."""
    if kind == "padded":
        return PaddedCache(shape, rows=rows, capacity=capacity)
    return PagedCache(shape, rows=rows, capacity=capacity, block_size=block_size)
