"""Sweeps: axes, faults before anything runs, resuming after a kill, tables and files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scenarios import random_runs, scenario, timing_table, traces_of

from calibration.common.errors import ExtrapolationWarning, ScenarioError
from calibration.traces import TraceSet
from simulator import Scenario, simulate
from simulator.experiments import store as stores
from simulator.experiments.axes import load_sweep, parse_axis, plan_sweep
from simulator.experiments.replicate import replication_seeds
from simulator.experiments.sweep import run_sweep, sweep

POISSON = {"kind": "poisson", "rate_rps": 2.0, "requests": 30, "order": "shuffled"}
GRID: dict[str, list[Any]] = {"stopping.draft_tokens": [1, 3], "engine.max_num_seqs": [2, 4, 8]}


def traces() -> TraceSet:
    rng = np.random.default_rng(0)
    return traces_of([random_runs(rng, int(n)) for n in rng.integers(5, 30, 20)])


def base(**settings: Any) -> Scenario:
    return scenario(2, **{"workload": POISSON, "seed": 5, **settings})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2,4", [1, 2, 4]),
        ("a.b = 1 , 2.5", [1, 2.5]),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b=none,oracle", ["none", "oracle"]),
        ("a.b=prompt-lookup", ["prompt-lookup"]),
        ("a.b='x y',\"z\"", ["x y", "z"]),
        ("a.b=true,false", [True, False]),
        ("a.b=1,many", [1, "many"]),
        ("a.b=['code'],['chat','code']", [["code"], ["chat", "code"]]),
        ("a.b={policy='none'},{policy='fixed',k=2}", [{"policy": "none"}, {"policy": "fixed", "k": 2}]),
        ("a.b=[{policy='none'}]", [{"policy": "none"}]),
    ],
)
def test_axes_are_toml_values_or_plain_words(text: str, values: list[Any]) -> None:
    key, found = parse_axis(text)
    assert key == "a.b"
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize("text", ["a.b", "=1", "a.b=", "a.b=[1", "a.b={x", "a.b=1,,2", "a.b=x y"])
def test_axes_that_say_nothing_clear_are_refused(text: str) -> None:
    with pytest.raises(ScenarioError, match=r"^axis '"):
        parse_axis(text)


def test_cells_are_the_product_in_order_and_share_their_seeds() -> None:
    plan = plan_sweep(base(), GRID, 2)
    points = [(k, b) for k in (1, 3) for b in (2, 4, 8)]
    assert plan.points == 6
    assert [tuple(cell.point.values()) for cell in plan.cells[::2]] == points
    assert [cell.index for cell in plan.cells] == [i for i in range(6) for _ in range(2)]
    for cell in plan.cells:
        assert cell.scenario.seed == replication_seeds(5, 2)[cell.replication]
        assert cell.scenario.model_dump()["stopping"]["draft_tokens"] == cell.point["stopping.draft_tokens"]
        assert cell.scenario.engine.max_num_seqs == cell.point["engine.max_num_seqs"]
    same = base(engine={"max_num_seqs": 4}, stopping={"policy": "fixed", "draft_tokens": 3})
    assert plan.cells[8].scenario.hash == same.hash


def test_an_axis_may_replace_a_whole_table_or_the_seed() -> None:
    policies = [{"policy": "none"}, {"policy": "fixed", "draft_tokens": 2}, {"policy": "oracle"}]
    plan = plan_sweep(base(), {"stopping": policies, "seed": [1, 2]}, 2)
    assert [cell.scenario.stopping.policy for cell in plan.cells[::4]] == ["none", "fixed", "oracle"]
    assert [cell.scenario.seed for cell in plan.cells[:4]] == [*replication_seeds(1, 2), *replication_seeds(2, 2)]


def test_every_fault_of_every_cell_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.experiments.pool.simulate", None)
    with pytest.raises(ScenarioError) as caught:
        sweep(base(), {"stopping.draft_token": [1, 2], "engine.max_num_seqs": [4, 0, -1]}, traces=traces())
    assert str(caught.value).split("\n") == [
        "sweep: stopping.draft_token: no such key; did you mean 'draft_tokens'? (in every cell)",
        "sweep: engine.max_num_seqs: must be >= 1, got 0 (in 2 of 6 cells, "
        "first stopping.draft_token=1, engine.max_num_seqs=0)",
        "sweep: engine.max_num_seqs: must be >= 1, got -1 (in 2 of 6 cells, "
        "first stopping.draft_token=1, engine.max_num_seqs=-1)",
    ]


@pytest.mark.parametrize(
    ("grid", "replications", "message"),
    [
        ({}, 1, "must have at least one axis"),
        ({"seed": []}, 1, "seed: must have at least one value"),
        ({"seed": [1, 2, 1]}, 1, "seed: must have each value once, got 1 twice"),
        ({"seed": [1]}, 0, "replications: must be a whole number of at least 1, got 0"),
        (
            {"stopping": [{"policy": "none"}], "stopping.draft_tokens": [1]},
            1,
            "must not be an axis beside 'stopping.dr",
        ),
        ({"sed": [1]}, 1, "sed: no such key; did you mean 'seed'"),
        ({"drafter.name": ["draftr"]}, 1, "drafter.name: not in the TraceSet, got 'draftr'; did you mean 'drafter'"),
        ({"traces.domains": [["chat"], ["code"]]}, 1, "traces.domains: not in the TraceSet, got 'code'"),
    ],
)
def test_grids_that_cannot_be_are_refused(grid: dict[str, list[Any]], replications: int, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        sweep(base(), grid, replications=replications, traces=traces())


def test_many_faults_are_cut_short() -> None:
    with pytest.raises(ScenarioError, match="and 5 more faults"):
        plan_sweep(base(), {"engine.max_num_seqs": list(range(-14, 1))})


def test_a_sweep_without_traces_is_refused() -> None:
    with pytest.raises(ScenarioError, match="sweep: traces: must have bundled or path, or be given"):
        sweep(base(), {"seed": [1]})


FILE = """
[traces]
path = "traces"

