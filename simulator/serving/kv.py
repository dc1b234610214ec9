"""Paged KV memory: blocks that are counted, and with prefix caching found again by what they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

UNLIMITED = 1 << 60
"""Blocks of a memory without limit."""
_POSITIVE = (1 << 63) - 1


class BlockPool:
    """All KV blocks of one replica.

    A block is *private* (held by one request), *shared* (full, its content known by a key, held by one request or
    more) or *free*. Free blocks wait in a queue, the longest unused first; one whose content is known can be leased
    again until the queue hands it out: vLLM's free block queue and prefix cache, by key.

    NOTE: private blocks have no identity, only a number, and without `caching` there is no queue: a request that
    grows costs a subtraction.
    """

    def __init__(self, blocks: int | None, *, caching: bool = False) -> None:
        self.total = blocks if blocks is not None else UNLIMITED
        self.free = self.total
        self._caching = caching
        self._references: dict[int, int] = {}
        # Keys of known blocks, one each; a negative number stands for a run of blocks without known content.
        self._queue: OrderedDict[int, int] = OrderedDict({-1: self.total})
        self._runs = 1

    @property
    def used(self) -> int:
        """Blocks that requests hold; a shared one counts once."""
        return self.total - self.free

    @property
    def shared(self) -> int:
        """Blocks with known content that requests hold."""
        return len(self._references)

    def take(self, number: int) -> None:
        """Make `number` free blocks (at most `free`) private, the longest unused first; their content is lost."""
        self.free -= number
        while self._caching and number > 0:
            key, count = next(iter(self._queue.items()))
            if count > number:
                self._queue[key] = count - number
                return
            del self._queue[key]
            number -= count

    def give(self, number: int) -> None:
        """Put `number` private blocks at the end of the queue."""
        self.free += number
        if not self._caching or number == 0:
            return
        last = next(reversed(self._queue), 0)
        if last >= 0:
            self._runs += 1
            last = -self._runs
        self._queue[last] = self._queue.get(last, 0) + number

    def known(self, keys: Sequence[int]) -> int:
        """Give how many of `keys`, from the first on without a gap, are in memory."""
        for number, key in enumerate(keys):
            if key not in self._references and key not in self._queue:
                return number
        return len(keys)

    def idle(self, keys: Iterable[int]) -> int:
        """Give how many of `keys`, all known, are free: leasing them takes that many blocks."""
        return sum(key in self._queue for key in keys)

    def lease(self, keys: Iterable[int]) -> None:
        """Hold the known blocks of `keys`."""
        references, queue = self._references, self._queue
        for key in keys:
            if key in references:
                references[key] += 1
            else:
                del queue[key]
                self.free -= 1
                references[key] = 1

    def publish(self, keys: Iterable[int]) -> None:
        """Turn as many private blocks of the caller into shared ones with the content of `keys`.

        Where equal content is known already, that block is leased and the caller's own becomes free. (vLLM keeps
        such a duplicate until its request ends.)
        """
        references, queue = self._references, self._queue
        for key in keys:
            if key in references or key in queue:
                self.lease((key,))
                self.give(1)
            else:
                references[key] = 1

    def release(self, keys: Sequence[int], private: int) -> None:
        """Let go of the shared blocks of `keys` and of `private` others.

        They queue up from the last to the first, so that of a chain the end is forgotten first.
        """
        self.give(private)
        references, queue = self._references, self._queue
        for key in reversed(keys):
            left = references[key] - 1
            if left:
                references[key] = left
            else:
                del references[key]
                queue[key] = 1
                self.free += 1


def chain(seed: int, contents: Iterable[int]) -> list[int]:
    """Give the keys of a chain of blocks: each a hash of the key before it and of its own content.

    So a key stands for everything from the beginning of the text on, as in vLLM. Hashes of integers: the same on
    every machine with 64 bits; two contents collide with a probability of about 1e-19.
    """
    keys = []
    key = seed
    for content in contents:
        key = hash((key, content)) & _POSITIVE
        keys.append(key)
    return keys
