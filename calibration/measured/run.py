"""A measured run in memory and as a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.checksums import parse_parquet, read_checked, sha256
from calibration.common.errors import TraceError
from calibration.common.files import fresh_folder, write_whole
from calibration.measured.manifest import Manifest, parse_manifest
from calibration.measured.schema import TABLES
from calibration.measured.validate import check_requests, check_steps
from calibration.traces.manifest import Sealing, TableInfo, sealings
from calibration.traces.schema import build_table
from calibration.traces.validate import conform_to

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
