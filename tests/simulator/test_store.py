"""The store: migrations, keys that know what a cell depends on, and files that are no store."""

from __future__ import annotations

import importlib
import re
import sqlite3
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel
from scenarios import random_runs, scenario, traces_of

import simulator
from calibration.common import plugins
from calibration.common.errors import PacelineWarning, ScenarioError
from calibration.common.version import code_sha256, package_files
from calibration.measured.run import FILES as RUN_FILES
from calibration.traces import TraceSet
from calibration.traces.traceset import FILES
from simulator import Scenario
from simulator.cascade import CascadeScenario
from simulator.experiments import store as stores
from simulator.experiments.store import MIGRATIONS, Store, StoredCell, cell_key, traces_hash
from simulator.scenario.inputs import mark_of

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
        assert store.applied() == (1, 2)
        store.put("a", scenario(1), CELL)

    def add_note(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE notes (text TEXT)")

    monkeypatch.setattr(stores, "MIGRATIONS", (*MIGRATIONS, add_note))
    for _ in range(2):
        with Store(file) as store:
            assert store.applied() == (1, 2, 3)
            assert store.get(["a"]) == {"a": CELL}
    with sqlite3.connect(file) as connection:
        rows = connection.execute("SELECT number, name FROM migrations").fetchall()
        assert connection.execute("SELECT count(*) FROM notes").fetchone() == (0,)
    connection.close()
    assert rows == [(1, "create_cells"), (2, "checked_cells"), (3, "add_note")]


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
        assert store.applied() == (1, 2)
        store._connection.execute("CREATE TABLE half (x)")  # it was rolled back


def test_a_store_of_a_newer_paceline_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cells.sqlite"
    with Store(file) as store:
        store._connection.execute("INSERT INTO migrations VALUES (3, 'unheard_of', 'later')")
    with pytest.raises(ScenarioError, match=r"migration must be at most 2, got 3; a newer paceline"):
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
    copies = [traces_hash(TraceSet.read(traces(0).write(tmp_path / name))) for name in ("t", "u")]
    assert copies[0] == copies[1]
    assert cell_key(scenario(1), "one") != cell_key(scenario(1), "two")


# --- what a key covers: everything that a scenario reads


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """Every table that can stand in a scenario, through unions, lists and dictionaries."""
    if model in seen:
        return seen
    seen.add(model)

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            sections(annotation, seen)
        for argument in get_args(annotation):
            visit(argument)

    for info in model.model_fields.values():
        visit(info.annotation)
    return seen


PATH_LIKE = re.compile(r"(^|_)(path|paths|file|files|folder|folders|dir|runs|bundled|csv)$")
NO_PATHS = {("PathsShape", "paths")}
"""Through a draft tree."""


@pytest.mark.parametrize("root", [Scenario, CascadeScenario])
def test_every_key_that_names_a_place_is_marked(root: type[BaseModel]) -> None:
    found = {
        (model.__name__, name): mark_of(Annotated[info.annotation, *info.metadata, None])
        for model in sections(root, set())
        for name, info in model.model_fields.items()
    }
    marked = {key for key, mark in found.items() if mark is not None}
    assert {("TraceSource", "path"), ("TraceSource", "bundled"), ("Observed", "runs")} <= marked
    forgotten = {key for key in found if PATH_LIKE.search(key[1])} - marked - NO_PATHS
    assert forgotten == set(), "these keys look like paths: give them a type of simulator.scenario.inputs"


def test_every_place_that_the_simulator_looks_up_is_named_by_a_marked_key() -> None:
    """Whatever is passed to `locate` in the package is called like a marked key, or is one of its values."""
    marked = {
        name
        for root in (Scenario, CascadeScenario)
        for model in sections(root, set())
        for name, info in model.model_fields.items()
        if mark_of(Annotated[info.annotation, *info.metadata, None]) is not None
    }
    asked = {
        word
        for file in Path(simulator.__file__).parent.rglob("*.py")
        for word in re.findall(r"\blocate\((?:\w+\.)*(\w+)\)", file.read_text(encoding="utf-8"))
    }
    assert {"path", "lengths_path", "run"} <= asked
    assert asked <= marked | {name.removesuffix("s") for name in marked}


def test_places_are_found_in_unions_lists_and_dictionaries(tmp_path: Path) -> None:
    load = {
        "kind": "clients",
        "path": "clients.csv",
        "lengths_path": "lengths.csv",
        "requests": 3,
    }
    observed = {"kind": "observed", "runs": ["a/run", "b/run"]}
    costs = {"verifier": observed, "drafters": {"drafter": {"kind": "observed", "runs": ["c/run"]}}}
    routing = {"drafter": {"policy": "assigned", "drafters": ["drafter", "other"], "path": "who.csv"}}
    chosen = scenario(
        1,
        workload=load,
        costs=costs,
        traces={"bundled": "smollm2-135m-cpu-greedy"},
        drafter=None,
        routing=routing,
        replica=[{"name": "x", "traces": {"path": "other"}}],
    )
    assert set(chosen.inputs_sha256()) == {
        "traces.bundled",
        "workload.path",
        "workload.lengths_path",
        "costs.verifier.runs[0]",
        "costs.verifier.runs[1]",
        "costs.drafters.drafter.runs[0]",
        "replica[0].traces.path",
        "routing.drafter.path",
    }
    assert "traces.bundled" not in chosen.inputs_sha256(without="traces")
    told = chosen.placed(tmp_path).to_toml(tmp_path / "deep")
    for moved in ("../a/run", "../b/run", "../c/run", "../clients.csv", "../lengths.csv", "../other"):
        assert f'"{moved}"' in told
    assert '"smollm2-135m-cpu-greedy"' in told


@pytest.mark.parametrize("name", FILES)
def test_keys_know_every_file_of_a_traceset(tmp_path: Path, name: str) -> None:
    traces(0).write(tmp_path / "traces")
    chosen = scenario(1, traces={"path": "traces"}).placed(tmp_path)
    before = cell_key(chosen)
    (tmp_path / "traces" / "notes.txt").write_text("read by nobody")
    assert cell_key(chosen) == before
    path = tmp_path / "traces" / name
    path.write_bytes(path.read_bytes() + b" ")
    assert cell_key(chosen) != before


@pytest.mark.parametrize("name", RUN_FILES)
def test_keys_know_every_file_of_measured_runs(tmp_path: Path, name: str) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "run").mkdir(parents=True)
        for file in RUN_FILES:
            (tmp_path / folder / "run" / file).write_text("same")

    def key(folder: str) -> str:
        costs = {"verifier": {"kind": "observed", "runs": [f"{folder}/run"]}}
        return cell_key(scenario(1, costs=costs).placed(tmp_path))

    assert key("a") == key("b")
    (tmp_path / "b" / "run" / name).write_text("other")
    assert key("a") != key("b")


