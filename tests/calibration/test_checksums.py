"""Identity of recorded data: damage is refused, edits on purpose are sealed and labelled, older sets unverified."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import damages, iid_traces, restate
from click.testing import CliRunner
from scenarios import scenario, timing_table, traces_of

import analysis.cascade
import analysis.fidelity
from analysis.cascade.reading import bundled_tables, read_quality_table
from calibration.common.errors import ScenarioError, TraceError
from calibration.measured import MeasuredRun
from calibration.traces import TABLES, TraceSet, bundled_names, bundled_path, make_table
from calibration.traces.traceset import FILES, seal
from paceline.cli import main
from paceline.terminal.runs import caption
from simulator import simulate
from simulator.cascade.items import read_items
from simulator.scenario.loading import parse_scenario

PER_FILE = 125
"""Damaged copies of each of the four tables: 500 in all."""


def complete() -> TraceSet:
    """A set with rows in all four tables."""
    timings = timing_table([("verifier", "verify", 1, 1, 64, 0.02), ("drafter", "draft", 1, 1, 64, 0.002)], repeats=3)
    made = traces_of([[2, 1, 0, 1, 0, 0], [0, 2, 1, 0]], domains=("chat", "code"), timings=timings)
    rollouts = {"sequence_id": ["request-0"] * 3, "drafter": ["drafter"] * 3, "position": [0] * 3, "step": [1, 2, 3]}
    signals = {"drafter_confidence": [0.9, 0.8, 0.5], "drafter_entropy": [0.1, 0.4, 0.9]}
    tables = {name: getattr(made, name) for name in ("sequences", "positions", "timings")}
    return TraceSet.build(made.manifest, {**tables, "rollouts": make_table("rollouts", {**rollouts, **signals})})


def refusal(folder: Path) -> str:
    with pytest.raises(TraceError) as caught:
        TraceSet.read(folder)
    return str(caught.value)


def test_every_damaged_table_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, rng, cases = complete().write(tmp_path / "set"), np.random.default_rng(490), 0
    for file in FILES[1:]:
        path = folder / file
        whole = path.read_bytes()
        for damaged in damages(whole, rng, PER_FILE):
            path.write_bytes(damaged)
            said = refusal(folder)
            assert said.startswith(f"{path}: ")
            assert "must have the sha256" in said or "not a readable Parquet file" in said
            assert "\n" not in said
            cases += 1
        path.write_bytes(whole)
    assert TraceSet.read(folder).unverified == ()
    assert cases == 4 * PER_FILE


@pytest.mark.parametrize("name", bundled_names())
def test_damaged_copies_of_bundled_sets_are_refused(name: str, tmp_path: Path) -> None:
    folder, rng = tmp_path / "copy", np.random.default_rng(1)
    shutil.copytree(bundled_path(name), folder)
    assert TraceSet.read(folder).sha256 == TraceSet.read(bundled_path(name)).sha256
    for file in FILES[1:]:
        whole = (folder / file).read_bytes()
        for damaged in damages(whole, rng, 5):
            (folder / file).write_bytes(damaged)
            assert refusal(folder).startswith(f"{folder / file}: ")
        (folder / file).write_bytes(whole)


def test_a_damaged_manifest_is_refused_or_is_another_identity(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    path, rng, before, read = folder / "manifest.json", np.random.default_rng(2), TraceSet.read(folder).sha256, 0
    for damaged in damages(path.read_bytes(), rng, 200):
        path.write_bytes(damaged)
        try:
            found = TraceSet.read(folder)
        except TraceError:
            continue
        read += 1
        assert found.sha256 != before
    assert 0 < read < 200  # a letter of a name may turn; no number of a table


def zeroed(folder: Path) -> None:
    """Set all run lengths to 0: every rule of the contract still holds."""
    path = folder / "positions.parquet"
    old = pq.read_table(path)
    zeros = pa.array([0] * len(old), type=pa.int32())
    pq.write_table(old.set_column(old.column_names.index("run_length"), "run_length", zeros), path)


def test_run_lengths_set_to_zero_are_refused_wherever_they_are_read(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    before = simulate(parse_scenario(DATA, folder=tmp_path)).summary["provenance"]
    zeroed(folder)
    for command in (["traces", "validate"], ["traces", "show"]):
        done = CliRunner().invoke(main, [*command, str(folder)])
        assert done.exit_code == 1
        assert "positions.parquet: must have the sha256 that manifest.json says" in done.output
        assert f"paceline traces seal {folder}" in done.output
    with pytest.raises(TraceError, match=r"positions\.parquet: must have the sha256"):
        simulate(parse_scenario(DATA, folder=tmp_path))
    restate(folder)  # a forger who knows the format makes another set, and it says so
    after = simulate(parse_scenario(DATA, folder=tmp_path)).summary["provenance"]
    assert after["traces_sha256"] != before["traces_sha256"]
    assert after["tables_sha256"]["positions"] != before["tables_sha256"]["positions"]


DATA: dict[str, Any] = scenario(2, traces={"path": "set"}).model_dump(mode="json", exclude_none=True)


def test_damaged_sequences_are_told_when_the_scenario_is_read(tmp_path: Path) -> None:
    path = complete().write(tmp_path / "set") / "sequences.parquet"
    path.write_bytes(path.read_bytes().replace(b"chat", b"cha\xff"))
    with pytest.raises(ScenarioError, match=r"traces: .*sequences\.parquet: must have the sha256"):
        parse_scenario(DATA, folder=tmp_path)


def test_sets_without_sha256_are_read_and_called_unverified(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    told = json.loads((folder / "manifest.json").read_text())
    assert "sealed" not in told
    del told["tables"]["positions"]
    (folder / "manifest.json").write_text(json.dumps(told))
    assert TraceSet.read(folder).unverified == ("positions",)
    for command in ("show", "validate"):
        done = CliRunner().invoke(main, ["traces", command, str(folder)])
        assert "unverified: positions" in " ".join(done.output.split())
    provenance = simulate(parse_scenario(DATA, folder=tmp_path)).summary["provenance"]
    assert provenance["unverified_tables"] == ["positions"]
    assert caption({"provenance": provenance}).endswith("; recorded positions unverified")
    told["tables"] = {}
    (folder / "manifest.json").write_text(json.dumps(told))
    assert TraceSet.read(folder).unverified == tuple(TABLES)


def test_damage_that_parquet_lets_pass_is_refused_in_unverified_sets_too(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    told = json.loads((folder / "manifest.json").read_text()) | {"tables": {}}
    (folder / "manifest.json").write_text(json.dumps(told))
    table = pq.read_table(folder / "sequences.parquet")
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe\xff\xfe")]
    )
    pq.write_table(table.set_column(1, "domain", broken), folder / "sequences.parquet")
    assert "sequences.parquet: not a readable Parquet file" in refusal(folder)


def test_an_edit_on_purpose_is_sealed_and_labelled(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    before = TraceSet.read(folder).sha256
    path = folder / "positions.parquet"
    frame = pd.read_parquet(path, dtype_backend="pyarrow")
    frame["run_length"] = (frame["run_length"] * 0).astype("int32[pyarrow]")
    frame.to_parquet(path)
    done = CliRunner().invoke(main, ["traces", "seal", str(folder)])
    assert done.output == f"{folder}: sealed positions (edited by hand)\n"
    again = CliRunner().invoke(main, ["traces", "seal", str(folder)])
    assert "nothing to seal" in again.output
    edited = TraceSet.read(folder)
    assert edited.manifest.edited == ("positions",)
    assert edited.sha256 != before
    shown = " ".join(CliRunner().invoke(main, ["traces", "show", str(folder)]).output.split())
    assert "edited by hand: positions" in shown
    provenance = simulate(parse_scenario(DATA, folder=tmp_path)).summary["provenance"]
    assert provenance["edited_tables"] == ["positions"]
    assert caption({"provenance": provenance}).endswith("; recorded positions edited by hand")
    assert TraceSet.read(edited.write(tmp_path / "again")).manifest.edited == ("positions",)


def test_text_as_pandas_writes_it_is_text(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    pd.read_parquet(folder / "timings.parquet").head(3).astype({"tree_nodes": "Int32"}).to_parquet(
        folder / "timings.parquet"
    )
    assert [one.tables for one in seal(folder)] == [("timings",)]
    assert TraceSet.read(folder).timings["model"].to_pylist() == ["verifier"] * 3


def test_sealing_checks_the_whole_contract_first(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    path = folder / "positions.parquet"
    pq.write_table(pq.read_table(path).drop_columns("run_length"), path)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(TraceError, match=r"positions\.parquet: column 'run_length': is missing"):
        seal(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_set_without_sha256_can_be_sealed_and_says_so(tmp_path: Path) -> None:
    folder = complete().write(tmp_path / "set")
    told = json.loads((folder / "manifest.json").read_text()) | {"tables": {}}
    (folder / "manifest.json").write_text(json.dumps(told))
    assert [one.reason for one in seal(folder)] == ["no sha256 before"]
    found = TraceSet.read(folder)
    assert (found.unverified, found.manifest.edited) == ((), ())
    assert "no sha256 before: sequences, positions, rollouts, timings" in found.integrity


def test_sets_made_in_memory_are_told_apart_by_their_values(tmp_path: Path) -> None:
    read = TraceSet.read(complete().write(tmp_path / "set"))
    shorter = dataclasses.replace(read, positions=read.positions.slice(0, 6))
    built = TraceSet.build(read.manifest, {name: getattr(read, name) for name in TABLES})
    assert len({read.sha256, shorter.sha256, built.sha256}) == 3
    assert built.sha256 == complete().sha256
    assert built.tables_sha256 == shorter.tables_sha256 == {}  # a hash of files that are not these values
    assert pickle.loads(pickle.dumps(read)).sha256 == read.sha256
    other = read.manifest.model_copy(update={"seed": 1})
    assert TraceSet.build(other, {name: getattr(read, name) for name in TABLES}).sha256 != built.sha256


def test_all_that_comes_with_the_package_is_verified() -> None:
    markers = [*Path(analysis.fidelity.__file__).parent.glob("bundled/*/*/measured.json")]
    assert len(markers) == 88
    assert [m for m in markers if MeasuredRun.read(m.parent).unverified] == []
    sets = [TraceSet.read(m.parent) for m in Path(analysis.fidelity.__file__).parent.rglob("manifest.json")]
    sets += [TraceSet.read(bundled_path(name)) for name in bundled_names()]
    assert [one for one in sets if one.unverified or one.manifest.sealed] == []
    assert len(sets) == 6
    for name in bundled_tables():
        assert read_quality_table(name).label == "measured"


def test_an_edited_table_of_graded_quality_is_not_called_measured(tmp_path: Path) -> None:
    folder = Path(analysis.cascade.__file__).parent / "bundled"
    table = tmp_path / "smollm2-135m.csv"
    for file in ("smollm2-135m.csv", "smollm2-135m.json"):
        shutil.copy(folder / file, tmp_path / file)
    stages = read_quality_table(table).stages
    assert len(read_items(table, stages)) > 0
    table.write_text(table.read_text().replace(",0,", ",1,", 1))
    rule = r"smollm2-135m\.csv: must have the sha256 that smollm2-135m\.json says"
    with pytest.raises(TraceError, match=rule):
        read_quality_table(table)
    with pytest.raises(ScenarioError, match=rule):
        read_items(table, stages)
    (tmp_path / "smollm2-135m.json").unlink()  # as the message says
    assert read_quality_table(table).label == "given"


def test_equal_values_written_twice_are_one_identity(tmp_path: Path) -> None:
    sets = [iid_traces(0.6, np.random.default_rng(1)).write(tmp_path / name) for name in ("one", "two")]
    assert len({TraceSet.read(folder).sha256 for folder in sets}) == 1
