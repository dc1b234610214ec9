"""A TraceSet: recorded behaviour of one verifier and its drafters, as Parquet files and a manifest.

The TraceSets that come with the package, by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calibration.common.errors import TraceError, did_you_mean
from calibration.common.files import fresh_folder, joint_sha256, parse_parquet, read_checked, sha256, write_whole
from calibration.traces.manifest import SCHEMA_VERSION, Manifest, Sealing, TableInfo, parse_manifest, sealings
from calibration.traces.validate import TABLES, arrow_schema, validate

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
FILES = (MANIFEST, *(f"{name}.parquet" for name in TABLES))
"""The files of a TraceSet; whatever else lies in its folder is not read."""
_DICTIONARY = {"sequence_id", "drafter", "model", "operation", "domain", "finish_reason"}


@dataclass(frozen=True)
class _Read:
    """What was read from a folder: sha256 of the bytes parsed, by file, and tables whose sha256 is stated nowhere."""

    files: Mapping[str, str]
    unverified: tuple[str, ...]


@dataclass(frozen=True)
class TraceSet:
    """One manifest and four tables that keep the contract; checked when built, read or written.

    The tables are Arrow tables in the schemas of `calibration.traces.validate`. `frame` gives one as pandas.
    """

    manifest: Manifest
    sequences: pa.Table
    positions: pa.Table
    rollouts: pa.Table
    timings: pa.Table
    _read: _Read | None = field(default=None, init=False, repr=False, compare=False)
    """None for a set made in memory, also one made from another by `dataclasses.replace`."""

    @classmethod
    def build(cls, manifest: Manifest, tables: dict[str, pa.Table]) -> TraceSet:
        """Check `tables` against the contract and hold them; absent rollouts and timings become empty."""
        complete = dict(tables)
        for optional in ("rollouts", "timings"):
            complete.setdefault(optional, arrow_schema(optional).empty_table())
        return cls(manifest.model_copy(update={"tables": {}}), **validate(manifest, complete))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> TraceSet:
        """Read and check the TraceSet in `folder`.

        Raises `TraceError` with file, column, row and rule for anything that breaks the contract: a file that
        is missing, whose sha256 is not the one in manifest.json, or truncated; a newer schema, a missing column, a
        value out of its range. The sha256 of the bundled sets takes 1.1 to 2.4 ms, 4% of reading them. Sets whose
        manifest states none are read, and say so: `unverified`.
        """
        manifest, digest = read_manifest(folder)
        return _load(Path(folder), manifest, digest)

    @cached_property
    def sha256(self) -> str:
        """What tells it from any other TraceSet: sha256 over its manifest and all its tables.

        Of the bytes that were read; of the values, where it was made in memory (7 to 21 ms for the bundled sets).
        """
        if self._read is not None:
            return joint_sha256(self._read.files)
        values = {name: _values_sha256(getattr(self, name)) for name in TABLES}
        told = self.manifest.model_dump_json(exclude={"tables"})
        return joint_sha256({**values, MANIFEST: sha256(told.encode())})

    @property
    def tables_sha256(self) -> dict[str, str]:
        """sha256 of the bytes of every table as they were read, by its name; empty for a set made in memory."""
        return {} if self._read is None else {name: self._read.files[f"{name}.parquet"] for name in TABLES}

    @property
    def unverified(self) -> tuple[str, ...]:
        """Tables that were read, but whose sha256 the manifest does not state, so that damage would not show."""
        return () if self._read is None else self._read.unverified

    @property
    def integrity(self) -> str:
        """Whether the tables are those that were written, in words: verified, unverified, edited by hand."""
        if self._read is None:
            return "made in memory, no files to verify"
        verified = [name for name in TABLES if name not in self.unverified]
        told = [f"sha256 of {', '.join(verified)} verified"] if verified else []
        if self.unverified:
            told.append(f"unverified: {', '.join(self.unverified)} (manifest.json says no sha256)")
        told += [f"{one.reason}: {', '.join(one.tables)} (sealed {one.sealed})" for one in self.manifest.sealed]
        return "; ".join(told)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the set to `folder`, which appears whole or not at all; give its path.

        A folder that already holds a TraceSet is replaced; any other existing folder is refused.
        """
        target = Path(folder)
        with fresh_folder(target, MANIFEST, error=TraceError, what="TraceSet") as scratch:
            tables = {name: _write_table(getattr(self, name), scratch / f"{name}.parquet") for name in TABLES}
            manifest = self.manifest.model_copy(update={"schema_version": SCHEMA_VERSION, "tables": tables})
            (scratch / MANIFEST).write_text(_text(manifest), encoding="utf-8")
        return target

    def frame(self, table: str) -> pd.DataFrame:
        """Give `table` (``sequences``, ``positions``, ``rollouts`` or ``timings``) as a pandas data frame."""
        if table not in TABLES:
            raise TraceError(f"{table}: no such table; choose from {', '.join(TABLES)}")
        frame: pd.DataFrame = getattr(self, table).to_pandas()
        return frame


