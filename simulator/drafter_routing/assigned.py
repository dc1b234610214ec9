"""Choices made outside: which drafter serves which request, read from a CSV file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from calibration.common.errors import did_you_mean
from calibration.common.rows import placed_rows, tell

COLUMNS = ("sequence_id", "drafter")


def read_assigned(path: Path, drafters: Sequence[str], served: Sequence[str], known: Collection[str]) -> list[int]:
    """Give the index in `drafters` for each of the `served` sequence ids, by the table at `path`.

    A CSV file with a header and the columns sequence_id and drafter; other columns are ignored, and so are rows of
    sequences that are `known` but not served. Raises `ScenarioError` with every fault and its place: a column or a
    served sequence that is missing, a sequence or drafter that there is not, a sequence that stands there twice.
    """
    faults: list[str] = []
    chosen: dict[str, int] = {}
    for place, row in placed_rows(path, COLUMNS, "routing.drafter.path", faults):
        faults += _take(row, place, chosen, drafters, known)
    if not faults:
        faults = [
            f"{path}: column 'sequence_id': must have every sequence that is served, lacks '{name}'"
            for name in served
            if name not in chosen
        ]
    tell(path, faults)
    return [chosen[name] for name in served]


def _take(
    row: Mapping[str, str | None],
    place: str,
    chosen: dict[str, int],
    drafters: Sequence[str],
    known: Collection[str],
) -> list[str]:
    """Add a row to `chosen`; give what is wrong with it."""
    sequence, drafter = ((row[column] or "").strip() for column in COLUMNS)
    faults = []
    if sequence not in known:
        close = did_you_mean(sequence, known) if len(known) <= 1000 else ""
        close = close if "did you mean" in close else ""
        faults.append(f"{place}: column 'sequence_id': not in the TraceSet, got '{sequence}'{close}")
    elif sequence in chosen:
        faults.append(f"{place}: column 'sequence_id': must name each sequence once, got '{sequence}' again")
    if drafter not in drafters:
        close = did_you_mean(drafter, drafters)
        faults.append(f"{place}: column 'drafter': must be one of the drafters, got '{drafter}'{close}")
    if not faults:
        chosen[sequence] = drafters.index(drafter)
    return faults
