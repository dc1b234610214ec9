"""The timing grid: measured steps of shapes, as Parquet tables and a manifest that need none of our code to read.

    manifest.json     device, software, the job, the shapes, what is missing
    steps.parquet     one row a measured step (`STEPS`)
    skipped.parquet   one row a cell that could not be timed, with the reason (`SKIPPED`)

The folder is written whole or not at all. No torch needed.

The job file of a timing grid: TOML, strict, every fault told at once with its place.

One step of one shape to time, the table columns that name it, and the part of the model it runs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, field_validator

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.files import fresh_folder, parse_parquet, read_checked, sha256
from calibration.common.settings import Count, FromList, Natural, Table
from calibration.common.toml import check, read_toml
from calibration.shapes.shapes import SHAPES, Shape
from calibration.traces.manifest import DeviceInfo, TableInfo
from calibration.traces.validate import Column

Part = Literal["whole", "layer", "head"]
Dtype = Literal["bf16", "fp16", "fp32", "fp8"]
Attention = Literal["chain", "tree"]
Operation = Literal["prefill", "verify"]

TORCH_NAMES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
"""What torch calls each type. fp8: the weight matrices of the layers and what they multiply; the rest is bf16."""

LAYERS_TIMED = 4
"""Fewest layers of a ``layer`` step: what a step costs once, whatever its layers, is spread over these."""
CACHE_TURNS = 4
"""The weights of a ``layer`` step are this many times the device's last cache: a real step finds none there."""


@dataclass(frozen=True)
class StepCell:
    """One step: which part of which shape, in which type, and over what. Token counts are per sequence.

    ``part``: ``whole`` is embedding, all layers, final norm, head and choice of the largest logit; ``layer`` is a few
    decoder layers alone; ``head`` is all but the layers. A verify step of n new tokens gives logits for all n (n = 1
    is plain decoding, or the step of a drafter), a prefill for the last one. A ``tree`` step verifies ``tree_nodes``
    drafted nodes below the last committed token: new_tokens = tree_nodes + 1. Heads see no context and no tree.
    """

    shape: str
    part: Part
    dtype: Dtype
    graph: bool
    attention: Attention
    operation: Operation
    batch: int
    new_tokens: int
    context_tokens: int
    tree_nodes: int | None = None

    @property
    def group(self) -> tuple[str, Part, Dtype]:
        """What shares weights: shape, part, type."""
        return self.shape, self.part, self.dtype

    def row(self) -> dict[str, Any]:
        """Give the columns that name the cell."""
        return asdict(self)

    def __str__(self) -> str:
        """Name it in a line."""
        tree = "" if self.tree_nodes is None else f" (tree of {self.tree_nodes})"
        graph = "graph" if self.graph else "eager"
        size = f"{self.batch} x {self.new_tokens}{tree} after {self.context_tokens}"
        return f"{self.shape} {self.part} {self.dtype} {graph} {self.operation} {size}"


def timed_layers(shape: Shape, part: Part, dtype: Dtype, cache_bytes: int) -> int:
    """Give how many decoder layers a step of `part` runs on a device whose last cache has `cache_bytes`."""
    if part != "layer":
        return shape.layers if part == "whole" else 0
    spill = math.ceil(CACHE_TURNS * cache_bytes / layer_bytes(shape, dtype))
    return min(shape.layers, max(LAYERS_TIMED, spill))


def layer_bytes(shape: Shape, dtype: Dtype) -> int:
    """Give the bytes of one layer's weights."""
    rest = shape.layer_parameters - shape.layer_matrix_parameters
    return shape.layer_matrix_parameters * weight_size(dtype) + rest * element_size(dtype)


def weight_size(dtype: Dtype) -> int:
    """Give the bytes of one entry of a layer's weight matrices."""
    return 1 if dtype == "fp8" else element_size(dtype)


def element_size(dtype: Dtype) -> int:
    """Give the bytes of one number outside of the layers' matrices: activations, caches, embedding, head."""
    return 4 if dtype == "fp32" else 2


Batch = Annotated[int, Field(ge=1, le=512)]
NewTokens = Annotated[int, Field(ge=1, le=64)]
Context = Annotated[int, Field(ge=0, le=32_768)]
TreeNodes = Annotated[int, Field(ge=1, le=63)]
PromptTokens = Annotated[int, Field(ge=1, le=32_768)]


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must not name anything twice")
    return values


