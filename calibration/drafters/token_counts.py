"""How often a verifier writes each token: counted from a TraceSet, a corpus of training text, or read from a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from calibration.common.arrays import Ints
from calibration.common.errors import CalibrationError


def token_counts(source: Path | str, vocabulary: int) -> Ints:
    """Give how often each of `vocabulary` tokens was written in `source` [vocabulary].

    `source` is a TraceSet or a corpus of training text, of which the outputs count, or a CSV file with the columns
    ``token`` and ``count``. `CalibrationError` where it is none of these, or holds other tokens.
    """
    path = Path(source)
    if path.suffix == ".csv" and path.is_file():
        tokens, counts = _read_csv(path)
    else:
        tokens = _written(path)
        counts = np.ones(len(tokens), dtype=np.int64)
    if len(tokens) == 0 or counts.sum() == 0:
        raise CalibrationError(f"{path}: must hold tokens that were written, got none")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        worst = tokens.max() if tokens.max() >= vocabulary else tokens.min()
        raise CalibrationError(f"{path}: tokens must lie in [0, {vocabulary - 1}], got {worst}")
    found: Ints = np.zeros(vocabulary, dtype=np.int64)
    np.add.at(found, tokens, counts)
    return found


def save_token_counts(counts: Ints, path: Path | str) -> None:
    """Write the counts that are not 0 as CSV, most frequent first."""
    order = ranked(counts)[: int((counts > 0).sum())]
    pa.csv.write_csv(pa.table({"token": order, "count": counts[order]}), path)


def ranked(counts: Ints) -> Ints:
    """Give token ids by falling count; among equals the lower id, in BPE the earlier merge, comes first."""
    order: Ints = np.argsort(-counts, kind="stable")
    return order


def most_frequent(counts: Ints, tokens: int | None = None, coverage: float | None = None) -> Ints:
    """Give the ids, rising, of the `tokens` most frequent ones, or of as many as make up `coverage` of the counts."""
    order = ranked(counts)
    if tokens is None:
        reached = np.cumsum(counts[order]) / counts.sum()
        tokens = int(np.searchsorted(reached, min(coverage or 1.0, reached[-1]) - 1e-12)) + 1
    return np.sort(order[:tokens])


def counts_hash(counts: Ints) -> str:
    """Give the sha256 of the table."""
    return hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()


def _written(path: Path) -> Ints:
    from calibration.drafters.proposed import read_texts

    return np.concatenate(
        [np.zeros(0, dtype=np.int64), *(np.asarray(row, dtype=np.int64) for row in read_texts(path))]
    )


def _read_csv(path: Path) -> tuple[Ints, Ints]:
    try:
        table = pa.csv.read_csv(path)
        columns = [table[name].to_numpy().astype(np.int64, casting="safe") for name in ("token", "count")]
    except (pa.ArrowInvalid, KeyError, TypeError) as fault:
        raise CalibrationError(f"{path}: must have integer columns token and count ({fault})") from None
    if (columns[1] < 0).any():
        raise CalibrationError(f"{path}: count must be >= 0, got {columns[1].min()}")
    return columns[0], columns[1]
