"""The tables of a TraceSet: their columns, types, units and the rule of every column.

Lengths of runs never include the bonus token. A position t of a sequence is the index of the output token that a
draft started there would have to match first: at t, the prompt and x_0 .. x_{t-1} are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


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
