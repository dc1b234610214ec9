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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.common.errors import PacelineWarning, ScenarioError
from calibration.common.files import file_sha256, sha256
from calibration.common.plugins import plugin_sha256, plugin_tables
from calibration.common.version import code_sha256
from calibration.common.version import paceline_version as package_version
from calibration.traces import TraceSet
from simulator.scenario.inputs import Known
from simulator.scenario.scenario import Scenario

KEYS = "2: code, and the content of all that a scenario names"
"""What keys of cells cover. Cells kept under another are never found again."""


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


def _checked_cells(connection: sqlite3.Connection) -> None:
    """Add what tells damage and older keys: the sha256 of what is kept, and what the key of a row covers."""
    for column in ("sha256 TEXT", "keys TEXT"):
        connection.execute(f"ALTER TABLE cells ADD COLUMN {column}")
    older = int(connection.execute("SELECT count(*) FROM cells").fetchone()[0])
    if older:
        warnings.warn(
            f"{older} cells of the store were kept by an older paceline, whose keys did not cover the code and every "
            "file that a scenario reads; they stay in the file, and are run again where they are asked for",
            PacelineWarning,
            stacklevel=2,
        )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_cells, _checked_cells)
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
        """Give the cells among `keys` that are finished.

        A row that is not as it was written is left out, with a `PacelineWarning`, so that it is run again.
        """
        found, damaged = {}, 0
        for key in keys:
            row = self._connection.execute(
                "SELECT summary, warnings, sha256 FROM cells WHERE key = ? AND keys = ?", (key, KEYS)
            ).fetchone()
            if row is not None and row[2] == _row_sha256(key, row[0], row[1]):
                said = tuple((category, text) for category, text in json.loads(row[1]))
                found[key] = StoredCell(json.loads(row[0]), said)
            elif row is not None:
                damaged += 1
        if damaged:
            text = (
                f"{self._place}: {damaged} cells are not as they were written, damaged or edited; they are run again"
            )
            warnings.warn(text, PacelineWarning, stacklevel=2)
        return found

    def put(self, key: str, scenario: Scenario, cell: StoredCell) -> None:
        """Keep a finished cell; the same cell again replaces it."""
        summary, said = json.dumps(cell.summary, allow_nan=False), json.dumps(cell.warnings)
        row = (
            key,
            scenario.hash,
            package_version(),
            str(scenario.seed),
            scenario.to_toml(),
            summary,
            said,
            _now(),
            _row_sha256(key, summary, said),
            KEYS,
        )
        with self._transaction() as connection:
            connection.execute(f"INSERT OR REPLACE INTO cells VALUES ({', '.join('?' * len(row))})", row)


def _row_sha256(key: str, summary: str, said: str) -> str:
    return sha256(json.dumps([key, summary, said]).encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def cell_keys(scenarios: Iterable[Scenario], traces: str | None = None) -> list[str]:
    """Give the `cell_key` of each of `scenarios`, reading what several of them name once."""
    known: Known = {}
    return [cell_key(scenario, traces, known) for scenario in scenarios]


def cell_key(scenario: Scenario, traces: str | None = None, known: Known | None = None) -> str:
    """Give what identifies a cell: sha256 over the hash of its scenario (seed included), the version of paceline, the
    code that computes it (plug-ins too), and the content of everything that the scenario names, or `traces`, the
    `traces_hash` of what replaces its TraceSet.
    """
    inputs = scenario.inputs_sha256(without=None if traces is None else "traces", known=known)
    parts = [
        KEYS,
        scenario.hash,
        str(scenario.seed),
        package_version(),
        code_sha256(),
        traces or "",
        *sorted(f"{place}={digest}" for place, digest in {**inputs, **_plugin(scenario)}.items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _plugin(scenario: Scenario) -> dict[str, str]:
    """Give the sha256 of the code of third parties' kinds in `scenario`, and of files that their settings name."""
    found = {}
    for place, table in plugin_tables(scenario):
        found[place] = plugin_sha256(table.group, table.name)
        for text in _texts(table.settings):
            for file in (scenario.locate(".") / text, Path(text)):
                if file.is_file():
                    found[f"{place}.settings={text}"] = file_sha256(file)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def traces_hash(traces: TraceSet) -> str:
    """Give what tells a TraceSet from every other: the sha256 of its manifest and of the content of its tables."""
    return traces.sha256
