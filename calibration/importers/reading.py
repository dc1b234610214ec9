"""Read JSON lines and JSON files, with the place of every object for what is wrong with it.

The rows of imported sequences and positions, collected sequence by sequence.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from calibration.common.arrays import Ints
from calibration.common.errors import TraceError
from calibration.traces import make_table

Object = Mapping[str, Any]


def check_files(files: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse no files at all, and files of the same name, whose requests could not be told apart."""
    if not files:
        raise TraceError("import: at least one file is needed")
    stems = [Path(name).stem for name in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise TraceError(f"import: files must have names of their own, got '{twice}' more than once")


def read_text(file: str | os.PathLike[str]) -> tuple[Path, str]:
    """Give the path and the text of `file`; `TraceError` where there is none."""
    path = Path(file)
    if not path.is_file():
        raise TraceError(f"{path}: not found")
    try:
        return path, path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TraceError(f"{path}: must be UTF-8 text") from None


def read_objects(file: str | os.PathLike[str]) -> list[tuple[str, Object]]:
    """Give (place, object) for a JSON object, a JSON list of objects, or JSON lines.

    The place reads ``file:line`` for lines, ``file: item 3`` for the third of a list.
    """
    path, text = read_text(file)
    whole = _whole(text)
    if isinstance(whole, list):
        found = [(f"{path}: item {number}", item) for number, item in enumerate(whole, start=1)]
    elif whole is not None:
        found = [(str(path), whole)]
    else:
        found = [
            (f"{path}:{number}", _line(line, f"{path}:{number}"))
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
    if not found:
        raise TraceError(f"{path}: holds no JSON object")
    return [(place, check_object(item, place)) for place, item in found]


def check_object(item: Any, place: str) -> Object:
    """Give `item`, which must be a JSON object."""
    if not isinstance(item, Mapping):
        raise TraceError(f"{place}: must be a JSON object, got {type(item).__name__}")
    return item


def count(item: Object, key: str, place: str, least: int = 0) -> int:
    """Give the whole number under `key`, at least `least`; numbers like 12.0 count as whole."""
    value = item.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < least or value % 1:
        raise TraceError(f"{place}: {key}: must be a whole number >= {least}, got {value!r}")
    return int(value)


def measure(item: Object, key: str, place: str, least: float = 0.0) -> float:
    """Give the finite number under `key`, at least `least`."""
    value = item.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        raise TraceError(f"{place}: {key}: must be a number >= {least:g}, got {value!r}")
    return float(value)


def counts(item: Object, key: str, place: str) -> tuple[int, ...] | None:
    """Give the list of whole numbers >= 0 under `key`; None where it is missing or null."""
    value = item.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise TraceError(f"{place}: {key}: must be a list of whole numbers >= 0, got {value!r}")
    return tuple(value)


def _whole(text: str) -> Any:
    """Give the one JSON document that `text` is, or None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as fault:
        raise TraceError(f"{place}: not valid JSON ({fault.msg})") from None


class Collected:
    """Rows of both tables; positions begin at 1, where the first round starts (prefill emits token 0)."""

    def __init__(self) -> None:
        self._sequences: dict[str, list[Any]] = {
            name: [] for name in ("sequence_id", "domain", "prompt_tokens", "output_tokens", "finish_reason")
        }
        self._ids: list[str] = []
        self._drafters: list[str] = []
        self._counts: list[int] = []
        self._runs: list[Ints] = []
        self._proposals: list[Ints | None] = []

    def sequence(self, name: str, domain: str, prompt_tokens: int, output_tokens: int, finish_reason: str) -> None:
        """Add a request."""
        row = (name, domain, prompt_tokens, output_tokens, finish_reason)
        for column, value in zip(self._sequences.values(), row, strict=True):
            column.append(value)

    def positions(self, name: str, drafter: str, runs: Ints, proposals: Ints | None) -> None:
        """Add run and proposal lengths at positions 1, 2, ... of request `name`."""
        self._ids.append(name)
        self._drafters.append(drafter)
        self._counts.append(len(runs))
        self._runs.append(runs)
        self._proposals.append(proposals)

    def tables(self) -> dict[str, pa.Table]:
        """Give the two tables."""
        counts = np.array(self._counts, dtype=np.int64)
        total = int(counts.sum())
        first = np.repeat(np.cumsum(counts) - counts, counts)
        runs = np.concatenate(self._runs) if self._runs else np.zeros(0, np.int64)
        columns: dict[str, Any] = {
            "sequence_id": np.repeat(np.array(self._ids, dtype=object), counts),
            "drafter": np.repeat(np.array(self._drafters, dtype=object), counts),
            "position": np.arange(total) - first + 1,
            "run_length": runs,
            "accept_probability": (runs > 0).astype(np.float32),
        }
        known = [one for one in self._proposals if one is not None]
        if len(known) == len(self._proposals) and known:
            columns["proposal_length"] = np.concatenate(known)
        return {
            "sequences": make_table("sequences", self._sequences),
            "positions": make_table("positions", columns),
        }
