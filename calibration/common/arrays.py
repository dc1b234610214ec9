"""The kinds of arrays that everything here computes with.

Rows of a CSV file that a scenario names, with their places and every fault told at once.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import ScenarioError, did_you_mean

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


_SHOWN = 10
"""Faults of one file that are spelled out."""


def placed_rows(
    path: Path, columns: Sequence[str], key: str, faults: list[str]
) -> Iterator[tuple[str, Mapping[str, str | None]]]:
    """Give (file and line, row) for every row of the CSV file at `path`; other columns than `columns` may be there.

    A column that is missing is added to `faults`, and no row is given. Raises `ScenarioError`, which names the `key`
    of the scenario, where there is no such file.
    """
    if not path.is_file():
        raise ScenarioError(f"{path}: not found ({key})")
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        missing = [column for column in columns if column not in header]
        faults += [f"{path}: column '{column}': is missing{did_you_mean(column, header)}" for column in missing]
        if not missing:
            for row in reader:
                yield f"{path}:{reader.line_num}", row


def tell(path: Path, faults: Sequence[str]) -> None:
    """Raise `ScenarioError` with the first of `faults`, if there are any, and how many more there are."""
    if faults:
        more = [f"{path}: and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ScenarioError("\n".join([*faults[:_SHOWN], *more]))
