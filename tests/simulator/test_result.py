"""Results: the folder, the bytes, and the numbers in the summary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import damages, iid_traces
from scenarios import scenario, traces_of

from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator import RunResult, load_scenario, simulate
from simulator.results.result import FILES


def traces() -> TraceSet:
    return iid_traces(0.6, np.random.default_rng(2), sequences=12, output_tokens=50, domains=("chat", "code"))


def sampled() -> TraceSet:
    rng = np.random.default_rng(2)
    return traces_of([[0] * 50] * 8, probabilities=[rng.random(50).tolist() for _ in range(8)])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", [traces, sampled])
def test_equal_seeds_give_equal_bytes(tmp_path: Path, make: Any) -> None:
    load = {"kind": "poisson", "rate_rps": 3.0, "order": "shuffled", "requests": 30}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(scenario(3, seed=seed, workload=load), make()).write(tmp_path / name)
    assert set(folder_bytes(tmp_path / "a")) == set(FILES)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert folder_bytes(tmp_path / "a")["requests.parquet"] != folder_bytes(tmp_path / "c")["requests.parquet"]


SCRIPT = """
import sys
from simulator import load_scenario, simulate
simulate(load_scenario(sys.argv[1])).write(sys.argv[2])
"""


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    sampled().write(tmp_path / "traces")
    text = scenario(3, seed=5, traces={"path": "traces"}).to_toml()
    (tmp_path / "scenario.toml").write_text(text)
    simulate(load_scenario(tmp_path / "scenario.toml")).write(tmp_path / "here")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "scenario.toml"), str(tmp_path / "there")]
    subprocess.run(command, check=True)
    assert folder_bytes(tmp_path / "here") == folder_bytes(tmp_path / "there")


def test_a_result_reads_back(tmp_path: Path) -> None:
    result = simulate(scenario(2), traces())
    result.write(tmp_path / "run")
    again = RunResult.read(tmp_path / "run")
    assert again.summary == result.summary
    assert again.requests.equals(result.requests)
    assert again.iterations.equals(result.iterations)
    assert again.scenario.hash == again.scenario_hash == result.scenario_hash == result.scenario.hash


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = simulate(scenario(2), traces())
    result.write(tmp_path / "run")
    before = folder_bytes(tmp_path / "run")
    other = simulate(scenario(1), traces())

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", interrupted)
        for target in ("run", "new"):
            with pytest.raises(KeyboardInterrupt):
                other.write(tmp_path / target)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing half-written is left"
    assert folder_bytes(tmp_path / "run") == before
    other.write(tmp_path / "run")
    assert RunResult.read(tmp_path / "run").summary == other.summary


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ScenarioError, match="must be new, empty or an older result"):
        simulate(scenario(2), traces()).write(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FILES)
def test_damaged_results_are_named(tmp_path: Path, name: str) -> None:
    simulate(scenario(2), traces()).write(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"PAR1[")
    with pytest.raises(ScenarioError, match=rf"{name}: not readable, truncated or damaged"):
        RunResult.read(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ScenarioError, match=rf"{name}: is missing"):
        RunResult.read(tmp_path / "run")


def test_the_summary_sums_up_the_tables(tmp_path: Path) -> None:
    load = {"kind": "poisson", "rate_rps": 3.0, "requests": 40}
    result = simulate(scenario(3, workload=load), traces())
    summary, requests = result.summary, result.requests.to_pandas()
    duration = requests["finish_s"].max() - requests["arrival_s"].min()
    assert summary["duration"] == pytest.approx(duration)
    assert (summary["completed"], summary["total_input_tokens"]) == (40, 40 * 50)
    assert summary["output_throughput"] == pytest.approx(40 * 50 / duration)
    assert summary["total_token_throughput"] == pytest.approx(2 * 40 * 50 / duration)
    assert summary["request_throughput"] == pytest.approx(40 / duration)
    end_to_end = requests["finish_s"] - requests["arrival_s"]
    ttft = requests["first_token_s"] - requests["arrival_s"]
    tpot = (end_to_end - ttft) / (requests["output_tokens"] - 1)
    for name, values in (("ttft", ttft), ("tpot", tpot), ("e2el", end_to_end)):
        assert summary[f"mean_{name}_ms"] == pytest.approx(1000 * values.mean())
        assert summary[f"median_{name}_ms"] == pytest.approx(1000 * values.median())
        assert summary[f"std_{name}_ms"] == pytest.approx(1000 * values.std(ddof=0))
        assert summary[f"p95_{name}_ms"] == pytest.approx(1000 * values.quantile(0.95))
    # A gap for every round of every request; the gaps of one request add up to its time after the first token.
    assert summary["mean_itl_ms"] == pytest.approx(1000 * (end_to_end - ttft).sum() / requests["rounds"].sum())
    drafted, accepted = requests["drafted_tokens"].sum(), requests["accepted_tokens"].sum()
    drafts = requests["rounds"].sum()
    assert summary["spec_decode_num_drafts"] == drafts
    assert summary["spec_decode_draft_tokens"] == drafted == 3 * drafts
    assert summary["spec_decode_acceptance_rate"] == pytest.approx(100 * accepted / drafted)
    assert summary["spec_decode_acceptance_length"] == pytest.approx(1 + accepted / drafts)
    rates = summary["spec_decode_per_position_acceptance_rates"]
    assert len(rates) == 3
    assert rates == sorted(rates, reverse=True)
    assert sum(rates) == pytest.approx(accepted / drafts), "unconditional rates add up to the accepted tokens"


def test_acceptance_by_position_is_unconditional() -> None:
    # Rounds at t = 1, 4 and 6: 2, 1 and 0 of two drafted tokens are accepted.
    result = simulate(scenario(2), traces_of([[0, 2, 1, 0, 1, 0, 0]]))
    assert result.summary["spec_decode_per_position_acceptance_rates"] == pytest.approx([2 / 3, 1 / 3])


def test_what_was_not_done_is_absent() -> None:
    summary = simulate(scenario(None), traces()).summary
    assert not [key for key in summary if key.startswith("spec_decode")]
    assert summary["draft_s"] == 0
    assert "draft" not in summary["costs"]


def test_a_summary_says_where_its_numbers_come_from() -> None:
    summary = simulate(scenario(2, seed=4), traces()).summary
    assert summary["seed"] == 4
    assert summary["paceline_version"]
    provenance = summary["provenance"]
    assert provenance["results"] == "simulated"
    assert provenance["acceptance"] == "imported: drawn for a test"
    assert provenance["costs"] == "stated linear constants"
    assert provenance["replay"] == "exact (recorded run lengths)"
    assert (provenance["verifier"], provenance["drafter"]) == ("verifier", "drafter")
    assert json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("name", FILES)
def test_every_damaged_file_of_a_result_is_refused(tmp_path: Path, name: str) -> None:
    folder, rng = simulate(scenario(2), traces()).write(tmp_path / "run"), np.random.default_rng(7)
    path = folder / name
    whole = path.read_bytes()
    for damaged in damages(whole, rng, 40):
        path.write_bytes(damaged)
        if name == "summary.json" and b'"files_sha256"' not in damaged and damaged.count(b"\n") == whole.count(b"\n"):
            continue  # the key that vouches is gone: nothing can be told
        with pytest.raises(ScenarioError, match=r": not readable, truncated or damaged"):
            RunResult.read(folder)


def test_an_edited_summary_is_refused(tmp_path: Path) -> None:
    folder = simulate(scenario(2), traces()).write(tmp_path / "run")
    told = json.loads((folder / "summary.json").read_text())
    told["output_throughput"] *= 2
    for indent, said in ((None, "edited since it was written"), (2, "says another sha256")):
        (folder / "summary.json").write_text(json.dumps(told, indent=indent, ensure_ascii=False) + "\n")
        with pytest.raises(ScenarioError, match=rf"summary\.json: .*{said}"):
            RunResult.read(folder)


def test_results_that_state_no_sha256_are_read(tmp_path: Path) -> None:
    result = simulate(scenario(2), traces())
    path = result.write(tmp_path / "run") / "summary.json"
    told = json.loads(path.read_text())
    assert set(told.pop("files_sha256")) == set(FILES)
    path.write_text(json.dumps(told))
    assert RunResult.read(tmp_path / "run").summary == result.summary
