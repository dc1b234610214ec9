"""A measured run: its manifest, its tables and their rules, in memory and as a folder.

The manifest says which engine, where, on which clock, and what could not be seen. All times of the tables are seconds
on the run's clock, from the start of their repeat. Every fault reads ``file: column 'c', row r: rule, got value``;
rows count from 0.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from calibration.common.errors import TraceError
from calibration.common.files import fresh_folder, parse_parquet, read_checked, sha256, write_whole
from calibration.common.secrets import Command
from calibration.common.settings import Count, Table
from calibration.traces.manifest import DeviceInfo, Sealing, TableInfo, parse_versioned, sealings
from calibration.traces.validate import Column, build_table, conform_to

SCHEMA_VERSION = 1
"""Schema of measured runs that this version writes, and the newest that it reads."""

Setting = str | int | float | bool


class EngineInfo(Table):
    """The engine that was driven: its name, its version where known, and the settings that it ran with."""

    name: str
    version: str | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)


class Manifest(Table):
    """Everything about a measured run that is not a table.

    `role`: ``fit`` runs may be looked at before predicting, ``held-out`` ones may not. `clock`: what seconds mean,
    CPU time of the engine's thread (``thread-cpu``; idle time between arrivals is skipped) or ``wall`` time.
    `model`: what was served. `scenario_hash`: of the scenario beside it. `unknown`: what could not be seen from
    outside, one entry each. `counters`: how far the engine's own counters went over all repeats, by Prometheus name
    and labels. `tables`: rows and sha256 of the Parquet files, in the folder only; `sealed`: tables whose sha256 was
    stated after the run was written, see `calibration.measured.run.seal`.
    """

    schema_version: Count = SCHEMA_VERSION
    paceline_version: str
    name: str
    role: Literal["fit", "held-out"]
    engine: EngineInfo
    model: str
    device: DeviceInfo
    clock: Literal["thread-cpu", "wall"]
    repeats: Count
    created: str
    command: Command
    software: dict[str, str] = Field(default_factory=dict)
    scenario_hash: str
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counters: dict[str, float] = Field(default_factory=dict)
    tables: dict[str, TableInfo] = Field(default_factory=dict)
    sealed: tuple[Sealing, ...] = ()


def parse_manifest(text: str, path: Path) -> Manifest:
    """Read a manifest from JSON; `TraceError` names every fault, a newer schema version first of all."""
    return parse_versioned(Manifest, text, path, SCHEMA_VERSION, "run")


OPERATIONS = ("prefill", "decode", "mixed", "draft")
"""What a step did: prompt tokens only, a decode or verify round only, both, or one step of a drafter."""

REQUESTS = (
    Column("repeat", pa.int32(), "which repeat of the condition, from 0", low=0),
    Column("request_id", pa.int32(), "as in the simulated run of the same scenario", low=0),
    Column("sequence_id", pa.string(), "recorded sequence whose prompt it had"),
    Column("domain", pa.string(), "domain of its prompt"),
    Column("counted", pa.bool_(), "false for a filler that only kept the batch full"),
    Column("arrival_s", pa.float64(), "when it arrived", low=0),
    Column("first_token_s", pa.float64(), "when its first token was there", low=0),
    Column("finish_s", pa.float64(), "when its last token was there", low=0),
    Column("prompt_tokens", pa.int32(), "tokens of its prompt", low=1),
    Column("output_tokens", pa.int32(), "tokens it received", low=1),
    Column("drafts", pa.int32(), "rounds with at least one drafted token", nullable=True, low=0),
    Column("drafted_tokens", pa.int32(), "tokens drafted for it and verified", nullable=True, low=0),
    Column("accepted_tokens", pa.int32(), "of these, accepted; bonus excluded", nullable=True, low=0),
    Column("emission_s", pa.list_(pa.float64()), "when tokens arrived, one entry per arrival", nullable=True),
    Column("emitted", pa.list_(pa.int32()), "how many tokens arrived each time", nullable=True),
    Column("output_token_ids", pa.list_(pa.int32()), "the tokens it received", nullable=True),
)

STEPS = (
    Column("repeat", pa.int32(), "which repeat of the condition, from 0", low=0),
    Column("step", pa.int32(), "engine iteration; the draft steps of a round share its number", low=0),
    Column("operation", pa.string(), "what was done", choices=OPERATIONS),
    Column("model", pa.string(), "who computed: the verifier or a drafter, as the TraceSet names them"),
    Column("start_s", pa.float64(), "when it began", low=0),
    Column("seconds", pa.float64(), "how long it took on the run's clock; an iteration's host time included", low=0),
    Column("wall_s", pa.float64(), "how long it took on the wall clock", low=0),
    Column("sequences", pa.int32(), "sequences in a decode or draft step", low=0),
    Column("new_tokens", pa.int32(), "tokens that these had computed, drafted ones included; a sum", low=0),
    Column("context_tokens", pa.int32(), "tokens that these had in their caches before; a sum", low=0),
    Column("prefill_sequences", pa.int32(), "sequences that had prompt tokens computed", low=0),
    Column("prefill_tokens", pa.int32(), "prompt tokens computed; a sum", low=0),
    Column("prefill_context_tokens", pa.int32(), "prompt tokens of theirs that were cached before; a sum", low=0),
    Column("drafted_tokens", pa.int32(), "drafted tokens that were verified; a sum", nullable=True, low=0),
    Column("accepted_tokens", pa.int32(), "of these, accepted; bonus excluded", nullable=True, low=0),
    Column("emitted_tokens", pa.int32(), "tokens that requests received; a sum", low=0),
)
"""One row per timed forward pass, in order; the seconds of all rows of a repeat add up to its busy time."""

TABLES: dict[str, tuple[Column, ...]] = {"requests": REQUESTS, "steps": STEPS}


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


MARKER = "measured.json"
SCENARIO = "scenario.toml"
FILES = (MARKER, *(f"{name}.parquet" for name in TABLES), SCENARIO)
"""The files of a measured run; whatever else lies in its folder is not read."""


@dataclass(frozen=True)
class MeasuredRun:
    """What an engine did under one scenario: its manifest, one row per request and repeat, one row per step.

    `steps` is empty where only requests could be seen (a server behind HTTP). `scenario` is the text of the resolved
    scenario (TOML) that was run; `paceline simulate` on it predicts the run.
    """

    manifest: Manifest
    requests: pa.Table
    steps: pa.Table
    scenario: str
    unverified: tuple[str, ...] = field(default=(), init=False)
    """Tables that were read, but whose sha256 `MARKER` does not state, so that damage would not show."""

    @classmethod
    def build(
        cls, manifest: Manifest, requests: Mapping[str, Any], steps: Mapping[str, Any] | None, scenario: str
    ) -> MeasuredRun:
        """Make the tables from columns; `TraceError` names the column that does not fit, or the rule it breaks."""
        made = {
            name: build_table(name, columns, TABLES[name])
            for name, columns in (("requests", requests), ("steps", steps or {}))
        }
        return cls._checked(manifest, made, scenario)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> MeasuredRun:
        """Read and check the measured run in `folder`; `TraceError` names the file, column, row and rule at fault.

        A table whose sha256 is not the one that `MARKER` states is refused; runs that state none are read.
        """
        root = Path(folder)
        return cls._load(root, _manifest(root))[0]

    @classmethod
    def _load(cls, root: Path, manifest: Manifest) -> tuple[MeasuredRun, dict[str, str]]:
        """Give the run beside `manifest`, and the sha256 of the bytes of each of its tables."""
        tables, digests, hint = {}, {}, f"; after an edit on purpose: paceline traces seal {root}"
        for name in TABLES:
            path, info = root / f"{name}.parquet", manifest.tables.get(name)
            stated = None if info is None else info.sha256
            data, digests[name] = read_checked(path, stated, by=MARKER, error=TraceError, hint=hint)
            tables[name] = parse_parquet(data, path, error=TraceError, verified=info is not None)
        scenario = _text(read_checked(root / SCENARIO, None, by=MARKER, error=TraceError)[0], root / SCENARIO)
        run = cls._checked(manifest.model_copy(update={"tables": {}}), tables, scenario)
        object.__setattr__(run, "unverified", tuple(name for name in TABLES if name not in manifest.tables))
        return run, digests

    @classmethod
    def _checked(cls, manifest: Manifest, tables: Mapping[str, pa.Table], scenario: str) -> MeasuredRun:
        requests, steps = (conform_to(name, tables[name], TABLES[name]) for name in ("requests", "steps"))
        check_requests(requests, manifest)
        check_steps(steps, requests, manifest)
        return cls(manifest, requests, steps, scenario)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write it to `folder`, which appears whole or not at all; an older measured run there is replaced."""
        target = Path(folder)
        with fresh_folder(target, MARKER, error=TraceError, what="measured run") as scratch:
            for name in TABLES:
                pq.write_table(getattr(self, name), scratch / f"{name}.parquet", compression="zstd")
            (scratch / SCENARIO).write_text(self.scenario, encoding="utf-8")
            (scratch / MARKER).write_text(_json(self.manifest, self, _digests(scratch)), encoding="utf-8")
        return target


