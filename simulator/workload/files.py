"""Files that people hand in: columns of numbers, with every fault told by file, line, column, rule and value.

Recorded traces of arrivals, in the formats in which they were published.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ScenarioError, did_you_mean
from simulator.playback.arrivals import read_arrivals
from simulator.workload.arrivals import Arrivals, Prefixes

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


MOONCAKE_BLOCK_TOKENS = 512
"""Prompt tokens that one id of `hash_ids` stands for (Mooncake, arXiv 2407.00079)."""


def read_trace(path: Path, form: str, rows: int | None = None) -> Arrivals:
    """Read the trace at `path` in the format `form`, `rows` of it at most, in the order of the file.

    Time is in seconds from the earliest row; format ``csv`` keeps it as written. Raises `ScenarioError` with file,
    line, column, rule and value for every row that breaks a rule.
    """
    readers = {"azure": _azure, "mooncake": _mooncake, "burstgpt": _burstgpt, "csv": _csv}
    arrivals = readers[form](path, rows)
    if len(arrivals) == 0:
        raise ScenarioError(f"{path}: must hold at least one request, got none")
    told = {"arrivals": f"trace ({form})", "file": path.name, "file_sha256": sha256(path)}
    return replace(arrivals, provenance={**told, **arrivals.provenance})


def _csv(path: Path, rows: int | None) -> Arrivals:
    read = read_arrivals(path, None)[:rows]
    columns = [np.array(column) for column in zip(*read, strict=True)]
    return Arrivals(columns[0].astype(np.float64), columns[1], columns[2])


def _azure(path: Path, rows: int | None) -> Arrivals:
    """AzurePublicDataset, LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens."""
    table = CsvColumns.read(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), rows=rows)
    times = _instants(table, "TIMESTAMP")
    prompt = table.numbers("ContextTokens", low=1, whole=True)
    output = table.numbers("GeneratedTokens", low=1, whole=True)
    table.faults.raise_if_any()
    return Arrivals(_from_first(times), prompt.astype(np.int64), output.astype(np.int64))


def _instants(table: CsvColumns, column: str) -> Floats:
    """Give dates with times of day as seconds from the first of them, to a tenth of a microsecond."""
    texts = [text.strip().removesuffix("+00:00").removesuffix("Z") for text in table.texts[column]]

    def parsed(text: str) -> np.datetime64:
        try:
            return np.datetime64(text if text[:1].isdigit() and len(text) >= 19 else "", "ns")
        except ValueError:
            return np.datetime64("NaT", "ns")

    try:
        instants = np.array(texts, dtype="datetime64[ns]")
        if not all(text[:1].isdigit() and len(text) >= 19 for text in texts):
            raise ValueError
    except ValueError:
        instants = np.array([parsed(text) for text in texts], dtype="datetime64[ns]")
    for row in np.flatnonzero(np.isnat(instants)).tolist():
        rule = "must be a date and time like 2023-11-16 18:15:46.68"
        table.faults.add(table.lines[row], column, rule, table.texts[column][row])
    if table.faults.number or not len(instants):
        return np.zeros(len(instants))
    seconds: Floats = (instants - instants[0]).astype(np.int64) / 1e9
    return seconds


def _burstgpt(path: Path, rows: int | None) -> Arrivals:
    """BurstGPT (arXiv 2401.17644): Timestamp (s), Request tokens, Response tokens, and maybe Session ID.

    Rows without request or response tokens are calls that failed: they are left out and counted.
    """
    tokens = ("Request tokens", "Response tokens")
    failed = 0

    def served(row: dict[str, str]) -> bool:
        nonlocal failed
        lost = any(row[name].strip() in ("0", "0.0") for name in tokens)
        failed += lost
        return not lost

    table = CsvColumns.read(path, ("Timestamp", *tokens), ("Session ID",), rows=rows, keep=served)
    times = table.numbers("Timestamp")
    prompt, output = (table.numbers(name, low=1, whole=True).astype(np.int64) for name in tokens)
    table.faults.raise_if_any()
    clients, codes = _coded(table.texts.get("Session ID"))
    return Arrivals(_from_first(times), prompt, output, codes, clients, provenance={"failed_rows_left_out": failed})


def _coded(names: list[str] | None) -> tuple[tuple[str, ...], Ints | None]:
    """Give the different names and, for each row, which one it has; -1 where it has none."""
    if names is None:
        return (), None
    known = {name: code for code, name in enumerate(dict.fromkeys(name for name in names if name.strip()))}
    return tuple(known), np.array([known.get(name, -1) for name in names], dtype=np.int64)


def _mooncake(path: Path, rows: int | None) -> Arrivals:
    """Mooncake (FAST 25): JSON lines of timestamp (ms), input_length, output_length, hash_ids of 512-token blocks."""
    faults = Faults(path)
    columns: dict[str, list[int]] = {"timestamp": [], "input_length": [], "output_length": []}
    hashes: list[int] = []
    ends: list[int] = []
    with opened(path) as stream:
        for line, text in enumerate(stream, start=1):
            if rows is not None and len(ends) == rows:
                break
            if not text.strip():
                continue
            row = _object(text, line, faults)
            for (name, values), low in zip(columns.items(), (0, 1, 1), strict=True):
                values.append(_whole(row, name, low, line, faults))
            hashes += _hash_ids(row, columns["input_length"][-1], line, faults)
            ends.append(len(hashes))
    faults.raise_if_any()
    times, prompt, output = (np.array(values, dtype=np.int64) for values in columns.values())
    prefixes = Prefixes(MOONCAKE_BLOCK_TOKENS, np.array(hashes, dtype=np.int64), np.array(ends, dtype=np.int64))
    return Arrivals(_from_first(times / 1000), prompt, output, prefixes=prefixes)


def _object(text: str, line: int, faults: Faults) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as fault:
        faults.add(line, "(all)", f"must be a JSON object ({fault.msg})")
        return {"timestamp": 0, "input_length": 1, "output_length": 1}
    if not isinstance(row, dict):
        faults.add(line, "(all)", "must be a JSON object", row)
        return {"timestamp": 0, "input_length": 1, "output_length": 1}
    return row


def _whole(row: dict[str, Any], name: str, low: int, line: int, faults: Faults) -> int:
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
        rule = f"must be a whole number >= {low}" if name in row else "is missing"
        faults.add(line, name, rule, value)
        return low
    return value


def _hash_ids(row: dict[str, Any], prompt_tokens: int, line: int, faults: Faults) -> list[int]:
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(value) is int and 0 <= value < 2**63 for value in ids):
        faults.add(line, "hash_ids", "must be a list of whole numbers >= 0", ids)
        return []
    most = -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)
    if len(ids) > most:
        rule = f"must be at most {most} blocks of {MOONCAKE_BLOCK_TOKENS} tokens for input_length {prompt_tokens}"
        faults.add(line, "hash_ids", rule, len(ids))
    return ids


def _from_first(times: Floats) -> Floats:
    return times - times.min() if len(times) else times
