"""A datastore of token sequences for retrieval: a suffix array that is searched by bisection, in one file.

The suffix array lists all positions in the order of the `order` tokens that stand there, equal ones by position. That
is all a lookup of at most `order` tokens needs, and doubling reaches it in ceil(log2(order)) sorts: O(n log n) time
for n tokens (Manber and Myers, 1993, stopped early). A lookup takes O(log n) comparisons. Five million
tokens take a few seconds to build and 40 MB on disk.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError

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
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"kind": _KIND, "format": FORMAT, "order": self.order, "tokens": len(self), "notes": self.notes}
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                small = self.suffixes.astype(np.int32) if len(self) < 2**31 else self.suffixes
                np.savez(file, about=np.array(json.dumps(about)), tokens=self.tokens, suffixes=small)
            Path(scratch).chmod(0o644)
            Path(scratch).replace(target)
        finally:
            Path(scratch).unlink(missing_ok=True)
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
