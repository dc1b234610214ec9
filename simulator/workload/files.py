"""Files that people hand in: columns of numbers, with every fault told by file, line, column, rule and value."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from calibration.common.arrays import Floats
from calibration.common.errors import ScenarioError, did_you_mean

SHOWN = 10
"""Faults of one file that are spelled out."""


@dataclass
class Faults:
    """What is wrong with one file, collected before it is refused."""

    path: Path
    found: list[str] = field(default_factory=list)
    number: int = 0

    def add(self, line: int | None, column: str, rule: str, got: object = None) -> None:
        """Note a fault; `line` None is the header."""
        self.number += 1
        if self.number <= SHOWN:
            where = f"{self.path}:{line}" if line is not None else f"{self.path}"
            value = "" if got is None else f", got {got!r}"
            self.found.append(f"{where}: column '{column}': {rule}{value}")

    def raise_if_any(self) -> None:
        """Raise `ScenarioError` with what was found."""
        if self.found:
            more = [f"{self.path}: and {self.number - SHOWN} more"] if self.number > SHOWN else []
            raise ScenarioError("\n".join(self.found + more))


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Open a text file, unpacked where its name ends in ``.gz``; `ScenarioError` where it cannot be read."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
                yield stream
        else:
            with path.open(encoding="utf-8", newline="") as stream:
                yield stream
    except FileNotFoundError:
        raise ScenarioError(f"{path}: not found (workload)") from None
    except UnicodeDecodeError:
        raise ScenarioError(f"{path}: must be UTF-8 text") from None
    except (OSError, EOFError, csv.Error) as fault:
        raise ScenarioError(f"{path}: cannot be read ({fault})") from None


def sha256(path: Path) -> str:
    """Give the sha256 of a file's bytes, to say what was replayed."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class CsvColumns:
    """Some columns of a CSV file with a header, as text, and the line that each row ends on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[int] = []
        self.texts: dict[str, list[str]] = {}
        self.faults = Faults(path)

    @classmethod
    def read(
        cls,
        path: Path,
        needed: Sequence[str],
        optional: Sequence[str] = (),
        *,
        rows: int | None = None,
        keep: Callable[[dict[str, str]], bool] | None = None,
    ) -> CsvColumns:
        """Read the columns `needed`, and those of `optional` that are there; the first `rows` of those that `keep`.

        Raises `ScenarioError` where a column is missing.
        """
        table = cls(path)
        with opened(path) as stream:
            reader = csv.reader(stream)
            header = [name.strip().removeprefix("\ufeff") for name in next(reader, [])]
            for name in needed:
                if name not in header:
                    table.faults.add(None, name, f"is missing{did_you_mean(name, header)}")
            table.faults.raise_if_any()
            names = [*needed, *(name for name in optional if name in header)]
            places = [header.index(name) for name in names]
            table.texts = {name: [] for name in names}
            for row in reader:
                if rows is not None and len(table.lines) == rows:
                    break
                if not row:
                    continue
                values = [row[place] if place < len(row) else "" for place in places]
                if keep is not None and not keep(dict(zip(names, values, strict=True))):
                    continue
                table.lines.append(reader.line_num)
                for name, value in zip(names, values, strict=True):
                    table.texts[name].append(value)
        return table

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self.lines)

    def numbers(self, column: str, *, low: float = 0, whole: bool = False, blank: str | None = None) -> Floats:
        """Give a column as finite numbers >= `low`; those that are not are noted as faults and given as `low`.

        An empty field counts as `blank` where that is given.
        """
        texts = self.texts[column]
        if blank is not None:
            texts = [text if text.strip() else blank for text in texts]
        try:
            values = np.array(texts, dtype=np.float64) if texts else np.zeros(0)
        except ValueError:
            values = np.array([_number(text) for text in texts])
        with np.errstate(invalid="ignore"):
            good = np.isfinite(values) & (values >= low)
            if whole:
                good &= values == np.floor(values)
        for row in np.flatnonzero(~good).tolist():
            kind = "a whole number" if whole else "a number"
            self.faults.add(self.lines[row], column, f"must be {kind} >= {low:g}", texts[row])
        return np.where(good, values, low)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
