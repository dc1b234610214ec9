"""Recorded traces of arrivals, in the formats in which they were published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ScenarioError
from simulator.playback.arrivals import read_arrivals
from simulator.workload.arrivals import Arrivals, Prefixes
from simulator.workload.files import CsvColumns, Faults, opened, sha256

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