class GridTable(Table):
    """One block of cells: all combinations of its lists, for every shape, type and part.

    Every list is in order of importance. Verify steps are ``batches`` x ``new_tokens`` x ``contexts``; trees
    ``batches`` x ``trees`` (drafted nodes) x ``contexts``; prefills ``prefill_batches`` x ``prefill_tokens``. With
    ``energy`` each cell is also repeated for at least a second under the device's energy counter, where it has one.
    """

    shapes: Annotated[tuple[str, ...], FromList, Field(min_length=1)]
    dtypes: Annotated[tuple[Dtype, ...], FromList, Field(min_length=1)]
    graphs: Annotated[tuple[bool, ...], FromList, Field(min_length=1)]
    parts: Annotated[tuple[Part, ...], FromList, Field(min_length=1)] = ("layer", "head", "whole")
    batches: Annotated[tuple[Batch, ...], FromList] = ()
    new_tokens: Annotated[tuple[NewTokens, ...], FromList] = ()
    contexts: Annotated[tuple[Context, ...], FromList] = ()
    trees: Annotated[tuple[TreeNodes, ...], FromList] = ()
    prefill_batches: Annotated[tuple[Batch, ...], FromList] = ()
    prefill_tokens: Annotated[tuple[PromptTokens, ...], FromList] = ()
    energy: bool = False

    _no_repetition = field_validator("*", mode="after")(
        lambda value: _unique(value) if isinstance(value, tuple) else value
    )

    @field_validator("shapes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SHAPES:
                raise ValueError(f"no such shape, got '{name}'{did_you_mean(name, SHAPES)}")
        return names


class TimingJob(Table):
    """What to time, on what, and how long at most.

    ``budget_s``: seconds after which a run stops between two cells; what is left waits for the next run.
    ``memory_gib``: take the device for no larger than this. ``max_step_tokens``: steps of more tokens (batch x new
    tokens) are skipped, as an engine would not run them in one piece either. ``seed`` draws the weights.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    warmups: Count = 2
    repeats: Count = 5
    budget_s: Annotated[float, Field(gt=0)] | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    max_step_tokens: Count = 8192
    seed: Natural = 0
    grid: Annotated[tuple[GridTable, ...], FromList, Field(min_length=1)]

    def cells(self) -> dict[StepCell, bool]:
        """Give every cell once, in the order of timing, with whether its energy is wanted.

        Tables in their order; in a table shape by shape, type by type, part by part; then the cells by the sum of
        their places in the lists, so that wherever a run stops it has timed the first entries of all lists rather
        than all entries of the first.
        """
        found: dict[StepCell, bool] = {}
        for table in self.grid:
            for shape, dtype, part in itertools.product(table.shapes, table.dtypes, table.parts):
                for cell in _cells(table, shape, part, dtype):
                    found[cell] = found.get(cell, False) or table.energy
        return found


def _cells(table: GridTable, shape: str, part: Part, dtype: Dtype) -> list[StepCell]:
    """Give the cells of one part of one shape, the most important first."""
    # A head sees neither a context nor a tree.
    contexts = table.contexts if part != "head" else table.contexts and (0,)
    ranked: list[tuple[int, StepCell]] = []

    def add(operation: Operation, batches: Any, tokens: Any, contexts: Any, tree: bool = False) -> None:
        lists = [list(enumerate(values)) for values in (table.graphs, batches, tokens, contexts)]
        for (a, graph), (b, batch), (c, new), (d, context) in itertools.product(*lists):
            nodes = new if tree and part != "head" else None
            attention: Literal["chain", "tree"] = "chain" if nodes is None else "tree"
            new_tokens = new + 1 if tree else new
            cell = StepCell(
                shape=shape,
                part=part,
                dtype=dtype,
                graph=graph,
                attention=attention,
                operation=operation,
                batch=batch,
                new_tokens=new_tokens,
                context_tokens=context,
                tree_nodes=nodes,
            )
            ranked.append((a + b + c + d, cell))

    add("verify", table.batches, table.new_tokens, contexts)
    add("verify", table.batches, table.trees, contexts, tree=True)
    add("prefill", table.prefill_batches, table.prefill_tokens, (0,))
    return [cell for _, cell in sorted(ranked, key=lambda pair: pair[0])]


def load_timing_job(path: str | os.PathLike[str]) -> TimingJob:
    """Read the job in the TOML file at `path`; `CalibrationError` names every fault with its place."""
    return parse_timing_job(read_toml(path, CalibrationError), where=str(path))


def parse_timing_job(data: Mapping[str, Any], *, where: str = "timing job") -> TimingJob:
    """Give the job in `data`; `CalibrationError` names every fault after `where`."""
    job = check(TimingJob, data, where, CalibrationError)
    faults = [f"{where}: grid[{number}]: must name steps: {rule}" for number, rule in _empty(job)]
    if faults:
        raise CalibrationError("\n".join(faults))
    return job


def _empty(job: TimingJob) -> list[tuple[int, str]]:
    """Find tables whose lists leave nothing to time, or half of it."""
    faults = []
    for number, table in enumerate(job.grid):
        sizes = bool(table.new_tokens or table.trees)
        verify = [bool(table.batches), sizes, bool(table.contexts)]
        prefill = [bool(table.prefill_batches), bool(table.prefill_tokens)]
        if any(verify) and not all(verify):
            faults.append((number, "batches, contexts and one of new_tokens, trees go together"))
        if any(prefill) and not all(prefill):
            faults.append((number, "prefill_batches and prefill_tokens go together"))
        if not any(verify) and not any(prefill):
            faults.append((number, "batches, new_tokens and contexts, or prefill_batches and prefill_tokens"))
    return faults


GRID_VERSION = 1
"""Newest timing grid that this version reads."""

CELL = (
    Column("shape", pa.string(), "name of the shape, as in the manifest"),
    Column("part", pa.string(), "what of the model ran", choices=("whole", "layer", "head", "composed")),
    Column("dtype", pa.string(), "type of the weights", choices=tuple(TORCH_NAMES)),
    Column("graph", pa.bool_(), "whether the step was one CUDA graph"),
    Column("attention", pa.string(), "chain (causal) or tree (masked)", choices=("chain", "tree")),
    Column("operation", pa.string(), "what was timed", choices=("prefill", "verify")),
    Column("batch", pa.int32(), "sequences in the step", low=1),
    Column("new_tokens", pa.int32(), "new tokens per sequence", low=1),
    Column("context_tokens", pa.int32(), "tokens already in the cache, per sequence; 0 for heads", low=0),
    Column("tree_nodes", pa.int32(), "drafted nodes of a tree, new_tokens - 1; missing for chains", True, low=1),
)
"""The columns that name a cell."""

STEPS = (
    *CELL,
    Column("layers", pa.int32(), "decoder layers that the step ran; 0 for heads", low=0),
    Column("repeat", pa.int32(), "index of the repeat, warm-up left out", low=0),
    Column("seconds", pa.float64(), "duration of the step as it ran, s", low=1e-12),
    Column("joules", pa.float64(), "energy of the step as it ran, J, where measured", True, low=0),
)
SKIPPED = (*CELL, Column("reason", pa.string(), "why the cell could not be timed"))
TABLES: dict[str, tuple[Column, ...]] = {"steps": STEPS, "skipped": SKIPPED}
"""Columns of both tables, by table name; the file is ``<table>.parquet``."""


class MissingCells(Table):
    """Cells of one part of one shape that a run within a budget did not come to."""

    shape: str
    part: str
    dtype: str
    cells: Count


class GridManifest(Table):
    """Everything about a timing grid that is not a table; ``shapes`` so that a reader needs no catalogue."""

    format: Annotated[str, Field(pattern="^timing-grid$")] = "timing-grid"
    schema_version: Count = GRID_VERSION
    paceline_version: str
    created: str
    device: DeviceInfo
    software: dict[str, str]
    job: dict[str, Any]
    shapes: tuple[Shape, ...]
    missing: tuple[MissingCells, ...] = ()
    notes: tuple[str, ...] = ()
    tables: dict[str, TableInfo] = Field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """Give the shape called `name`; `CalibrationError` where the grid has none."""
        for shape in self.shapes:
            if shape.name == name:
                return shape
        known = [shape.name for shape in self.shapes]
        raise CalibrationError(f"shape '{name}': not in this timing grid{did_you_mean(name, known)}")


@dataclass(frozen=True)
class StepGrid:
    """A timing grid in memory: tables in the schemas above, checked when built, read or written."""

    manifest: GridManifest
    steps: pa.Table
    skipped: pa.Table

    @classmethod
    def build(cls, manifest: GridManifest, steps: pa.Table, skipped: pa.Table) -> StepGrid:
        """Check both tables and hold them; `CalibrationError` with file, column, row and rule."""
        known = {shape.name for shape in manifest.shapes}
        return cls(manifest, _checked("steps", steps, known), _checked("skipped", skipped, known))

    @property
    def complete(self) -> bool:
        """Whether every cell of the job was timed or skipped."""
        return not self.manifest.missing

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the grid to `folder`, which appears whole or not at all; an older timing grid there is replaced."""
        target = Path(folder)
        with fresh_folder(target, "manifest.json", error=CalibrationError, what="timing grid") as scratch:
            infos = {}
            for name in TABLES:
                path = scratch / f"{name}.parquet"
                pq.write_table(getattr(self, name), path, compression="zstd", compression_level=9)
                rows = getattr(self, name).num_rows
                infos[name] = TableInfo(rows=rows, sha256=sha256(path.read_bytes()))
            manifest = self.manifest.model_copy(update={"tables": infos})
            (scratch / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target


def read_grid(folder: str | os.PathLike[str]) -> StepGrid:
    """Read and check the timing grid in `folder`; `CalibrationError` with file, column, row and rule."""
    root = Path(folder)
    path = root / "manifest.json"
    if not path.is_file():
        raise CalibrationError(f"{path}: not found; a timing grid is a folder with manifest.json and Parquet tables")
    manifest = _parse_manifest(path)
    tables = {}
    for name in TABLES:
        file = root / f"{name}.parquet"
        info = manifest.tables.get(name)
        stated = None if info is None else info.sha256
        data, _ = read_checked(file, stated, by="manifest.json", error=CalibrationError)
        tables[name] = parse_parquet(data, file, error=CalibrationError, verified=stated is not None)
    return StepGrid.build(manifest, tables["steps"], tables["skipped"])


def _parse_manifest(path: Path) -> GridManifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise CalibrationError(f"{path}: not valid JSON ({fault})") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > GRID_VERSION:
        rule = f"schema_version must be at most {GRID_VERSION}, got {version}"
        raise CalibrationError(f"{path}: {rule}; a newer paceline wrote this timing grid, upgrade to read it")
    try:
        return GridManifest.model_validate_json(json.dumps(raw))
    except ValidationError as fault:
        lines = [
            f"{path}: {'.'.join(str(part) for part in error['loc']) or 'manifest'}: {error['msg']}"
            for error in fault.errors()
        ]
        raise CalibrationError("\n".join(lines)) from None


def grid_schema(table: str) -> pa.Schema:
    """Give the Arrow schema of ``steps`` or ``skipped``, with nullability."""
    return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in TABLES[table]])


