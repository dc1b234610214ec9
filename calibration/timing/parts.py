"""The folder of a timing job in progress: finished cells in numbered parts, each written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.files import begin_job
from calibration.timing.cells import StepCell
from calibration.timing.gridfile import TABLES, cells_of, grid_table

FLUSH_S = 20.0
"""Finished cells are written at least this often, so a killed run loses no more than that."""


@dataclass
class Parts:
    """``<out>.partial/``: what a job has timed so far, with the identity of the job that may go on from it."""

    folder: Path
    _waiting: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Parts:
        """Open `folder` for the job `identity`, or begin it; `CalibrationError` where another job began it."""
        begin_job(folder, identity)
        return cls(folder)

    def add(self, steps: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> None:
        """Take in the rows of a finished cell; they are written with the next part."""
        self._waiting["steps"] += steps
        self._waiting["skipped"] += skipped
        if time.monotonic() - self._written >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits as the next part."""
        if any(self._waiting.values()):
            scratch = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
            try:
                for name, rows in self._waiting.items():
                    pq.write_table(grid_table(name, rows), scratch / f"{name}.parquet", compression="zstd")
                scratch.rename(self.folder / f"part-{len(self._folders()):05d}")
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            self._waiting = {name: [] for name in TABLES}
        self._written = time.monotonic()

    def tables(self) -> dict[str, pa.Table]:
        """Give the rows of all written parts, by table."""
        return {
            name: pa.concat_tables(
                [grid_table(name, []), *(pq.read_table(folder / f"{name}.parquet") for folder in self._folders())]
            )
            for name in TABLES
        }

    def cells(self) -> set[StepCell]:
        """Give the cells of all written parts: timed or skipped."""
        return {cell for table in self.tables().values() for cell in cells_of(table)}

    def remove(self) -> None:
        """Delete the folder; the job is complete."""
        shutil.rmtree(self.folder)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("part-*"))
