"""A measured run in memory and as a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.errors import TraceError
from calibration.folder import fresh_folder
from calibration.measured.manifest import Manifest, parse_manifest
from calibration.measured.schema import TABLES
from calibration.measured.validate import check_requests, check_steps
from calibration.traces.schema import build_table
from calibration.traces.validate import conform_to

MARKER = "measured.json"


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
        """Read and check the measured run in `folder`; `TraceError` names the file, column, row and rule at fault."""
        root = Path(folder)
        path = root / MARKER
        if not path.is_file():
            raise TraceError(f"{path}: not found; a measured run is a folder with {MARKER} and Parquet tables")
        manifest = parse_manifest(_text(path), path)
        return cls._checked(manifest, {name: _read(root, name) for name in TABLES}, _text(root / "scenario.toml"))

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
            (scratch / "scenario.toml").write_text(self.scenario, encoding="utf-8")
            (scratch / MARKER).write_text(self.manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return target


def _text(path: Path) -> str:
    if not path.is_file():
        raise TraceError(f"{path}: is missing")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text") from None


def _read(root: Path, name: str) -> pa.Table:
    path = root / f"{name}.parquet"
    if not path.is_file():
        raise TraceError(f"{path}: is missing")
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as fault:
        raise TraceError(f"{path}: not a readable Parquet file, truncated or damaged ({fault})") from None