[drafter]
name = "drafter"

[stopping]
policy = "fixed"

[workload]
kind = "poisson"
rate_rps = 2.0
requests = 30
order = "shuffled"

[costs.verifier]
kind = "linear"
base_s = 0.02

[costs.drafter]
kind = "linear"
base_s = 0.002

[sweep]
replications = 2
stopping.draft_tokens = [1, 3]
"engine.max_num_seqs" = [2, 4]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    traces().write(tmp_path / "traces")
    path = tmp_path / "sweep.toml"
    path.write_text(FILE)
    return path


def test_a_file_holds_scenario_and_sweep(file: Path) -> None:
    plan = load_sweep(file)
    assert plan.axes == {"stopping.draft_tokens": (1, 3), "engine.max_num_seqs": (2, 4)}
    assert plan.replications == 2
    other = load_sweep(file, ["engine.max_num_seqs=8", "workload.rate_rps=1.0,2.0"], replications=1)
    assert other.axes == {
        "stopping.draft_tokens": (1, 3),
        "engine.max_num_seqs": (8,),
        "workload.rate_rps": (1.0, 2.0),
    }
    assert len(other.cells) == 4
    assert run_sweep(load_sweep(file, replications=1), workers=1).table.num_rows == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 3]", "3", r"sweep.stopping.draft_tokens: must be a list of values, got 3"),
        ("replications = 2", "replications = 'two'", r"replications: must be a whole number .* got 'two'"),
        ("[sweep]", "[sweep", "not valid TOML"),
        ("rate_rps", "rate_rsp", r"sweep.toml: workload.rate_rsp: no such key; did you mean 'rate_rps'.* every cell"),
        ('path = "traces"', 'path = "trace"', r"no TraceSet there"),
    ],
)
def test_faults_of_a_file_are_named(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ScenarioError, match=message):
        load_sweep(file)


