"""The folder of a job in progress: finished shards, each written whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.files import begin_job, whole_folder
from calibration.traces import make_table

TABLES = ("sequences", "positions", "rollouts")


@dataclass(frozen=True)
class Partial:
    """``<out>.partial/``: what a job has recorded so far, with the identity of the job that may go on from it."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Partial:
        """Open `folder` for the job `identity`, or begin it; `CalibrationError` where another job began it."""
        begin_job(folder, identity)
        return cls(folder)

    def has(self, shard: int) -> bool:
        """Say whether shard number `shard` is finished."""
        return self._shard(shard).is_dir()

    def put(self, shard: int, tables: dict[str, dict[str, list[Any]]], facts: dict[str, int]) -> None:
        """Store a finished shard: the columns of its tables, and counts for the manifest."""
        with whole_folder(self._shard(shard)) as scratch:
            for name, columns in tables.items():
                pq.write_table(make_table(name, columns), scratch / f"{name}.parquet", compression="zstd")
            (scratch / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    def tables(self, shards: int) -> dict[str, pa.Table]:
        """Give the tables of all `shards`, joined in order."""
        folders = [self._shard(i) for i in range(shards)]
        return {name: pa.concat_tables([pq.read_table(f / f"{name}.parquet") for f in folders]) for name in TABLES}

    def facts(self, shards: int) -> dict[str, int]:
        """Give the sums of the counts of all `shards`."""
        total: dict[str, int] = {}
        for shard in range(shards):
            found = json.loads((self._shard(shard) / "facts.json").read_text(encoding="utf-8"))
            for key, value in found.items():
                total[key] = total.get(key, 0) + value
        return total

    def remove(self) -> None:
        """Delete the folder; the job is complete."""
        shutil.rmtree(self.folder)

    def _shard(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:04d}"
