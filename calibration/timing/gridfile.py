"""The timing grid: measured steps of shapes, as Parquet tables and a manifest that need none of our code to read.

    manifest.json     device, software, the job, the shapes, what is missing
    steps.parquet     one row a measured step (`STEPS`)
    skipped.parquet   one row a cell that could not be timed, with the reason (`SKIPPED`)

The folder is written whole or not at all. No torch needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from calibration.common.checksums import parse_parquet, read_checked, sha256
from calibration.common.errors import CalibrationError, did_you_mean
from calibration.common.files import fresh_folder
from calibration.common.settings import Table
from calibration.shapes.shapes import Shape
from calibration.timing.cells import TORCH_NAMES, StepCell
from calibration.traces.manifest import DeviceInfo, TableInfo
from calibration.traces.schema import Column

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
    cells: Annotated[int, Field(ge=1)]


class GridManifest(Table):
    """Everything about a timing grid that is not a table; ``shapes`` so that a reader needs no catalogue."""

    format: Annotated[str, Field(pattern="^timing-grid$")] = "timing-grid"
    schema_version: Annotated[int, Field(ge=1)] = GRID_VERSION
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
