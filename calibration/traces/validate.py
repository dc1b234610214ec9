"""The rules of the TraceSet contract, each checked over whole columns at once.

Every fault reads ``file: column 'c', row r: rule, got value``; rows count from 0.

The tables of a TraceSet: their columns, types, units and the rule of every column.

Lengths of runs never include the bonus token. A position t of a sequence is the index of the output token that a
draft started there would have to match first: at t, the prompt and x_0 .. x_{t-1} are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calibration.common.errors import TraceError
from calibration.traces.manifest import SCHEMA_VERSION, Manifest


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type, whether values may be missing, and its inclusive bounds.

    ``since``: the schema version that brought it; in an older TraceSet all its values are missing.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    since: int = 1


def _probability(name: str, doc: str) -> Column:
    return Column(name, pa.float32(), doc, nullable=True, low=0.0, high=1.0)


def _nats(name: str, doc: str) -> Column:
    return Column(name, pa.float32(), doc, nullable=True, low=0.0)


SEQUENCES = (
    Column("sequence_id", pa.string(), "unique name of the request"),
    Column("domain", pa.string(), "domain of its prompt"),
    Column("prompt_tokens", pa.int32(), "length of the prompt in tokens", low=1),
    Column("output_tokens", pa.int32(), "length T of the output in tokens, end token included", low=1),
    Column("finish_reason", pa.string(), "why it ended", choices=("stop", "length", "unknown")),
    Column("prompt_token_ids", pa.list_(pa.int32()), "token ids of the prompt", nullable=True),
    Column("output_token_ids", pa.list_(pa.int32()), "token ids of the output", nullable=True),
    Column("quality", pa.float32(), "graded quality in [0, 1] where measured", nullable=True, low=0, high=1),
)

POSITIONS = (
    Column("sequence_id", pa.string(), "request"),
    Column("drafter", pa.string(), "drafter"),
    Column("position", pa.int32(), "t: output tokens known when the draft starts", low=0),
    Column(
        "run_length",
        pa.int32(),
        "how many drafted tokens match x_t, x_{t+1}, ...; bonus excluded; missing for a sampled model drafter",
        nullable=True,
        low=0,
    ),
    Column(
        "proposal_length",
        pa.int32(),
        "how many tokens the drafter can propose here; missing where it always proposes as many as asked",
        nullable=True,
        low=0,
    ),
    Column(
        "proposal_nodes",
        pa.list_(pa.int32()),
        "nodes of the drafted tree down to depth 1, 2, ...; missing for chains",
        nullable=True,
        since=2,
    ),
    Column(
        "draft_layers",
        pa.list_(pa.int32()),
        "decoder layers run for the first 1, 2, ... drafted tokens together; missing where every token runs all",
        nullable=True,
        since=2,
    ),
    _probability("accept_probability", "P(a token drafted at t is accepted | x_t is emitted) = min(1, q/p)"),
    Column("emitted_rank", pa.int32(), "rank of x_t under the drafter, 0 first", nullable=True, low=0),
    _probability("drafter_confidence", "largest probability of the drafter at t"),
    _nats("drafter_entropy", "entropy of the drafter at t, nats"),
    _probability("verifier_confidence", "largest probability of the verifier at t"),
    _nats("verifier_entropy", "entropy of the verifier at t, nats"),
    _probability("overlap", "sum over the vocabulary of min(p, q) at t"),
)

ROLLOUTS = (
    Column("sequence_id", pa.string(), "request"),
    Column("drafter", pa.string(), "drafter"),
    Column("position", pa.int32(), "t: where the draft starts", low=0),
    Column("step", pa.int32(), "j: 1 for the first drafted token", low=1),
    Column("drafter_confidence", pa.float32(), "largest probability of the drafter at step j", low=0, high=1),
    Column("drafter_entropy", pa.float32(), "entropy of the drafter at step j, nats", low=0),
)

TIMINGS = (
    Column("model", pa.string(), "verifier or drafter, by its name in the manifest"),
    Column("operation", pa.string(), "what was timed", choices=("prefill", "draft", "verify")),
    Column("batch", pa.int32(), "sequences in the step", low=1),
    Column("new_tokens", pa.int32(), "new tokens per sequence", low=1),
    Column("context_tokens", pa.int32(), "tokens already in the cache, per sequence", low=0),
    Column("tree_nodes", pa.int32(), "nodes of a draft tree; missing for chains", nullable=True, low=1),
    Column("repeat", pa.int32(), "index of the repeat, warm-up left out", low=0),
    Column("seconds", pa.float64(), "duration of the step, s", low=1e-12),
    Column("joules", pa.float64(), "energy of the step, J, where the device reports it", nullable=True, low=0),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "sequences": SEQUENCES,
    "positions": POSITIONS,
    "rollouts": ROLLOUTS,
    "timings": TIMINGS,
}
"""Columns of every table, by table name; the file is ``<table>.parquet``."""


def arrow_schema(table: str) -> pa.Schema:
    """Give the Arrow schema of `table`, with nullability."""
    return _arrow(TABLES[table])


def _arrow(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in columns])


def make_table(table: str, columns: Mapping[str, Any]) -> pa.Table:
    """Build a table of a TraceSet from columns by name; missing nullable columns become all-missing.

    Raises `TraceError` that names the column when a value does not fit its type.
    """
    return build_table(table, columns, TABLES[table])


def build_table(table: str, columns: Mapping[str, Any], wanted: Sequence[Column]) -> pa.Table:
    """Build a table called `table` with the columns `wanted`, as `make_table` does."""
    from calibration.common.errors import TraceError

    unknown = set(columns) - {c.name for c in wanted}
    if unknown:
        raise TraceError(f"{table}: no such column: {', '.join(sorted(unknown))}")
    rows = max((len(values) for values in columns.values()), default=0)
    arrays = []
    for column in wanted:
        values = columns.get(column.name)
        if values is None:
            if not column.nullable and rows:
                raise TraceError(f"{table}: column '{column.name}': missing")
            arrays.append(pa.nulls(rows, column.type))
            continue
        try:
            arrays.append(pa.array(values, type=column.type, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as fault:
            raise TraceError(f"{table}: column '{column.name}': must be {column.type}, {fault}") from None
    return pa.Table.from_arrays(arrays, schema=_arrow(wanted))


def _fail(table: str, column: str, row: int | None, rule: str, got: Any = None) -> None:
    place = f"{table}.parquet: column '{column}'" + ("" if row is None else f", row {row}")
    raise TraceError(f"{place}: {rule}" + ("" if got is None else f", got {got}"))


def _first(mask: pa.ChunkedArray | pa.Array | np.ndarray[Any, Any]) -> int | None:
    """Give the first row where `mask` is true, or None."""
    if not isinstance(mask, np.ndarray):
        mask = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    row = int(np.argmax(mask)) if len(mask) else 0
    return row if len(mask) and mask[row] else None


def conform(name: str, table: pa.Table, version: int = SCHEMA_VERSION) -> pa.Table:
    """Give `table` with exactly the columns and types of its schema (dictionary columns decoded).

    Unknown columns, missing columns and wrong types are refused. Columns that schema `version` did not know yet are
    filled with missing values.
    """
    return _arranged(name, table, TABLES[name], version)


def conform_to(name: str, table: pa.Table, columns: Sequence[Column]) -> pa.Table:
    """Give `table` with exactly `columns`, each of whose rules is checked; raises as `validate` does."""
    arranged = _arranged(name, table, columns)
    for column in columns:
        _check_column(name, arranged, column)
    return arranged


def _arranged(name: str, table: pa.Table, columns: Sequence[Column], version: int = SCHEMA_VERSION) -> pa.Table:
    wanted = {c.name: c for c in columns}
    for extra in [c for c in table.column_names if c not in wanted]:
        _fail(name, extra, None, "no such column in the schema")
    arrays = []
    for column in columns:
        if column.name not in table.column_names:
            if column.since > version:
                arrays.append(pa.chunked_array([pa.nulls(table.num_rows, column.type)]))
                continue
            _fail(name, column.name, None, "is missing")
        array = table[column.name]
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if pa.types.is_large_string(array.type) and column.type == pa.string():  # as pandas writes text
            array = array.cast(pa.string())
        if array.type != column.type:
            _fail(name, column.name, None, f"must be {column.type}", array.type)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, names=[c.name for c in columns])


def _check_column(name: str, table: pa.Table, column: Column) -> None:
    values = table[column.name]
    if not column.nullable:
        row = _first(pc.is_null(values))
        if row is not None:
            _fail(name, column.name, row, "must not be missing")
    if pa.types.is_floating(column.type):
        row = _first(pc.invert(pc.is_finite(values)))
        if row is not None:
            _fail(name, column.name, row, "must be finite", values[row].as_py())
    bounds = f"[{column.low if column.low is not None else '-inf'}, {column.high or 'inf'}]"
    if column.low is not None:
        row = _first(pc.less(values, column.low))
        if row is not None:
            _fail(name, column.name, row, f"must lie in {bounds}", values[row].as_py())
    if column.high is not None:
        row = _first(pc.greater(values, column.high))
        if row is not None:
            _fail(name, column.name, row, f"must lie in {bounds}", values[row].as_py())
    if column.choices:
        row = _first(pc.invert(pc.is_in(values, value_set=pa.array(column.choices))))
        if row is not None:
            _fail(name, column.name, row, f"must be one of {', '.join(column.choices)}", values[row].as_py())


def _codes(values: pa.ChunkedArray, known: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Index of each value in `known`, -1 where it is not there."""
    index = pc.index_in(values, value_set=pa.array(known, type=pa.string()))
    return np.asarray(pc.fill_null(index, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _check_sequences(table: pa.Table) -> None:
    if table.num_rows == 0:
        _fail("sequences", "sequence_id", None, "must hold at least one row")
    ids = table["sequence_id"].to_pylist()
    seen: dict[str, int] = {}
    for index, value in enumerate(ids):
        if value in seen:
            _fail("sequences", "sequence_id", index, f"must be unique (first at row {seen[value]})", repr(value))
        seen[value] = index
    for tokens, count in (("prompt_token_ids", "prompt_tokens"), ("output_token_ids", "output_tokens")):
        row = _first(pc.not_equal(pc.list_value_length(table[tokens]), table[count]))
        if row is not None:
            got = len(table[tokens][row].as_py())
            _fail("sequences", tokens, row, f"must hold {count} = {table[count][row].as_py()} ids", got)


def _check_keys(name: str, table: pa.Table, sequences: list[str], drafters: list[str]) -> np.ndarray[Any, Any]:
    """Check that both keys are known; give one code per (sequence, drafter) pair and row."""
    sequence = _codes(table["sequence_id"], sequences)
    row = _first(sequence < 0)
    if row is not None:
        _fail(name, "sequence_id", row, "must be in sequences.parquet", repr(table["sequence_id"][row].as_py()))
    drafter = _codes(table["drafter"], drafters)
    row = _first(drafter < 0)
    if row is not None:
        _fail(name, "drafter", row, "must be in manifest.json", repr(table["drafter"][row].as_py()))
    return sequence * len(drafters) + drafter


def _check_positions(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> None:
    name = "positions"
    drafters = list(manifest.drafter_names)
    ids = sequences["sequence_id"].to_pylist()
    group = _check_keys(name, table, ids, drafters)
    if len(group) == 0:
        _fail(name, "position", None, "must hold at least one row")
    position = table["position"].to_numpy().astype(np.int64)
    new_group = np.diff(group) != 0
    starts = group[np.concatenate(([True], new_group))]
    if len(np.unique(starts)) != len(starts):
        later = 1 + int(np.flatnonzero(new_group)[_repeat_at(starts) - 1])
        _fail(name, "sequence_id", later, "rows of one (sequence, drafter) must stand together")
    row = _first(~new_group & (np.diff(position) != 1))
    if row is not None:
        rule = f"must follow position {position[row]} of the same sequence and drafter by 1"
        _fail(name, "position", row + 1, rule, position[row + 1])
    output = sequences["output_tokens"].to_numpy().astype(np.int64)[group // len(drafters)]
    row = _first(position >= output)
    if row is not None:
        _fail(name, "position", row, f"must be below output_tokens = {output[row]}", position[row])

    run = table["run_length"]
    row = _first(pc.and_(pc.is_null(run), pc.is_null(table["accept_probability"])))
    if row is not None:
        _fail(name, "run_length", row, "must be present where accept_probability is missing")
    row = _first(pc.greater(run, pa.array(output - position)))
    if row is not None:
        rule = f"must not run past the end of the sequence ({output[row] - position[row]} tokens left)"
        _fail(name, "run_length", row, rule, run[row].as_py())
    row = _first(pc.greater(run, table["proposal_length"]))
    if row is not None:
        rule = f"accepted must not exceed drafted (proposal_length = {table['proposal_length'][row].as_py()})"
        _fail(name, "run_length", row, rule, run[row].as_py())
    for column in ("proposal_nodes", "draft_layers"):
        lengths = pc.list_value_length(table[column])
        row = _first(pc.and_(pc.is_valid(lengths), pc.is_null(table["proposal_length"])))
        if row is not None:
            _fail("positions", column, row, "must be missing where proposal_length is")
        row = _first(pc.not_equal(lengths, table["proposal_length"]))
        if row is not None:
            rule = (
                f"must hold one number per drafted token (proposal_length = {table['proposal_length'][row].as_py()})"
            )
            _fail(name, column, row, rule, len(table[column][row].as_py()))
    for code, info in enumerate(manifest.drafters):
        mine = group % len(drafters) == code
        if manifest.decoding.mode == "greedy" or info.deterministic:
            row = _first(mine & pc.is_null(run).to_numpy(zero_copy_only=False))
            if row is not None:
                _fail(name, "run_length", row, f"must be present for drafter '{info.name}' (greedy or one-hot)")
        if info.max_draft_tokens is not None:
            too_long = pc.fill_null(pc.greater(run, info.max_draft_tokens), False)
            row = _first(mine & too_long.to_numpy(zero_copy_only=False))
            if row is not None:
                rule = f"must not exceed max_draft_tokens = {info.max_draft_tokens} of '{info.name}'"
                _fail(name, "run_length", row, rule, run[row].as_py())


def _repeat_at(values: np.ndarray[Any, Any]) -> int:
    """Index of the first value that occurred before."""
    seen = set()
    for index, value in enumerate(values.tolist()):
        if value in seen:
            return index
        seen.add(value)
    return 0


def _check_rollouts(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> None:
    group = _check_keys("rollouts", table, sequences["sequence_id"].to_pylist(), list(manifest.drafter_names))
    position = table["position"].to_numpy().astype(np.int64)
    output = sequences["output_tokens"].to_numpy().astype(np.int64)[group // len(manifest.drafters)]
    row = _first(position >= output)
    if row is not None:
        _fail("rollouts", "position", row, f"must be below output_tokens = {output[row]}", position[row])
    step = table["step"].to_numpy().astype(np.int64)
    if len(step) == 0:
        return
    fresh = np.concatenate(([True], (np.diff(group) != 0) | (np.diff(position) != 0)))
    previous = np.concatenate(([0], step[:-1]))
    row = _first(step != np.where(fresh, 1, previous + 1))
    if row is not None:
        _fail("rollouts", "step", row, "must count 1, 2, ... from every start position", step[row])


def _check_timings(table: pa.Table, manifest: Manifest) -> None:
    known = [manifest.verifier.name, *manifest.drafter_names]
    row = _first(_codes(table["model"], known) < 0)
    if row is not None:
        _fail("timings", "model", row, f"must be one of {', '.join(known)}", repr(table["model"][row].as_py()))


def validate(manifest: Manifest, tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Check every rule of the contract; give the tables in their exact schema.

    Raises `TraceError` at the first broken rule, with file, column, row, rule and value.
    """
    checked = {}
    for name in TABLES:
        if name not in tables:
            raise TraceError(f"{name}.parquet: is missing")
        table = conform(name, tables[name], manifest.schema_version)
        for column in TABLES[name]:
            _check_column(name, table, column)
        checked[name] = table.cast(arrow_schema(name))
    _check_sequences(checked["sequences"])
    _check_positions(checked["positions"], checked["sequences"], manifest)
    _check_rollouts(checked["rollouts"], checked["sequences"], manifest)
    _check_timings(checked["timings"], manifest)
    return checked
