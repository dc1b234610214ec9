"""Arrivals from a CSV file, bound to recorded sequences."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from calibration.common.arrays import placed_rows, tell
from calibration.common.errors import ScenarioError
from simulator.playback.replay import SequenceTable

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


class Arrival(NamedTuple):
    """One row: seconds, and tokens of prompt and output."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_arrivals(path: Path, rows: int | None = None) -> list[Arrival]:
    """Read the first `rows` rows (default all) of the CSV file at `path`, sorted by arrival, equal ones as written.

    It has a header; other columns are ignored. Raises `ScenarioError` with file, line, column, rule and value.
    """
    faults: list[str] = []
    placed = placed_rows(path, COLUMNS, "workload.path", faults)
    arrivals = [_arrival(row, place, faults) for place, row in itertools.islice(placed, rows)]
    if not faults and len(arrivals) < (rows or 1):
        faults.append(f"{path}: must hold at least {rows or 1} rows (workload.requests), got {len(arrivals)}")
    tell(path, faults)
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _arrival(row: Mapping[str, str | None], place: str, faults: list[str]) -> Arrival:
    def number(column: str, low: float) -> float:
        text = row[column]
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        whole = column == "arrival_s" or value.is_integer()
        if not (math.isfinite(value) and value >= low and whole):
            kind = "a number" if column == "arrival_s" else "a whole number"
            faults.append(f"{place}: column '{column}': must be {kind} >= {low:g}, got {text!r}")
            return low
        return value

    return Arrival(number("arrival_s", 0), int(number("prompt_tokens", 1)), int(number("output_tokens", 1)))


def bind_rows(rows: list[Arrival], sequences: SequenceTable, path: Path) -> list[int]:
    """Give the sequence that each row replays: the shortest recorded output that is at least as long.

    Sequences of equal length take turns. Raises `ScenarioError` where a row's output is longer than any recorded
    one: what a drafter would have done there was not seen.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(sequences.output_tokens):
        by_length[length].append(index)
    lengths = sorted(by_length)
    too_long = [row.output_tokens for row in rows if row.output_tokens > lengths[-1]]
    if too_long:
        raise ScenarioError(
            f"{path}: column 'output_tokens': must be at most {lengths[-1]}, the longest recorded output, got "
            f"{max(too_long)} ({len(too_long)} of {len(rows)} rows are longer)"
        )
    turn: dict[int, int] = defaultdict(int)
    bound = []
    for row in rows:
        length = lengths[bisect.bisect_left(lengths, row.output_tokens)]
        choices = by_length[length]
        bound.append(choices[turn[length] % len(choices)])
        turn[length] += 1
    return bound