def seal(folder: str | os.PathLike[str]) -> tuple[Sealing, ...]:
    """State the sha256 of the tables of a measured run as they lie there; see `calibration.traces.traceset.seal`."""
    root = Path(folder)
    manifest = _manifest(root)
    run, found = MeasuredRun._load(root, manifest.model_copy(update={"tables": {}}))
    new = sealings({name: info.sha256 for name, info in manifest.tables.items()}, found)
    if new:
        changed = manifest.model_copy(update={"sealed": (*manifest.sealed, *new)})
        write_whole(root / MARKER, _json(changed, run, found))
    return new


def _manifest(root: Path) -> Manifest:
    path = root / MARKER
    if not path.is_file():
        raise TraceError(f"{path}: not found; a measured run is a folder with {MARKER} and Parquet tables")
    return parse_manifest(_text(read_checked(path, None, by="", error=TraceError)[0], path), path)


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text") from None


def _digests(root: Path) -> dict[str, str]:
    return {name: sha256((root / f"{name}.parquet").read_bytes()) for name in TABLES}


def _json(manifest: Manifest, run: MeasuredRun, digests: Mapping[str, str]) -> str:
    tables = {name: TableInfo(rows=getattr(run, name).num_rows, sha256=digests[name]) for name in TABLES}
    return manifest.model_copy(update={"tables": tables}).model_dump_json(indent=2) + "\n"
