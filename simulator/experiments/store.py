"""A store of finished cells: one sqlite file, one row a cell, keyed by everything that the cell depends on.

Only the parent process of a sweep writes. A row is committed the moment its cell is done, so that an interrupted
sweep loses nothing but the cells that were running.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from calibration.errors import ScenarioError
from calibration.traces import TABLES, TraceSet
from calibration.version import paceline_version as package_version
from simulator.scenario import Scenario


def _create_cells(connection: sqlite3.Connection) -> None:
    connection.execute(
        """
        CREATE TABLE cells (
            key TEXT PRIMARY KEY,
            scenario_hash TEXT NOT NULL,
            paceline_version TEXT NOT NULL,
            seed TEXT NOT NULL,
            scenario TEXT NOT NULL,
            summary TEXT NOT NULL,
            warnings TEXT NOT NULL,
            finished TEXT NOT NULL
        ) WITHOUT ROWID
        """
    )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_cells,)
"""Numbered from 1; applied in order, each once. Only ever append."""


@dataclass(frozen=True)
class StoredCell:
    """What is kept of a finished cell; `warnings` are (name of the category, text)."""

    summary: dict[str, Any]
    warnings: tuple[tuple[str, str], ...] = ()


class Store:
    """Finished cells in the sqlite file at `path` (default: in memory), made or brought up to date when opened.

    Raises `ScenarioError` where the file is not a store, or one of a newer paceline.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._place = ":memory:" if path is None else os.fspath(path)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(self._place, timeout=30, isolation_level=None)
        except sqlite3.Error as fault:
            raise ScenarioError(f"{self._place}: cannot be opened as a store ({fault})") from None
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._migrate()
        except sqlite3.Error as fault:
            self._connection.close()
            raise ScenarioError(
                f"{self._place}: must be a store of cells in sqlite, got another file ({fault})"
            ) from None
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Store:
        """Give itself; closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _migrate(self) -> None:
        with self._transaction() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, "
                "applied TEXT NOT NULL)"
            )
            applied = self.applied()
            if len(applied) > len(MIGRATIONS):
                raise ScenarioError(
                    f"{self._place}: migration must be at most {len(MIGRATIONS)}, got {max(applied)}; a newer "
                    "paceline wrote this store, upgrade to use it"
                )
            for number, migration in enumerate(MIGRATIONS, start=1):
                if number not in applied:
                    migration(connection)
                    row = (number, migration.__name__.strip("_"), _now())
                    connection.execute("INSERT INTO migrations VALUES (?, ?, ?)", row)

    def applied(self) -> tuple[int, ...]:
        """Give the numbers of the migrations applied to this file."""
        return tuple(row[0] for row in self._connection.execute("SELECT number FROM migrations ORDER BY number"))

    def __len__(self) -> int:
        """Give the number of cells, of all sweeps that used this store."""
        return int(self._connection.execute("SELECT count(*) FROM cells").fetchone()[0])

    def get(self, keys: Iterable[str]) -> dict[str, StoredCell]:
        """Give the cells among `keys` that are finished."""
        found = {}
        for key in keys:
            row = self._connection.execute("SELECT summary, warnings FROM cells WHERE key = ?", (key,)).fetchone()
            if row is not None:
                said = tuple((category, text) for category, text in json.loads(row[1]))
                found[key] = StoredCell(json.loads(row[0]), said)
        return found

    def put(self, key: str, scenario: Scenario, cell: StoredCell) -> None:
        """Keep a finished cell; the same cell again replaces it."""
        row = (
            key,
            scenario.hash,
            package_version(),
            str(scenario.seed),
            scenario.to_toml(),
            json.dumps(cell.summary, allow_nan=False),
            json.dumps(cell.warnings),
            _now(),
        )
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def cell_key(scenario: Scenario, traces: str | None = None) -> str:
    """Give what identifies a cell: sha256 over the hash of its scenario (seed included), the version of paceline,
    and the content of every file that the scenario names, or `traces`, the `traces_hash` of what replaces them.
    """
    data = scenario.model_dump(mode="json", exclude_none=True)
    if traces is not None:
        data["traces"] = {}
    files = sorted(f"{place}={digest}" for place, digest in _files(data, scenario))
    parts = [scenario.hash, str(scenario.seed), package_version(), traces or "", *files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _files(data: Mapping[str, Any], scenario: Scenario, place: str = "") -> Iterator[tuple[str, str]]:
    """Give (place in the scenario, sha256) of everything it names by a path; of a TraceSet, the manifest's."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _files(value, scenario, f"{place}{name}.")
        elif isinstance(value, list):
            tables = {str(i): item for i, item in enumerate(value) if isinstance(item, Mapping)}
            yield from _files(tables, scenario, f"{place}{name}.")
        elif isinstance(value, str) and (name == "path" or name.endswith("_path")):
            file = scenario.locate(value)
            file = file / "manifest.json" if file.is_dir() else file
            if file.is_file():
                yield f"{place}{name}", hashlib.sha256(file.read_bytes()).hexdigest()
        elif isinstance(value, str) and f"{place}{name}" == "traces.bundled":
            from calibration.traces import bundled_path

            yield "traces.bundled", hashlib.sha256((bundled_path(value) / "manifest.json").read_bytes()).hexdigest()


def traces_hash(traces: TraceSet) -> str:
    """Give the sha256 of a TraceSet in memory: its manifest and the content of its tables."""
    digest = hashlib.sha256(traces.manifest.model_dump_json(exclude={"tables"}).encode())
    for name in TABLES:
        sink = pa.BufferOutputStream()
        table = getattr(traces, name).combine_chunks()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()
