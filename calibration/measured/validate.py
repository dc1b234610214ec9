"""The rules of a measured run that go beyond single columns.

Every fault reads ``file: column 'c', row r: rule, got value``; rows count from 0.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calibration.common.errors import TraceError
from calibration.measured.manifest import Manifest

TICK_S = 1e-9
"""Times that lie closer are one: rounding of sums of seconds."""


def check_requests(table: pa.Table, manifest: Manifest) -> None:
    """Check that times follow each other, that tokens add up, and that every repeat is there once."""
    if table.num_rows == 0:
        _refuse("requests", "request_id", None, "must hold at least one row")
    repeat = _numbers(table, "repeat")
    _first("requests", table, "repeat", repeat >= manifest.repeats, f"must be below repeats = {manifest.repeats}")
    gone = sorted(set(range(manifest.repeats)) - set(repeat.astype(int).tolist()))
    if gone:
        _refuse("requests", "repeat", None, f"must hold every repeat of {manifest.repeats}, {gone[0]} is missing")
    keys = list(zip(table["repeat"].to_pylist(), table["request_id"].to_pylist(), strict=True))
    seen: set[tuple[int, int]] = set()
    for row, key in enumerate(keys):
        if key in seen:
            _refuse("requests", "request_id", row, f"must be unique in repeat {key[0]}", key[1])
        seen.add(key)
    arrival, first, finish = (_numbers(table, name) for name in ("arrival_s", "first_token_s", "finish_s"))
    _first("requests", table, "first_token_s", first < arrival - TICK_S, "must not lie before arrival_s")
    _first("requests", table, "finish_s", finish < first - TICK_S, "must not lie before first_token_s")
    _check_counts("requests", table)
    drafts, drafted = _numbers(table, "drafts"), _numbers(table, "drafted_tokens")
    _first("requests", table, "drafts", drafts > drafted, "must not exceed drafted_tokens")
    _check_emissions(table)
    _check_length(table, "output_token_ids", table["output_tokens"], "output_tokens")


def _check_emissions(table: pa.Table) -> None:
    """Check when tokens arrived, and how many: both lists are ragged."""
    _check_length(table, "emitted", pc.list_value_length(table["emission_s"]), "entries of emission_s")
    columns = (table[name].to_pylist() for name in ("first_token_s", "finish_s", "output_tokens"))
    told = zip(table["emission_s"].to_pylist(), table["emitted"].to_pylist(), *columns, strict=True)
    for row, (times, counts, first, finish, tokens) in enumerate(told):
        if times is not None:
            _check_times(row, times, first, finish)
        if counts is None:
            continue
        if times is None:
            _refuse("requests", "emitted", row, "must be missing where emission_s is")
        if any(count is None or count < 1 for count in counts):
            _refuse("requests", "emitted", row, "must hold counts of at least 1", counts)
        if sum(counts) != tokens:
            _refuse("requests", "emitted", row, f"must add up to output_tokens = {tokens}", sum(counts))


def _check_times(row: int, times: list[float | None], first: float, finish: float) -> None:
    known = [time for time in times if time is not None and np.isfinite(time)]
    if len(known) < len(times) or not times:
        _refuse("requests", "emission_s", row, "must hold at least one time, all finite", times)
    if any(later < earlier for earlier, later in itertools.pairwise(known)):
        _refuse("requests", "emission_s", row, "must never go back", times)
    for place, wanted, what in ((0, first, "begin at first_token_s"), (-1, finish, "end at finish_s")):
        if abs(known[place] - wanted) > TICK_S:
            _refuse("requests", "emission_s", row, f"must {what} = {wanted:g}", known[place])


def check_steps(table: pa.Table, requests: pa.Table, manifest: Manifest) -> None:
    """Check that steps follow each other, that counts suit their operation, and that no token comes from nowhere."""
    if table.num_rows == 0:
        return
    repeat, step, start = (_numbers(table, name) for name in ("repeat", "step", "start_s"))
    _first("steps", table, "repeat", repeat >= manifest.repeats, f"must be below repeats = {manifest.repeats}")
    same = np.concatenate(([False], np.diff(repeat) == 0))
    _first("steps", table, "repeat", np.concatenate(([0.0], np.diff(repeat))) < 0, "must never go back")
    _first("steps", table, "step", same & (np.diff(step, prepend=step[0]) < 0), "must never go back in a repeat")
    before = np.concatenate(([0.0], (start + _numbers(table, "seconds"))[:-1]))
    late = same & (start < before - 1e-6 * np.maximum(before, TICK_S))
    _first("steps", table, "start_s", late, "must not lie before the end of the row above")
    sequences, tokens = _numbers(table, "sequences"), _numbers(table, "new_tokens")
    prompts, prompt_tokens = _numbers(table, "prefill_sequences"), _numbers(table, "prefill_tokens")
    _first("steps", table, "new_tokens", tokens < sequences, "must be at least one for each of sequences")
    _first("steps", table, "prefill_tokens", prompt_tokens < prompts, "must be at least one a prefill_sequences")
    names = table["operation"].to_pylist()
    prefill = np.array([name == "prefill" for name in names])
    alone = np.array([name in ("decode", "draft") for name in names])
    _first("steps", table, "sequences", prefill & (sequences > 0), "must be 0 in a prefill step")
    _first("steps", table, "prefill_sequences", alone & (prompts > 0), "must be 0 in a decode or draft step")
    _check_counts("steps", table)
    _check_received(table, requests, manifest)


def _check_received(table: pa.Table, requests: pa.Table, manifest: Manifest) -> None:
    """Check that requests received no token that no step emitted; fillers that did not finish have no row."""
    emitted, received = np.zeros(manifest.repeats), np.zeros(manifest.repeats)
    np.add.at(emitted, _numbers(table, "repeat").astype(int), _numbers(table, "emitted_tokens"))
    np.add.at(received, _numbers(requests, "repeat").astype(int), _numbers(requests, "output_tokens"))
    for repeat in np.flatnonzero((emitted < received) & (emitted > 0)).tolist():
        rule = f"must add up to the {received[repeat]:.0f} tokens that requests of repeat {repeat} received"
        _refuse("steps", "emitted_tokens", None, rule, f"{emitted[repeat]:.0f}")


def _check_counts(name: str, table: pa.Table) -> None:
    accepted, drafted = _numbers(table, "accepted_tokens"), _numbers(table, "drafted_tokens")
    _first(name, table, "accepted_tokens", accepted > drafted, "must not exceed drafted_tokens")


def _check_length(table: pa.Table, column: str, wanted: pa.ChunkedArray, what: str) -> None:
    wrong = pc.fill_null(pc.not_equal(pc.list_value_length(table[column]), wanted), False)
    rows = np.flatnonzero(wrong.to_numpy(zero_copy_only=False))
    if len(rows):
        row = int(rows[0])
        got = len(table[column][row].as_py())
        _refuse("requests", column, row, f"must hold as many as {what} ({wanted[row].as_py()})", got)


def _numbers(table: pa.Table, column: str) -> NDArray[np.float64]:
    """Give a column as floats; missing values are NaN, which no comparison finds."""
    return np.asarray(table[column].to_numpy(zero_copy_only=False), dtype=np.float64)


def _first(name: str, table: pa.Table, column: str, wrong: NDArray[np.bool_], rule: str) -> None:
    rows = np.flatnonzero(wrong)
    if len(rows):
        _refuse(name, column, int(rows[0]), rule, table[column][int(rows[0])].as_py())


def _refuse(name: str, column: str, row: int | None, rule: str, got: Any = None) -> None:
    place = f"{name}.parquet: column '{column}'" + ("" if row is None else f", row {row}")
    raise TraceError(f"{place}: {rule}" + ("" if got is None else f", got {got}"))
