"""The store: migrations, keys that know what a cell depends on, and files that are no store."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import random_runs, scenario, traces_of

from calibration.errors import ScenarioError
from calibration.traces import TraceSet
from simulator import Scenario
from simulator.experiments import store as stores
from simulator.experiments.store import MIGRATIONS, Store, StoredCell, cell_key, traces_hash

CELL = StoredCell({"completed": 3, "mean_ttft_ms": 0.1}, (("ExtrapolationWarning", "beyond"),))


def traces(seed: int = 0) -> TraceSet:
    rng = np.random.default_rng(seed)
    return traces_of([random_runs(rng, 9) for _ in range(4)])


def test_a_cell_comes_back_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path / "deep" / "cells.sqlite") as store:
        store.put("a", scenario(1), CELL)
    with Store(tmp_path / "deep" / "cells.sqlite") as store:
        assert len(store) == 1
        assert store.get(["b", "a"]) == {"a": CELL}


def test_rows_can_be_read_without_paceline(tmp_path: Path) -> None:
    chosen = scenario(1, seed=2**62)
    with Store(tmp_path / "cells.sqlite") as store:
        store.put("a", chosen, CELL)
    with sqlite3.connect(tmp_path / "cells.sqlite") as connection:
        connection.row_factory = sqlite3.Row
        row = connection.execute("SELECT *, json_extract(summary, '$.completed') AS done FROM cells").fetchone()
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    connection.close()
    assert (row["done"], row["seed"], row["scenario_hash"]) == (3, str(2**62), chosen.hash)
    assert row["scenario"] == chosen.to_toml()
    assert mode == "wal"


def test_migrations_are_applied_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cells.sqlite"
    with Store(file) as store:
        assert store.applied() == (1,)
        store.put("a", scenario(1), CELL)

    def add_note(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE notes (text TEXT)")

    monkeypatch.setattr(stores, "MIGRATIONS", (*MIGRATIONS, add_note))
    for _ in range(2):
        with Store(file) as store:
            assert store.applied() == (1, 2)
            assert store.get(["a"]) == {"a": CELL}
    with sqlite3.connect(file) as connection:
        rows = connection.execute("SELECT number, name FROM migrations").fetchall()
        assert connection.execute("SELECT count(*) FROM notes").fetchone() == (0,)
    connection.close()
    assert rows == [(1, "create_cells"), (2, "add_note")]


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cells.sqlite"
    Store(file).close()

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        connection.execute("CREATE TABLE cells (x)")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "MIGRATIONS", (*MIGRATIONS, broken))
        with pytest.raises(ScenarioError, match="table cells already exists"):
            Store(file)
    with Store(file) as store:
        assert store.applied() == (1,)
        store._connection.execute("CREATE TABLE half (x)")  # it was rolled back


def test_a_store_of_a_newer_paceline_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cells.sqlite"
    with Store(file) as store:
        store._connection.execute("INSERT INTO migrations VALUES (2, 'unheard_of', 'later')")
    with pytest.raises(ScenarioError, match=r"migration must be at most 1, got 2; a newer paceline"):
        Store(file)


def test_files_that_are_no_store_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be looked at " * 30)
    with pytest.raises(ScenarioError, match=r"notes.txt: must be a store of cells in sqlite"):
        Store(text)
    assert text.read_text().startswith("not a database")
    with pytest.raises(ScenarioError, match="cannot be opened as a store"):
        Store(tmp_path)


def test_a_failed_write_keeps_nothing() -> None:
    store = Store()
    with pytest.raises(ValueError, match="Out of range float"):
        store.put("a", scenario(1), StoredCell({"x": float("nan")}))
    assert len(store) == 0
    store.put("a", scenario(1), CELL)
    assert len(store) == 1
    store.close()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"name": "b"}, {"engine": {"max_num_seqs": 5}}, {"workload": {"concurrency": 2}}]
)
def test_keys_know_every_setting(other: dict[str, Any]) -> None:
    assert cell_key(scenario(1)) == cell_key(scenario(1))
    assert cell_key(scenario(1)) != cell_key(scenario(1, **other))


def test_keys_know_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_key(scenario(1))
    monkeypatch.setattr(stores, "package_version", lambda: "99.0")
    assert cell_key(scenario(1)) != before


def arrivals(folder: Path) -> Scenario:
    load = {"kind": "csv", "path": "arrivals.csv"}
    return scenario(1, workload=load, traces={"path": "traces"}).placed(folder)


def test_keys_know_the_content_of_files_but_not_their_place(tmp_path: Path) -> None:
    keys = []
    for folder, seed, text in (("a", 0, "x"), ("b", 0, "x"), ("c", 0, "y"), ("d", 1, "x")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "arrivals.csv").write_text(text)
        traces(seed).write(tmp_path / folder / "traces")
        keys.append(cell_key(arrivals(tmp_path / folder)))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_traces_in_memory_are_told_apart_by_content(tmp_path: Path) -> None:
    assert traces_hash(traces(0)) == traces_hash(traces(0))
    assert traces_hash(traces(0)) != traces_hash(traces(1))
    assert traces_hash(TraceSet.read(traces(0).write(tmp_path / "t"))) == traces_hash(traces(0))
    assert cell_key(scenario(1), "one") != cell_key(scenario(1), "two")
