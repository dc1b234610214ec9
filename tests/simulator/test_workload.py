"""Workloads: who arrives when, and which recorded sequence answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import iid_traces
from scenarios import scenario, traces_of

from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator import simulate


def uniform(sequences: int = 6, output_tokens: int = 30, seed: int = 0) -> TraceSet:
    return iid_traces(0.5, np.random.default_rng(seed), sequences=sequences, output_tokens=output_tokens)


def test_every_sequence_once_by_default_and_again_in_order_if_more_are_asked_for() -> None:
    result = simulate(scenario(1, batch=2), uniform(4))
    assert result.requests["sequence_id"].to_pylist() == [f"request-{i}" for i in range(4)]
    result = simulate(scenario(1, batch=2, workload={"requests": 6}), uniform(4))
    assert result.requests["sequence_id"].to_pylist() == [f"request-{i % 4}" for i in range(6)]


def test_shuffled_passes_hold_every_sequence_once_and_depend_on_the_seed_alone() -> None:
    def order(seed: int, policy: int | None) -> list[str]:
        load = {"requests": 24, "order": "shuffled"}
        ids: list[str] = (
            simulate(scenario(policy, seed=seed, workload=load), uniform(8)).requests["sequence_id"].to_pylist()
        )
        return ids

    one = order(1, 2)
    for start in (0, 8, 16):
        assert sorted(one[start : start + 8]) == [f"request-{i}" for i in range(8)]
    assert one[:8] != one[8:16]
    assert order(1, None) == one
    assert order(2, 2) != one


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    result = simulate(scenario(2, batch=8, workload={"concurrency": 3}), uniform(12))
    requests = result.requests.to_pandas()
    # A client submits the moment its last request ends.
    assert requests["arrival_s"].tolist()[:3] == [0.0, 0.0, 0.0]
    assert sorted(requests["arrival_s"].tolist()[3:]) == sorted(requests["finish_s"].tolist())[:9]
    assert result.iterations["active"].to_numpy().max() == 3


def test_keep_full_adds_uncounted_fillers_until_the_last_counted_request_ends() -> None:
    traces = iid_traces(0.5, np.random.default_rng(1), sequences=10, output_tokens=60)
    plain = simulate(scenario(3, batch=4), traces)
    full = simulate(scenario(3, batch=4, workload={"keep_full": True}), traces)
    decode = full.iterations.to_pandas().query("kind == 'decode'")
    assert (decode["active"] == 4).all()
    assert (plain.iterations.to_pandas().query("kind == 'decode'")["active"] < 4).any()
    counted = full.requests.to_pandas().query("counted")
    assert sorted(counted["sequence_id"]) == sorted(f"request-{i}" for i in range(10))
    assert full.summary["completed"] == 10
    assert full.summary["total_output_tokens"] == 600
    last = full.iterations.to_pandas().iloc[-1]
    assert counted["finish_s"].max() == last["start_s"] + last["duration_s"]
    # Fillers' tokens are the engine's work too, but not the workload's.
    assert full.summary["engine_output_throughput"] > full.summary["output_throughput"]
    # Counted requests alone give the latencies; the gaps of a request add up to its time after the first token.
    after_first = (counted["finish_s"] - counted["first_token_s"]).sum()
    assert full.summary["mean_itl_ms"] == pytest.approx(1000 * after_first / counted["rounds"].sum())
    assert full.summary["mean_e2el_ms"] == pytest.approx(1000 * (counted["finish_s"] - counted["arrival_s"]).mean())
    assert full.summary["mean_ttft_ms"] == pytest.approx(
        1000 * (counted["first_token_s"] - counted["arrival_s"]).mean()
    )


def test_copies_of_a_sequence_form_one_batch_after_another() -> None:
    load = {"copies": 3, "concurrency": 3}
    result = simulate(scenario(2, batch=3, workload=load), uniform(4))
    requests = result.requests.to_pandas()
    assert requests["sequence_id"].tolist() == [f"request-{i // 3}" for i in range(12)]
    assert (requests.groupby("sequence_id")["finish_s"].nunique() == 1).all()
    starts = requests.groupby("sequence_id", sort=False)["start_s"].first().to_numpy()
    ends = requests.groupby("sequence_id", sort=False)["finish_s"].first().to_numpy()
    assert starts[1:].tolist() == ends[:-1].tolist()


def test_copies_with_luck_of_their_own_wait_for_each_other() -> None:
    traces = traces_of([[0] * 60] * 3, probabilities=[[0.6] * 60] * 3)
    load = {"copies": 4, "concurrency": 4}
    requests = simulate(scenario(4, batch=4, workload=load), traces).requests.to_pandas()
    batches = requests.groupby("sequence_id", sort=False)
    assert (batches["finish_s"].nunique() > 1).any(), "every copy draws for itself"
    assert batches["start_s"].first().to_numpy()[1:].tolist() == batches["finish_s"].max().to_numpy()[:-1].tolist()
    assert (batches["start_s"].nunique() == 1).all()


def test_poisson_arrivals_have_the_rate_asked_for_and_do_not_depend_on_the_policy() -> None:
    def arrivals(policy: int | None, seed: int = 0) -> np.ndarray:
        load = {"kind": "poisson", "rate_rps": 4.0, "requests": 4000}
        traces = uniform(5, output_tokens=3)
        return simulate(scenario(policy, batch=64, seed=seed, workload=load), traces).requests["arrival_s"].to_numpy()

    times = arrivals(None)
    gaps = np.diff(times)
    # Mean and standard deviation of an exponential are equal; standard errors 1/sqrt(n) and sqrt(2/n).
    assert gaps.mean() == pytest.approx(0.25, rel=3.5 / np.sqrt(4000))
    assert gaps.std() == pytest.approx(0.25, rel=3.5 * np.sqrt(2 / 4000))
    assert (arrivals(2) == times).all()
    assert (arrivals(None, seed=1) != times).any()


CSV = "id,arrival_s, prompt_tokens,output_tokens\n"


def run_file(tmp_path: Path, text: str, traces: TraceSet, **load: object) -> list[dict[str, object]]:
    (tmp_path / "a.csv").write_text(text)
    plan = scenario(2, batch=2, workload={"kind": "csv", "path": "a.csv", **load}).placed(tmp_path)
    rows: list[dict[str, object]] = simulate(plan, traces).requests.to_pylist()
    return rows


def test_arrivals_from_a_file_take_lengths_from_it_and_acceptance_from_the_nearest_recording(tmp_path: Path) -> None:
    # Recorded outputs of 4, 8 and 8 tokens.
    traces = traces_of([[3, 2, 1, 0], [7, 6, 5, 4, 3, 2, 1, 0], [0] * 8])
    text = CSV + "0,5.0,100,3\n1,0.5,7,4\n2,9,7,5\n3,9,7,8\n4,9.5,7,6\n"
    rows = run_file(tmp_path, text, traces)
    assert [row["arrival_s"] for row in rows] == [0.5, 5.0, 9.0, 9.0, 9.5]
    # 4 and 3 -> the shortest that is long enough; 5, 8 and 6 -> the two of eight tokens, in turn.
    assert [row["sequence_id"] for row in rows] == [f"request-{i}" for i in (0, 0, 1, 2, 1)]
    assert [row["output_tokens"] for row in rows] == [4, 3, 5, 8, 6]
    assert [row["prompt_tokens"] for row in rows] == [7, 100, 7, 7, 7]
    # Prefill, then a round of 2 accepted tokens. A cut replay accepts nothing beyond its end: of 5 tokens, 3 come in
    # the first round and 1 in the second, though the recorded run goes on.
    assert [(row["rounds"], row["accepted_tokens"]) for row in rows[:3]] == [(1, 2), (1, 2), (2, 3)]


def test_cut_replays_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV + "0,0,7,3\n1,0,7,4\n")
    plan = scenario(2, workload={"kind": "csv", "path": "a.csv"}).placed(tmp_path)
    assert simulate(plan, traces_of([[1, 0, 1, 0]])).summary["truncated_requests"] == 1


def test_only_the_first_rows_if_asked(tmp_path: Path) -> None:
    text = CSV + "0,5.0,100,3\n1,0.5,7,4\n2,9,7,4\n"
    assert len(run_file(tmp_path, text, traces_of([[0] * 4]), requests=2)) == 2
    with pytest.raises(ScenarioError, match=r"must hold at least 5 rows .* got 3"):
        run_file(tmp_path, text, traces_of([[0] * 4]), requests=5)


def test_every_fault_of_an_arrival_file_is_told(tmp_path: Path) -> None:
    text = CSV + "0,x,1,1\n1,-1,0,2.5\n2,1,7,4\n3,1,,4\n"
    with pytest.raises(ScenarioError) as caught:
        run_file(tmp_path, text, traces_of([[0] * 4]))
    faults = str(caught.value)
    for place, column, value in (
        ("a.csv:2", "arrival_s", "'x'"),
        ("a.csv:3", "arrival_s", "'-1'"),
        ("a.csv:3", "prompt_tokens", "'0'"),
        ("a.csv:3", "output_tokens", "'2.5'"),
        ("a.csv:5", "prompt_tokens", "''"),
    ):
        assert any(place in f and f"'{column}'" in f and f"got {value}" in f for f in faults.splitlines()), faults
    with pytest.raises(ScenarioError, match=r"column 'output_tokens': is missing; did you mean 'output_token'"):
        run_file(tmp_path, "arrival_s,prompt_tokens,output_token\n0,1,1\n", traces_of([[0] * 4]))


def test_longer_outputs_than_recorded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"must be at most 4, the longest recorded output, got 9 \(2 of 3 rows"):
        run_file(tmp_path, CSV + "0,0,1,9\n1,0,1,4\n2,0,1,5\n", traces_of([[0] * 4]))


def test_equal_lengths_take_turns(tmp_path: Path) -> None:
    text = CSV + "".join(f"{i},{i},7,2\n" for i in range(9))
    rows = run_file(tmp_path, text, traces_of([[0] * 3] * 3))
    assert set(Counter(row["sequence_id"] for row in rows).values()) == {3}
