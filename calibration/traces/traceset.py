"""A TraceSet: recorded behaviour of one verifier and its drafters, as Parquet files and a manifest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.errors import TraceError
from calibration.folder import fresh_folder
from calibration.traces.manifest import SCHEMA_VERSION, Manifest, TableInfo, parse_manifest
from calibration.traces.schema import TABLES, arrow_schema
from calibration.traces.validate import validate

if TYPE_CHECKING:
    import pandas as pd

_DICTIONARY = {"sequence_id", "drafter", "model", "operation", "domain", "finish_reason"}


@dataclass(frozen=True)
class TraceSet:
    """One manifest and four tables that keep the contract; checked when built, read or written.

    The tables are Arrow tables in the schemas of `calibration.traces.schema`. `frame` gives one as pandas.
    """

    manifest: Manifest
    sequences: pa.Table
    positions: pa.Table
    rollouts: pa.Table
    timings: pa.Table

    @classmethod
    def build(cls, manifest: Manifest, tables: dict[str, pa.Table]) -> TraceSet:
        """Check `tables` against the contract and hold them; absent rollouts and timings become empty."""
        complete = dict(tables)
        for optional in ("rollouts", "timings"):
            complete.setdefault(optional, arrow_schema(optional).empty_table())
        return cls(manifest, **validate(manifest, complete))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> TraceSet:
        """Read and check the TraceSet in `folder`.

        Raises `TraceError` with file, column, row and rule for anything that breaks the contract: a file that
        is missing or truncated, a newer schema, a missing column, a value out of its range.
        """
        root = Path(folder)
        path = root / "manifest.json"
        if not path.is_file():
            raise TraceError(f"{path}: not found; a TraceSet is a folder with manifest.json and Parquet tables")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise TraceError(f"{path}: not UTF-8 text") from None
        manifest = parse_manifest(text, path)
        return cls(manifest, **validate(manifest, {name: _read_table(root, name, manifest) for name in TABLES}))

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the set to `folder`, which appears whole or not at all; give its path.

        A folder that already holds a TraceSet is replaced; any other existing folder is refused.
        """
        target = Path(folder)
        with fresh_folder(target, "manifest.json", error=TraceError, what="TraceSet") as scratch:
            tables = {name: _write_table(getattr(self, name), scratch / f"{name}.parquet") for name in TABLES}
            manifest = self.manifest.model_copy(update={"schema_version": SCHEMA_VERSION, "tables": tables})
            (scratch / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target

    def frame(self, table: str) -> pd.DataFrame:
        """Give `table` (``sequences``, ``positions``, ``rollouts`` or ``timings``) as a pandas data frame."""
        if table not in TABLES:
            raise TraceError(f"{table}: no such table; choose from {', '.join(TABLES)}")
        frame: pd.DataFrame = getattr(self, table).to_pandas()
        return frame


def _write_table(table: pa.Table, path: Path) -> TableInfo:
    """Write one table, compact and deterministic; give its row count and sha256."""
    names = [c for c in table.column_names if c in _DICTIONARY]
    split = {c.name: "BYTE_STREAM_SPLIT" for c in table.schema if pa.types.is_floating(c.type)}
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=9,
        use_dictionary=names,
        column_encoding=split or None,
    )
    return TableInfo(rows=table.num_rows, sha256=_sha256(path))


def _read_table(root: Path, name: str, manifest: Manifest) -> pa.Table:
    path = root / f"{name}.parquet"
    if not path.is_file():
        raise TraceError(f"{path}: is missing")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as fault:
        raise TraceError(f"{path}: not a readable Parquet file, truncated or damaged ({fault})") from None
    info = manifest.tables.get(name)
    if info is not None and info.rows != table.num_rows:
        raise TraceError(f"{path}: must hold {info.rows} rows as manifest.json says, got {table.num_rows}")
    return table


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
