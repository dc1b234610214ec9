"""Replications: seeds, intervals that cover, the same bytes for any number of workers, and what they refuse."""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scenarios import LINEAR, random_runs, scenario, timing_table, traces_of

from calibration.common.errors import (
    ExtrapolationWarning,
    PacelineError,
    ReplayError,
    ReplicationWarning,
    ScenarioError,
)
from calibration.traces import TraceSet
from simulator import Scenario, simulate
from simulator.experiments.pool import THREADS, process_pool, run_all
from simulator.experiments.replicate import Replications, estimate, replicate, replication_seeds, results_of

POISSON = {"kind": "poisson", "rate_rps": 2.0, "requests": 40, "order": "shuffled"}


def traces() -> TraceSet:
    rng = np.random.default_rng(0)
    return traces_of([random_runs(rng, int(n)) for n in rng.integers(5, 40, 20)])


def loaded(draft_tokens: int | None = 2, **settings: Any) -> Scenario:
    return scenario(draft_tokens, **{"workload": POISSON, "seed": 5, **settings})


def synthetic(values: list[dict[str, Any]]) -> Replications:
    """Replications whose summaries are given, not simulated."""
    return Replications(loaded(), replication_seeds(5, len(values)), tuple(values))


def test_seeds_begin_with_the_scenarios_own_and_only_grow() -> None:
    seeds = replication_seeds(42, 6)
    assert seeds[0] == 42
    assert len(set(seeds)) == 6
    assert replication_seeds(42, 3) == seeds[:3]
    assert all(0 <= seed < 2**63 for seed in seeds)
    spawned = np.random.SeedSequence(42).spawn(6)[4].generate_state(1, np.uint64)[0]
    assert seeds[4] == int(spawned) >> 1
    assert not set(replication_seeds(43, 6)) & set(seeds)


def test_seeds_stay_what_they_are() -> None:
    """A change here changes every stored result."""
    assert replication_seeds(0, 3) == (0, 2440950710608614359, 8226343694796210948)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_intervals_are_students(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    if found.sd:
        low, high = scipy.stats.t.interval(
            0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values) or 1e-300
        )
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_one_value_has_no_interval_and_equal_ones_have_one_of_no_length() -> None:
    assert estimate([3.0]).to_dict() == {"n": 1, "mean": 3.0}
    assert estimate([0.1] * 7).to_dict() == {"n": 7, "mean": 0.1, "sd": 0.0, "low": 0.1, "high": 0.1}


def test_intervals_cover_the_truth_95_times_in_100() -> None:
    """3,000 experiments of 5 synthetic runs each; three standard errors of the share are 0.012."""
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(3000):
        runs = synthetic([{"mean_ttft_ms": float(x)} for x in rng.normal(100, 15, 5)])
        found = runs.estimates["mean_ttft_ms"]
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 100 <= found.high
    assert abs(hits / 3000 - 0.95) < 0.012


def test_the_first_replication_is_the_plain_run_and_the_others_are_runs_of_their_seeds() -> None:
    runs = replicate(loaded(), 3, traces(), workers=1)
    for seed, summary in zip(runs.seeds, runs.summaries, strict=True):
        assert summary == simulate(loaded(seed=seed), traces()).summary
    assert runs.estimates["mean_e2el_ms"].n == 3
    assert runs.estimates["mean_e2el_ms"].sd != 0
    values = [summary["mean_e2el_ms"] for summary in runs.summaries]
    assert runs.estimates["mean_e2el_ms"].mean == pytest.approx(np.mean(values))


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    shipped = traces()
    written = []
    for workers in (1, 2, 4):
        folder = replicate(loaded(), 5, shipped, workers=workers).write(tmp_path / str(workers))
        written.append({file.name: file.read_bytes() for file in sorted(folder.iterdir())})
    assert sorted(written[0]) == ["replications.json", "replications.parquet", "scenario.toml"]
    assert written[0] == written[1] == written[2]


def test_workers_read_traces_by_path(tmp_path: Path) -> None:
    shipped = traces()
    shipped.write(tmp_path / "traces")
    by_path = loaded(traces={"path": "traces"}).placed(tmp_path)
    found = replicate(by_path, 3, workers=2)
    assert found.results == replicate(loaded(traces={"path": "traces"}), 3, shipped, workers=1).results


