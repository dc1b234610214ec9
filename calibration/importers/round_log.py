"""Logs of rounds, one row a round: the columns of a CSV file, and a TraceSet of what each round accepted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Ints
from calibration.common.errors import TraceError
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.rounds import Rounds, Tally, depth_rates, fill
from calibration.importers.tables import Collected
from calibration.traces import TraceSet

Kind = Literal["text", "count", "seconds"]
"""What a column holds: text; whole numbers >= 0; finite numbers >= 0, whatever their unit."""


@dataclass(frozen=True)
class LoggedRequest:
    """The rounds of one request in order; `name` and `domain` as they are to be called."""

    name: str
    domain: str
    rounds: Rounds


def read_columns(file: str | os.PathLike[str], kinds: Mapping[str, Kind]) -> dict[str, NDArray[Any]]:
    """Give the columns `kinds` of a CSV file (plain or .gz) as arrays; others in it are ignored.

    Raises `TraceError` with file, column, line and rule for what is missing or of another kind.
    """
    import pyarrow as pa
    from pyarrow import csv

    path = Path(file)
    if not path.is_file():
        raise TraceError(f"{path}: not found")
    types = {name: pa.string() for name in kinds}
    try:
        table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False))
    except (pa.ArrowInvalid, OSError) as fault:
        raise TraceError(f"{path}: not readable as CSV ({fault})") from None
    for name in kinds:
        if name not in table.column_names:
            raise TraceError(f"{path}: column '{name}' is missing; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise TraceError(f"{path}: must hold at least one row, got none")
    return {name: _values(table[name].to_pylist(), kind, f"{path}", name) for name, kind in kinds.items()}


def _values(texts: list[str], kind: Kind, place: str, column: str) -> NDArray[Any]:
    if kind == "text":
        return np.array(texts, dtype=object)
    try:
        numbers = np.array(texts, dtype=np.float64)
    except ValueError:
        numbers = np.array([_number(text) for text in texts])
    wrong = ~(np.isfinite(numbers) & (numbers >= 0))
    rule = "a number >= 0"
    if kind == "count":
        wrong |= numbers != np.floor(np.where(wrong, 0, numbers))
        rule = "a whole number >= 0"
    if wrong.any():
        row = int(np.argmax(wrong))
        raise TraceError(f"{place}:{row + 2}: column '{column}': must be {rule}, got '{texts[row]}'")
    return numbers.astype(np.int64) if kind == "count" else numbers


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def groups(*keys: NDArray[Any]) -> dict[tuple[Any, ...], Ints]:
    """Give the rows of every combination of `keys`, in the order in which the combinations first appear."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, key in enumerate(zip(*(column.tolist() for column in keys), strict=True)):
        found.setdefault(key, []).append(row)
    return {key: np.array(rows, dtype=np.int64) for key, rows in found.items()}


def trace_of_rounds(
    requests: Sequence[LoggedRequest],
    origin: Origin,
    import_format: str,
    file: Path,
    *,
    seed: int,
    unknown: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> TraceSet:
    """Give the TraceSet of logged rounds: each replays where it started, with the draft length that it had.

    An output is one token of the prefill and what the rounds emitted (accepted and bonus). What a draft between two
    rounds would have done is an estimate (see `calibration.importers.rounds`). Prompt lengths are not in such logs;
    they are written down as 1 token, and the manifest says so.
    """
    rng = np.random.default_rng(seed)
    longest = max(int(request.rounds.drafted.max()) for request in requests)
    rates = depth_rates(request.rounds for request in requests)
    collected, tally, domains = Collected(), Tally(), dict[str, int]()
    for request in requests:
        output = 1 + int((request.rounds.accepted + 1).sum())
        filled = fill(request.rounds, output, longest, rates, looks_up=True, rng=rng)
        collected.sequence(request.name, request.domain, 1, output, "unknown")
        collected.positions(request.name, origin.drafter, filled.runs, filled.proposals)
        tally.add(filled.tally)
        domains[request.domain] = domains.get(request.domain, 0) + 1
    manifest = origin.manifest(
        import_format,
        "round",
        longest_draft=longest,
        prompts=[prompt_source(file, domain, number) for domain, number in domains.items()],
        seed=seed,
        unknown=(
            "prompt lengths: not in the log; written down as 1 token",
            "what a draft between two logged rounds would have done: estimated",
            *unknown,
        ),
        notes=(
            f"{tally.starts_exact + tally.starts_open} of {tally.positions} positions are starts of rounds",
            *notes,
        ),
    )
    return TraceSet.build(manifest, collected.tables())