def seal(folder: str | os.PathLike[str]) -> tuple[Sealing, ...]:
    """State the sha256 of the tables in `folder` as they lie there, after an edit on purpose; give what was new.

    The whole contract is checked first; `TraceError` says what an edit broke, and nothing is written. The manifest
    keeps which tables were edited by hand, or had no sha256 before, and when they were sealed.
    """
    root = Path(folder)
    manifest, digest = read_manifest(root)
    traces = _load(root, manifest.model_copy(update={"tables": {}}), digest)
    found = traces.tables_sha256
    new = sealings({name: info.sha256 for name, info in manifest.tables.items()}, found)
    if new:
        infos = {name: TableInfo(rows=getattr(traces, name).num_rows, sha256=found[name]) for name in TABLES}
        changed = manifest.model_copy(update={"tables": infos, "sealed": (*manifest.sealed, *new)})
        write_whole(root / MANIFEST, _text(changed))
    return new


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Manifest, str]:
    """Read the manifest of the TraceSet in `folder`, and nothing else; give it and the sha256 of its bytes."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise TraceError(f"{path}: not found; a TraceSet is a folder with manifest.json and Parquet tables")
    data, digest = read_checked(path, None, by="", error=TraceError)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text") from None
    return parse_manifest(text, path), digest


def read_domains(folder: str | os.PathLike[str], manifest: Manifest) -> list[str]:
    """Read the domains of all sequences of the TraceSet in `folder`, and nothing else of its tables."""
    data, path, _ = _read_table(Path(folder), "sequences", manifest)
    domains: list[str] = parse_parquet(data, path, error=TraceError, columns=["domain"])["domain"].to_pylist()
    return domains


def _load(root: Path, manifest: Manifest, digest: str) -> TraceSet:
    """Read the tables beside `manifest`, whose own bytes have the sha256 `digest`, and check everything."""
    tables, files = {}, {MANIFEST: digest}
    for name in TABLES:
        data, path, files[f"{name}.parquet"] = _read_table(root, name, manifest)
        info = manifest.tables.get(name)
        tables[name] = table = parse_parquet(data, path, error=TraceError, verified=info is not None)
        if info is not None and info.rows != table.num_rows:
            raise TraceError(f"{path}: must hold {info.rows} rows as manifest.json says, got {table.num_rows}")
    traces = TraceSet(manifest, **validate(manifest, tables))
    unverified = tuple(name for name in TABLES if name not in manifest.tables)
    object.__setattr__(traces, "_read", _Read(files, unverified))
    return traces


def _read_table(root: Path, name: str, manifest: Manifest) -> tuple[bytes, Path, str]:
    """Give bytes, path and sha256 of one table; `TraceError` where the sha256 is not what the manifest states."""
    path, info = root / f"{name}.parquet", manifest.tables.get(name)
    hint = f"; after an edit on purpose: paceline traces seal {root}"
    data, digest = read_checked(path, None if info is None else info.sha256, by=MANIFEST, error=TraceError, hint=hint)
    return data, path, digest


def _text(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"


def _values_sha256(table: pa.Table) -> str:
    """Give the sha256 of the values of a table, however they lie in memory."""
    sink, whole = pa.BufferOutputStream(), table.combine_chunks()
    with pa.ipc.new_stream(sink, whole.schema) as stream:
        stream.write_table(whole)
    return sha256(sink.getvalue())


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
    return TableInfo(rows=table.num_rows, sha256=sha256(path.read_bytes()))


_ROOT = Path(__file__).resolve().parent.parent / "bundled"


def bundled_names() -> tuple[str, ...]:
    """Names of the bundled TraceSets, sorted."""
    return tuple(sorted(path.parent.name for path in _ROOT.glob("*/manifest.json")))


def bundled_path(name: str) -> Path:
    """Folder of the bundled TraceSet `name`; `TraceError` if there is none of that name."""
    if name not in bundled_names():
        raise TraceError(f"bundled TraceSet '{name}': not found{did_you_mean(name, bundled_names())}")
    return _ROOT / name


def bundled(name: str) -> TraceSet:
    """Read the bundled TraceSet `name`."""
    return TraceSet.read(bundled_path(name))


def subset(traces: TraceSet, ids: Sequence[str], *, timings: pa.Table | None = None, apart: bool = False) -> TraceSet:
    """Give the sequences `ids` of `traces`, in this order, with `timings` in the place of its own where given.

    `apart`: every sequence becomes a domain of its own, so that an output longer than its recording goes on with
    blocks of the same sequence.
    """
    wanted = pa.array(ids)
    rows = pc.index_in(wanted, value_set=traces.sequences["sequence_id"].combine_chunks())
    tables = {"sequences": traces.sequences.take(rows)}
    if apart:
        place = traces.sequences.schema.get_field_index("domain")
        tables["sequences"] = tables["sequences"].set_column(place, "domain", wanted)
    for name in ("positions", "rollouts"):
        table = getattr(traces, name)
        tables[name] = table.filter(pc.is_in(table["sequence_id"], value_set=wanted))
    tables["timings"] = traces.timings if timings is None else timings
    return TraceSet.build(traces.manifest, tables)
