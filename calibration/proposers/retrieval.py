"""Retrieval drafting: a tree of what followed the longest suffix match in a datastore.

The last n tokens are looked up, then fewer, down to m, until something follows them. The continuations of their
occurrences form a trie whose nodes weigh as much as continuations pass through them; the nodes of largest weight
within the budget are the draft. Of more occurrences than the settings allow, as many are read at even distances of
their list.

Source: He and others, "REST: Retrieval-Based Speculative Decoding" (2024). Ours are the ties: of equal weights the
shallower node is taken, then the one whose continuation stands first in the datastore. So no node is taken before its
parent, and the budget is met exactly. The nodes are chosen for the depth of the settings and then cut at the draft
length that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from calibration.proposers.checks import one_of, refuse, whole
from calibration.proposers.datastore import Datastore
from calibration.proposers.draft_trees import breadth_first, cut
from calibration.proposers.protocol import Draft

_SEPARATOR = -1


@dataclass(frozen=True)
class RetrievalSettings:
    """What a retrieval proposer drafts.

    `max_match`, `min_match`: n and m. `shape`: ``tree``, or ``chain`` for the heaviest path from the root, at each
    step the child of largest weight. `nodes`: the budget of a tree. `max_draft_tokens`: its depth. `max_occurrences`:
    how many continuations are read.
    """

    max_match: int = 16
    min_match: int = 2
    shape: str = "tree"
    nodes: int = 32
    max_draft_tokens: int = 10
    max_occurrences: int = 256

    def __post_init__(self) -> None:
        """Refuse settings that cannot be, all faults in one `CalibrationError`."""
        rules = [whole(name, getattr(self, name)) for name in ("max_match", "min_match")]
        if all(kept for kept, _ in rules):
            text = f"min_match: must be <= max_match = {self.max_match}, got {self.min_match}"
            rules.append((self.min_match <= self.max_match, text))
        rules.append(one_of("shape", self.shape, ("tree", "chain")))
        sizes = ("nodes", "max_draft_tokens", "max_occurrences")
        refuse("retrieval", *rules, *(whole(name, getattr(self, name)) for name in sizes))


class RetrievalProposer:
    """Drafts from a datastore that does not change; of the request it needs the last tokens alone."""

    def __init__(self, settings: RetrievalSettings, datastore: Datastore) -> None:
        refuse(
            "retrieval",
            (
                settings.max_match <= datastore.order,
                f"max_match: must be <= the datastore's order {datastore.order}, got {settings.max_match}",
            ),
        )
        self._settings = settings
        self._datastore = datastore
        self._recent: list[int] = []

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens."""
        self._recent = [*self._recent, *tokens][-self._settings.max_match :]

    def propose(self, draft_tokens: int) -> Draft:
        """Give the pruned trie of the continuations of the longest match, or its heaviest path."""
        starts = self._continuations()
        if self._settings.shape == "chain":
            return Draft(self._heaviest(starts, min(draft_tokens, self._settings.max_draft_tokens)))
        return cut(self._tree(starts), draft_tokens)

    def _continuations(self) -> list[int]:
        """Give where the continuations of the longest match start, in order of position; empty without a match."""
        store, recent = self._datastore, self._recent
        low, high = self._settings.min_match, len(recent)
        found: dict[int, tuple[int, int]] = {}
        while low <= high:  # matches of m tokens hold those of fewer: bisect for the longest
            middle = (low + high + 1) // 2
            first, last = store.find(recent[-middle:])
            if first < last:
                found[middle], low = (first, last), middle + 1
            else:
                high = middle - 1
        for length in range(high, self._settings.min_match - 1, -1):
            first, last = found.get(length) or store.find(recent[-length:])
            starts = self._read(first, last, length)
            if starts:
                return starts
        return []

    def _read(self, first: int, last: int, length: int) -> list[int]:
        """Give the starts of the continuations of some occurrences; those that end a sequence have none."""
        count = min(last - first, self._settings.max_occurrences)
        taken = [first + (last - first) * i // count for i in range(count)]
        starts = self._datastore.suffixes[taken] + length
        return sorted(starts[self._datastore.tokens[starts] != _SEPARATOR].tolist())

    def _tree(self, starts: list[int]) -> Draft:
        """Take the heaviest nodes of the trie, best first; a node's children are counted when it is taken."""
        tokens: list[int] = []
        parents: list[int] = []
        heap: list[tuple[int, int, int, int, list[int]]] = []
        self._push(heap, starts, 0, -1)
        while heap and len(tokens) < self._settings.nodes:
            _, depth, first, parent, group = heappop(heap)
            tokens.append(int(self._datastore.tokens[first + depth - 1]))
            parents.append(parent)
            if depth < self._settings.max_draft_tokens:
                self._push(heap, group, depth, len(tokens) - 1)
        return breadth_first(tokens, parents)

    def _push(
        self, heap: list[tuple[int, int, int, int, list[int]]], starts: list[int], depth: int, parent: int
    ) -> None:
        """Put the children at `depth` tokens behind `starts` on the heap: (-weight, depth, first start, ...)."""
        for group in self._groups(starts, depth).values():
            heappush(heap, (-len(group), depth + 1, group[0], parent, group))

    def _heaviest(self, starts: list[int], limit: int) -> tuple[int, ...]:
        tokens: list[int] = []
        while len(tokens) < limit and (groups := self._groups(starts, len(tokens))):
            token = max(groups, key=lambda t: len(groups[t]))  # the first of equals, as it stands in the datastore
            tokens.append(token)
            starts = groups[token]
        return tuple(tokens)

    def _groups(self, starts: list[int], depth: int) -> dict[int, list[int]]:
        """Give the starts by the token that stands `depth` tokens behind them; ends of sequences drop out."""
        groups: dict[int, list[int]] = {}
        for token, start in zip(self._datastore.tokens[[s + depth for s in starts]].tolist(), starts, strict=True):
            if token != _SEPARATOR:
                groups.setdefault(token, []).append(start)
        return groups
