"""Retrieval drafting: a tree of what followed the longest suffix match in a datastore.

The last n tokens are looked up, then fewer, down to m, until something follows them. The continuations of their
occurrences form a trie whose nodes weigh as much as continuations pass through them; the nodes of largest weight
within the budget are the draft. Of more occurrences than the settings allow, as many are read at even distances of
their list.

Source: He and others, "REST: Retrieval-Based Speculative Decoding" (2024). Ours are the ties: of equal weights the
shallower node is taken, then the one whose continuation stands first in the datastore. So no node is taken before its
parent, and the budget is met exactly. The nodes are chosen for the depth of the settings and then cut at the draft
length that is asked for.

A datastore of token sequences for retrieval: a suffix array that is searched by bisection, in one file.

The suffix array lists all positions in the order of the `order` tokens that stand there, equal ones by position. That
is all a lookup of at most `order` tokens needs, and doubling reaches it in ceil(log2(order)) sorts: O(n log n) time
for n tokens (Manber and Myers, 1993, stopped early). A lookup takes O(log n) comparisons. Five million
tokens take a few seconds to build and 40 MB on disk.
"""

from __future__ import annotations

import json
import os
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.common.files import whole_file
from calibration.proposers.draft_trees import breadth_first, cut
from calibration.proposers.protocol import Draft, one_of, refuse, whole

FORMAT = 1
_KIND = "paceline token datastore"


class Datastore:
    """Token sequences and the suffix array over them; fixed, shared by requests.

    `tokens` [n] int32: the sequences one behind the other, each closed by -1. `suffixes` [n] int64: the positions in
    order. `order`: the longest match that can be looked up. `notes`: what the maker wrote about it (JSON).
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        suffixes: NDArray[np.int64],
        order: int,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokens = tokens
        self.suffixes = suffixes
        self.order = order
        self.notes = dict(notes or {})
        # NOTE: big-endian bytes of token + 1 compare as the tokens do; a slice of bytes compares some 20 times faster
        # than a slice of an array.
        self._bytes = (tokens.astype(np.int64) + 1).astype(">u4").tobytes()

    @classmethod
    def build(
        cls, sequences: Iterable[Sequence[int]], *, order: int = 16, notes: Mapping[str, Any] | None = None
    ) -> Datastore:
        """Index `sequences` of token ids for matches of up to `order` tokens; `CalibrationError` for bad ids."""
        if order < 1:
            raise CalibrationError(f"datastore: order must be >= 1, got {order}")
        parts: list[NDArray[np.int32]] = []
        for number, sequence in enumerate(sequences):
            row = np.asarray(sequence, dtype=np.int64)
            if row.ndim != 1 or (row.size and (row.min() < 0 or row.max() >= 2**31 - 1)):
                raise CalibrationError(f"datastore: sequence {number} must be token ids in [0, 2^31 - 2]")
            parts += [row.astype(np.int32), np.array([-1], dtype=np.int32)]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return cls(tokens, suffix_array(tokens, order), order, notes)

    def __len__(self) -> int:
        """Give the number of tokens, separators included."""
        return len(self.tokens)

    def find(self, pattern: Sequence[int]) -> tuple[int, int]:
        """Give the range of `suffixes` at which the first `order` tokens of `pattern` stand; empty where nowhere."""
        key = np.asarray(pattern[: self.order], dtype=np.int64)
        wanted, data, size = (key + 1).astype(">u4").tobytes(), self._bytes, 4 * len(key)

        def at(position: int) -> bytes:
            start = 4 * int(position)
            return data[start : start + size]

        low = bisect_left(self.suffixes, wanted, key=at)
        return low, bisect_right(self.suffixes, wanted, low, key=at)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the datastore to the .npz file `path`, which appears whole or not at all; give its path."""
        target = Path(path)
        about = {"kind": _KIND, "format": FORMAT, "order": self.order, "tokens": len(self), "notes": self.notes}
        small = self.suffixes.astype(np.int32) if len(self) < 2**31 else self.suffixes
        with whole_file(target) as scratch, scratch.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), tokens=self.tokens, suffixes=small)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Datastore:
        """Read a datastore; `CalibrationError` for a file that is missing, damaged or something else."""
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                tokens, suffixes = file["tokens"], file["suffixes"]
        except FileNotFoundError:
            raise CalibrationError(f"{path}: datastore not found") from None
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as fault:
            raise CalibrationError(f"{path}: not a readable datastore, truncated or damaged ({fault})") from None
        if not isinstance(about, dict) or about.get("kind") != _KIND or about.get("format") != FORMAT:
            raise CalibrationError(f"{path}: must be a {_KIND} of format {FORMAT}, got {about}")
        if not _coherent(tokens, suffixes, about):
            raise CalibrationError(f"{path}: tokens and suffixes must match each other and {about}")
        return cls(tokens.astype(np.int32), suffixes.astype(np.int64), about["order"], about["notes"])


def _coherent(tokens: NDArray[Any], suffixes: NDArray[Any], about: dict[str, Any]) -> bool:
    """Say whether the arrays are what `build` writes: tokens closed by -1, and a permutation of their positions."""
    count = len(tokens)
    return bool(
        tokens.dtype.kind == suffixes.dtype.kind == "i"
        and tokens.shape == suffixes.shape == (about.get("tokens"),)
        and isinstance(about.get("order"), int)
        and about["order"] >= 1
        and isinstance(about.get("notes"), dict)
        and (count == 0 or (tokens.min() >= -1 and tokens[-1] == -1))
        and (count == 0 or (suffixes.min() >= 0 and suffixes.max() < count))
        and (count == 0 or np.bincount(suffixes, minlength=count).max() == 1)
    )


def suffix_array(tokens: NDArray[np.int32], order: int) -> NDArray[np.int64]:
    """Give the positions of `tokens` [n] ordered by the `order` tokens that stand there, equal ones by position.

    A position near the end has fewer tokens and stands before those that go on (an absent token is the smallest).
    """
    count = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64).reshape(-1) + 1
    positions = np.argsort(rank, kind="stable")
    known = 1
    while known < order and count:
        step = min(known, order - known)
        behind = np.zeros(count, dtype=np.int64)
        behind[: max(count - step, 0)] = rank[step:]
        key = rank * (count + 2) + behind
        positions = np.argsort(key, kind="stable")
        ordered = key[positions]
        rank = np.empty(count, dtype=np.int64)
        rank[positions] = np.cumsum(np.r_[1, ordered[1:] != ordered[:-1]])
        known += step
    return positions


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
