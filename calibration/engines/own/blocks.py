"""Who holds which part of a KV memory: blocks of some tokens (paged), or rows of one length (padded)."""

from __future__ import annotations


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