def test_files_without_a_sweep_are_refused(file: Path) -> None:
    with pytest.raises(ScenarioError, match="not found"):
        load_sweep(file.with_name("none.toml"))
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_sweep(file.parent)
    file.write_text("sweep = 3\n" + FILE.partition("[sweep]")[0])
    with pytest.raises(ScenarioError, match="sweep: must be a table, got 3"):
        load_sweep(file)
    file.write_text(FILE.partition("[sweep]")[0])
    with pytest.raises(ScenarioError, match="must have at least one axis"):
        load_sweep(file)


def test_every_cell_is_the_run_of_its_scenario(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    result = sweep(base(), GRID, traces=traces(), workers=2, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(i, 6) for i in range(7)]
    frame = result.frame()
    assert frame.columns[:5].tolist() == [*GRID, "replication", "seed", "scenario_hash"]
    for row in frame.to_dict("records"):
        alone = base(
            stopping={"policy": "fixed", "draft_tokens": row["stopping.draft_tokens"]},
            engine={"max_num_seqs": row["engine.max_num_seqs"]},
        )
        summary = simulate(alone, traces()).summary
        assert row["scenario_hash"] == alone.hash
        assert row["mean_e2el_ms"] == summary["mean_e2el_ms"]
        assert row["output_throughput"] == summary["output_throughput"]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    for ending in ("csv", "parquet"):
        written = []
        for workers in (1, 2, 4):
            result = sweep(
                base(), {"stopping.draft_tokens": [1, 3]}, traces=traces(), workers=workers, replications=2
            )
            written.append(result.write(tmp_path / f"{workers}.{ending}").read_bytes())
        assert written[0] == written[1] == written[2]


def test_tables_can_be_read_back(tmp_path: Path) -> None:
    grid = {"stopping": [{"policy": "none"}, {"policy": "fixed", "draft_tokens": 2}], "seed": [1]}
    result = sweep(base(), grid, traces=traces(), workers=1)
    by_csv = pd.read_csv(result.write(tmp_path / "a" / "cells.csv"))
    by_parquet = pd.read_parquet(result.write(tmp_path / "cells.parquet"))
    assert [json.loads(text) for text in by_csv["stopping"]] == grid["stopping"]
    pd.testing.assert_frame_equal(by_csv, by_parquet, check_dtype=False)
    assert by_csv["spec_decode_acceptance_rate"].isna().tolist() == [True, False]
    with pytest.raises(ScenarioError, match=r"cells.xlsx: must end in .parquet or .csv, got '.xlsx'"):
        result.write(tmp_path / "cells.xlsx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "cells.parquet"]


def test_points_have_intervals_over_their_replications() -> None:
    result = sweep(base(), {"stopping.draft_tokens": [1, 3]}, traces=traces(), workers=1, replications=4)
    frame = result.frame()
    for point, found in result.estimates():
        values = frame.loc[frame["stopping.draft_tokens"] == point["stopping.draft_tokens"], "mean_tpot_ms"]
        assert found["mean_tpot_ms"].mean == pytest.approx(values.mean())
        assert found["mean_tpot_ms"].sd == pytest.approx(values.std())
        assert found["mean_tpot_ms"].half_width is not None


def test_equal_replications_get_no_interval() -> None:
    closed = base(workload={"kind": "closed", "concurrency": 2})
    result = sweep(closed, {"stopping.draft_tokens": [1]}, traces=traces(), workers=1, replications=2)
    assert result.estimates()[0][1]["mean_tpot_ms"].low is None


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cells.sqlite"
    first = sweep(base(), GRID, traces=traces(), workers=1, store=place)
    more = {**GRID, "stopping.draft_tokens": [1, 3, 5]}
    wider = sweep(base(), more, traces=traces(), workers=1, store=place)
    assert (first.reused, wider.reused) == (0, 6)
    assert wider.summaries[:6] == first.summaries
    again = sweep(base(), GRID, traces=traces(), workers=1, store=place, replications=2)
    assert again.reused == 6
    with monkeypatch.context() as patch:
        patch.setattr("simulator.experiments.pool.simulate", None)
        heard: list[tuple[int, int]] = []
        kept = sweep(
            base(), GRID, traces=traces(), store=place, progress=lambda done, total: heard.append((done, total))
        )
    assert heard == [(6, 6)]
    assert kept.table.equals(first.table)
    monkeypatch.setattr(stores, "package_version", lambda: "99.0")
    assert sweep(base(), GRID, traces=traces(), workers=1, store=place).reused == 0


def test_other_traces_are_run_anew(tmp_path: Path) -> None:
    place = tmp_path / "cells.sqlite"
    other = traces_of([random_runs(np.random.default_rng(9), 9) for _ in range(4)])
    for shipped in (traces(), other):
        assert sweep(base(), {"seed": [1]}, traces=shipped, workers=1, store=place).reused == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_cells_that_cannot_be_run_are_named_and_the_others_kept(tmp_path: Path, workers: int) -> None:
    capped = traces_of([[0, 0, 0]] * 9, max_draft_tokens=2)
    place = tmp_path / "cells.sqlite"
    with pytest.raises(ScenarioError) as caught:
        sweep(base(), {"stopping.draft_tokens": [1, 4, 2, 3]}, traces=capped, workers=workers, store=place)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("sweep: stopping.draft_tokens=4: stopping.draft_tokens: must be at most 2")
    assert lines[1].startswith("sweep: stopping.draft_tokens=3: ")
    assert lines[2] == "sweep: 2 of 4 cells could not be run (2 are kept)"
    assert sweep(base(), {"stopping.draft_tokens": [1, 2]}, traces=capped, workers=1, store=place).reused == 2


def test_an_error_in_a_cell_keeps_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cells.sqlite"
    calls = []

    def breaks(chosen: Scenario, traces: TraceSet) -> Any:
        calls.append(chosen)
        if len(calls) == 4:
            raise MemoryError
        return simulate(chosen, traces)

    with monkeypatch.context() as patch:
        patch.setattr("simulator.experiments.pool.simulate", breaks)
        with pytest.raises(MemoryError):
            sweep(base(), GRID, traces=traces(), workers=1, store=place)
    assert sweep(base(), GRID, traces=traces(), workers=1, store=place).reused == 3


def test_warnings_are_kept_with_their_cells(tmp_path: Path) -> None:
    rows = [("verifier", op, b, 1, c, 0.02) for op in ("prefill", "verify") for b in (1, 2) for c in (0, 8)]
    timed = traces_of([[0] * 9] * 6, timings=timing_table(rows))
    chosen = scenario(None, workload=POISSON, costs={})
    for expected in (0, 2):
        with pytest.warns(ExtrapolationWarning, match="the first of 2 of 2 runs to say so"):
            found = sweep(chosen, {"seed": [1, 2]}, traces=timed, workers=1, store=tmp_path / "cells.sqlite")
        assert found.reused == expected


LONG = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from simulator.experiments.axes import load_sweep
from simulator.experiments.sweep import run_sweep

if __name__ == "__main__":
    plan = load_sweep(sys.argv[1], ["workload.requests=" + ",".join(map(str, range(400, 480)))], replications=1)

    def end(done, total):
        if done == 3:
            os.kill(os.getpid(), int(sys.argv[3]))

    run_sweep(plan, store=sys.argv[2], workers=2, progress=end)
"""
"""A long sweep that is hit by a signal when three of its cells are done."""


def kept(place: Path) -> int:
    """How many cells another process can see."""
    with contextlib.closing(sqlite3.connect(place)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM cells").fetchone()[0])
        except sqlite3.OperationalError:  # not made yet
            return 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_killed_goes_on(tmp_path: Path, file: Path, how: signal.Signals) -> None:
    place, script = tmp_path / "cells.sqlite", tmp_path / "long.py"
    script.write_text(LONG)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, str(script), str(file), str(place), str(int(how))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    assert process.returncode not in (0, None), process.stderr.decode()
    done = kept(place)
    assert 3 <= done < 160
    axis = "workload.requests=" + ",".join(map(str, range(400, 404)))
    plan = load_sweep(file, [axis], replications=1)
    result = run_sweep(plan, store=place, workers=1)
    assert result.reused >= 2
    assert result.frame().completed.tolist() == [n for _ in range(4) for n in range(400, 404)]
    fresh = run_sweep(plan, workers=1)
    assert fresh.table.equals(result.table)