def test_progress_counts_runs() -> None:
    heard: list[tuple[int, int]] = []
    replicate(loaded(), 3, traces(), workers=2, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_workers_have_one_thread_each_and_the_parent_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with process_pool(1, None) as pool:
        assert [pool.submit(os.getenv, name).result() for name in THREADS] == ["1", "1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in os.environ


def test_the_folder_says_everything(tmp_path: Path) -> None:
    runs = replicate(loaded(name="busy"), 4, traces(), workers=1)
    folder = runs.write(tmp_path / "out")
    data = json.loads((folder / "replications.json").read_text())
    assert (data["name"], data["replications"], data["confidence"]) == ("busy", 4, 0.95)
    assert data["seeds"] == list(runs.seeds)
    assert data["deterministic"] is False
    assert data["scenario_hash"] == loaded(name="busy").hash
    throughput = data["metrics"]["output_throughput"]
    table = pq.read_table(folder / "replications.parquet").to_pandas()
    assert throughput["n"] == len(table) == 4
    assert throughput["mean"] == pytest.approx(table.output_throughput.mean())
    assert throughput["sd"] == pytest.approx(table.output_throughput.std())
    assert table.replication.tolist() == [0, 1, 2, 3]
    assert table["spec_decode_per_position_acceptance_rates[1]"].between(0, 1).all()
    runs.write(folder)  # an older result is replaced
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    runs = synthetic([{"x": 1.0, "paceline_version": "0", "costs": {}, "provenance": {}}] * 2)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ScenarioError, match="must be new, empty or an older result"):
        runs.write(tmp_path)
    with pytest.raises(ScenarioError, match="must be a folder, got a file"):
        runs.write(tmp_path / "thesis.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_scenario_without_chance_gets_a_warning_and_no_interval() -> None:
    closed = loaded(workload={"kind": "closed", "concurrency": 2}, name="closed")
    with pytest.warns(ReplicationWarning, match=r"'closed'.* all 3 replications are the same.*order = 'shuffled'"):
        runs = replicate(closed, 3, traces(), workers=1)
    assert runs.deterministic
    found = runs.estimates["output_throughput"]
    assert (found.n, found.sd, found.low, found.high) == (3, 0.0, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shuffled = replicate(loaded(workload={"kind": "closed", "concurrency": 2, "order": "shuffled"}), 3, traces())
    assert not shuffled.deterministic


def test_warnings_of_runs_are_told_once() -> None:
    rows = [("verifier", op, b, 1, c, 0.02) for op in ("prefill", "verify") for b in (1, 2) for c in (0, 8)]
    timed = traces_of([[0] * 9] * 6, timings=timing_table(rows))
    with pytest.warns(ExtrapolationWarning, match="the first of 3 of 3 runs to say so") as caught:
        replicate(loaded(None, costs={}), 3, timed, workers=2)
    assert len(caught) == 1


def test_numbers_that_some_runs_lack_say_how_many_had_them() -> None:
    runs = synthetic([{"a": 1.0, "b": 2.0}, {"a": 2.0}, {"a": 4.0, "b": 3.0}])
    assert (runs.estimates["a"].n, runs.estimates["b"].n) == (3, 2)
    assert runs.table["b"].to_pylist() == [2.0, None, 3.0]


def test_results_are_numbers_and_items_of_lists() -> None:
    summary = {"name": "x", "seed": 3, "n": 2, "flag": True, "rates": [0.5, 0.25], "costs": {"a": 1.0}}
    assert results_of(summary) == {"n": 2, "rates[0]": 0.5, "rates[1]": 0.25}


@pytest.mark.parametrize("n", [-1, 0, 1])
def test_fewer_than_two_replications_are_refused(n: int) -> None:
    with pytest.raises(ScenarioError, match=f"replications: must be at least 2.*got {n}"):
        replicate(loaded(), n, traces())


def test_fewer_than_one_worker_is_refused() -> None:
    with pytest.raises(ScenarioError, match="workers: must be at least 1, got 0"):
        replicate(loaded(), 2, traces(), workers=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_a_run_comes_out_as_it_is(workers: int) -> None:
    capped = traces_of([[0, 0, 0]] * 3, max_draft_tokens=1)
    with pytest.raises(ReplayError, match=r"stopping.draft_tokens: must be at most 1"):
        replicate(loaded(3), 4, capped, workers=workers)


def test_a_missing_traceset_is_named() -> None:
    with pytest.raises(ScenarioError, match="traces: must have bundled or path"):
        replicate(loaded(), 2)


SLOW = {"workload": {**POISSON, "requests": 200_000}, "costs": {"verifier": LINEAR}}
"""Settings of a run of minutes."""


class Deadly:
    """Whoever reads it from a pickle ends there and then."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (1,)


def test_a_worker_that_dies_is_explained() -> None:
    deadly: Any = Deadly()
    with pytest.raises(PacelineError, match=r"worker process ended abruptly.*__main__.*workers = 1"):
        list(run_all([loaded()] * 2, deadly, workers=2))


def test_a_worker_that_cannot_start_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("handle is closed")

    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", fail)
    with pytest.raises(PacelineError, match=r"could not start.*workers = 1") as caught:
        list(run_all([loaded()] * 2, traces(), workers=2))
    assert isinstance(caught.value.__cause__, OSError)


def test_leaving_early_stops_the_workers() -> None:
    slow = loaded(None, **SLOW)
    runs = run_all([loaded(), slow, slow], traces(), workers=2)
    index, outcome = next(runs)
    assert index == 0
    assert outcome.summary["completed"] == 40
    runs.close()  # would take minutes if the workers went on