def grid_table(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Make a table of `rows`, each a mapping of all columns."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=grid_schema(table))


def cells_of(table: pa.Table) -> list[StepCell]:
    """Give the distinct cells of a table, in the order of their first rows."""
    names = [column.name for column in CELL]
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    return [StepCell(**dict(zip(names, row, strict=True))) for row in dict.fromkeys(rows)]


def _checked(name: str, table: pa.Table, shapes: set[str]) -> pa.Table:
    """Give `table` in its exact schema, or refuse it at the first broken rule."""
    wanted = [column.name for column in TABLES[name]]
    for extra in set(table.column_names) - set(wanted):
        _fail(name, extra, None, "no such column in the schema")
    for column in TABLES[name]:
        if column.name not in table.column_names:
            _fail(name, column.name, None, "is missing")
        if table[column.name].type != column.type:
            _fail(name, column.name, None, f"must be {column.type}", table[column.name].type)
        _check_column(name, column, table[column.name])
    _refuse(name, "shape", table["shape"], pc.invert(pc.is_in(table["shape"], pa.array(sorted(shapes), pa.string()))))
    _check_trees(name, table)
    return table.select(wanted).cast(grid_schema(name))


def _check_column(name: str, column: Column, values: pa.ChunkedArray) -> None:
    if not column.nullable:
        _refuse(name, column.name, values, pc.is_null(values), "must not be missing")
    if pa.types.is_floating(column.type):
        _refuse(name, column.name, values, pc.invert(pc.is_finite(values)), "must be finite")
    if column.low is not None:
        _refuse(name, column.name, values, pc.less(values, column.low), f"must be >= {column.low}")
    if column.choices:
        strange = pc.invert(pc.is_in(values, pa.array(column.choices)))
        _refuse(name, column.name, values, strange, f"must be one of {', '.join(column.choices)}")


def _check_trees(name: str, table: pa.Table) -> None:
    """A tree step has nodes, one fewer than new tokens; a chain has none."""
    nodes, tree = table["tree_nodes"], pc.equal(table["attention"], "tree")
    _refuse(name, "tree_nodes", nodes, pc.xor(tree, pc.is_valid(nodes)), "must be given for trees and only for trees")
    wrong = pc.not_equal(pc.add(nodes, 1), table["new_tokens"])
    _refuse(name, "tree_nodes", nodes, wrong, "must be new_tokens - 1")


def _refuse(name: str, column: str, values: pa.ChunkedArray, bad: pa.ChunkedArray, rule: str | None = None) -> None:
    """Fail at the first row where `bad` is true."""
    row = pc.index(pc.fill_null(bad, False), True).as_py()
    if row >= 0:
        _fail(name, column, row, rule or "must be in manifest.json", values[row].as_py())


def _fail(name: str, column: str, row: int | None, rule: str, got: Any = None) -> None:
    place = f"{name}.parquet: column '{column}'" + ("" if row is None else f", row {row}")
    raise CalibrationError(f"{place}: {rule}" + ("" if got is None else f", got {got!r}"))