def test_keys_know_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_key(scenario(1))
    monkeypatch.setattr(stores, "code_sha256", lambda: "edited")
    assert cell_key(scenario(1)) != before


def test_the_code_is_told_apart_by_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "aparted"
    (package / "inner" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/table.json", "inner/__pycache__/x.pyc"):
        (package / name).write_text("1")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert set(package_files("aparted")) == {
        "aparted/__init__.py",
        "aparted/inner/__init__.py",
        "aparted/inner/table.json",
    }
    code_sha256.cache_clear()
    found = [code_sha256(("aparted",))]
    (package / "inner" / "table.json").write_text("2")
    assert code_sha256(("aparted",)) == found[0]  # once in a process
    code_sha256.cache_clear()
    assert code_sha256(("aparted",)) != found[0]
    code_sha256.cache_clear()
    assert {"simulator/running/run.py", "simulator/hardware/efficiencies/roofline.json"} <= set(
        package_files("simulator")
    )
    assert not any("bundled/" in name for name in package_files("calibration", without=("bundled",)))
    assert package_files("no_such_package_at_all") == {}


def test_keys_know_the_code_and_the_files_of_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "third_party_policy.py").write_text("LENGTH = 1\n")
    (tmp_path / "weights.txt").write_text("1")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    points = [EntryPoint("theirs", "third_party_policy:Policy", "paceline.stopping")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)

    def key(name: str = "theirs") -> str:
        settings = {"nested": [{"file": "weights.txt"}]}
        return cell_key(scenario(1, stopping={"policy": f"plugin:{name}", "settings": settings}).placed(tmp_path))

    keys = [key()]
    assert key() == keys[0]
    (tmp_path / "third_party_policy.py").write_text("LENGTH = 2\n")
    keys.append(key())
    (tmp_path / "weights.txt").write_text("2")
    keys.append(key())
    assert len({*keys, key("unseen")}) == 4


def test_a_damaged_cell_is_run_again(tmp_path: Path) -> None:
    with Store(tmp_path / "cells.sqlite") as store:
        store.put("a", scenario(1), CELL)
        store._connection.execute("UPDATE cells SET summary = replace(summary, '3', '4')")
        with pytest.warns(PacelineWarning, match="1 cells are not as they were written, damaged or edited"):
            assert store.get(["a"]) == {}


def test_cells_of_older_keys_are_named_once_and_never_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cells.sqlite"
    monkeypatch.setattr(stores, "MIGRATIONS", MIGRATIONS[:1])
    with Store(file) as store:
        row = ("a", "hash", "0.1.0", "0", "", '{"completed": 3}', "[]", "then")
        store._connection.execute("INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    monkeypatch.setattr(stores, "MIGRATIONS", MIGRATIONS)
    with pytest.warns(PacelineWarning, match="1 cells of the store were kept by an older paceline"):
        store = Store(file)
    with store:
        assert store.get(["a"]) == {}
        assert len(store) == 1
    with Store(file) as store:  # without a warning
        assert store.get(["a"]) == {}
