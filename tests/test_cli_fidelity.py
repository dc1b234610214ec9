"""`paceline observe`, `paceline validate` and the imports, driven as a user drives them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from click.testing import CliRunner, Result
from measured_made import condition, made_traces, measure
from openai_server import OpenAIServer
from pypdf import PdfReader
from tiny import save_tiny

import paceline
from calibration.common.toml import dumps
from calibration.measured import MeasuredRun
from calibration.traces import TraceSet

FREE = {"kind": "linear", "base_s": 0.0, "charged": "per_round"}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(paceline.main, [str(one) for one in arguments])


# --- validate


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    traces, source = made_traces(sequences=8), root / "made-cpu"
    traces.write(source / "traces")
    costs = {"verifier": {"kind": "observed", "runs": ["../plain-1", "../plain-4"]}}
    for batch in (1, 4):
        measure(source / f"plain-{batch}", traces, condition(batch, costs=costs), role="fit")
        measure(source / f"lookup-{batch}", traces, condition(batch, 3, costs=costs))
    return root


def test_validate_writes_report_table_and_page(measured: Path, tmp_path: Path) -> None:
    done = run("validate", measured, "--out", tmp_path / "out", "--page", tmp_path / "page.md")
    assert done.exit_code == 0, done.output
    assert "Predicted against measured" in done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.pdf", "figures", "fidelity.json", "conditions.csv"}
    assert len(PdfReader(tmp_path / "out" / "report.pdf").pages) >= 3
    assert "| lookup-4 | held-out |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    told = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))
    assert {one["role"] for one in told["conditions"]} == {"fit", "held-out"}


def test_validate_says_acceptance_first(measured: Path, tmp_path: Path) -> None:
    done = run("validate", measured, "--out", tmp_path)
    assert done.stdout.splitlines()[0].startswith("Acceptance: counts agree within 10%, or within chance, in 2 of 2")
    said = done.stdout
    assert said.index("predicted / counted by the engine") < said.index("errors over held-out") < said.index("Whose")
    page = " ".join(PdfReader(tmp_path / "report.pdf").pages[0].extract_text().split())
    assert "Throughput under speculation" in page
    assert "Acceptance: counts agree" in page


def test_drafts_that_were_not_made_are_the_first_line(tmp_path: Path) -> None:
    """The engine drafted from one recording; the prediction beside it replays another, with many more drafts."""
    traces, source = made_traces(sequences=8), tmp_path / "runs" / "made"
    data = condition(1, 3, costs={"verifier": {"kind": "linear", "base_s": 0.02}, "drafter": FREE})
    at = traces.positions.schema.get_field_index("proposal_length")
    none = pc.multiply(traces.positions["proposal_length"], pa.scalar(0, pa.int32()))
    rare = pc.if_else(pc.equal(pc.bit_wise_and(traces.positions["position"], 7), 0), traces.positions[at], none)
    runs = pc.min_element_wise(traces.positions["run_length"], rare)
    table = traces.positions.set_column(at, traces.positions.schema.field(at), rare.cast(pa.int32()))
    table = table.set_column(table.schema.get_field_index("run_length"), table.schema.field("run_length"), runs)
    engine = TraceSet.build(traces.manifest, {"sequences": traces.sequences, "positions": table})
    engine.write(source / "traces")
    measured_run = measure(source / "run", engine, data)
    traces.write(source / "own")
    (source / "run" / "scenario.toml").write_text(dumps(data | {"traces": {"path": "../own"}}), encoding="utf-8")
    done = run("validate", tmp_path / "runs", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    counted = sum(measured_run.requests["drafts"].to_pylist())
    first = done.stdout.splitlines()[0]
    assert re.match(rf"drafts: \d+ predicted, {counted} counted; drafted tokens: ", first)
    assert first.endswith("(made: run)")
    page = " ".join(PdfReader(tmp_path / "out" / "report.pdf").pages[0].extract_text().split())
    assert re.search(rf"Answer\. drafts: \d+ predicted, {counted} counted", page)
    rows = (tmp_path / "out" / "conditions.csv").read_text(encoding="utf-8").splitlines()
    assert ",drafts," in rows[1]


def test_without_speculation_none_is_claimed(tmp_path: Path) -> None:
    traces, source = made_traces(sequences=8), tmp_path / "runs" / "made"
    traces.write(source / "traces")
    costs = {"verifier": {"kind": "observed", "runs": ["../plain-1"]}}
    measure(source / "plain-1", traces, condition(1, costs=costs), role="fit")
    measure(source / "plain-2", traces, condition(2, costs=costs))
    done = run("validate", tmp_path / "runs", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    first = done.stdout.splitlines()[0]
    assert first == "Acceptance: no condition ran under speculation, so there are no drafts to compare."
    page = " ".join(PdfReader(tmp_path / "out" / "report.pdf").pages[0].extract_text().split())
    assert "Throughput without speculation is predicted within" in page
    assert "Throughput under speculation" not in page
    assert "engines do under speculation" not in page


def test_validate_says_what_is_missing(tmp_path: Path) -> None:
    done = run("validate", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "no measured run below it" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


# --- observe


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its TraceSet, and a job that recorded it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model")
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"id": text, "domain": "chat", "text": text}) + "\n"
            for text in ("one two one", "abc abc", "so")
        ),
        encoding="utf-8",
    )
    job = {
        "verifier": "model",
        "out": "traces",
        "model": {"device": "cpu", "dtype": "float32"},
        "prompts": {"file": "prompts.jsonl"},
        "decoding": {"max_new_tokens": 12},
        "record": {"rollout_stride": 0},
        "timings": {"skip": True},
        "drafter": [{"kind": "prompt-lookup"}, {"kind": "early-exit", "layers": 2}],
    }
    (folder / "job.toml").write_text(dumps(job), encoding="utf-8")
    done = run("calibrate", folder / "job.toml", "--out", folder / "traces")
    assert done.exit_code == 0, done.output
    return folder


def scenario(folder: Path, name: str, **tables: object) -> Path:
    path = folder / f"{name}.toml"
    whole = {"name": name, "traces": {"path": "traces"}, "engine": {"max_num_seqs": 2}}
    whole |= {"workload": {"kind": "closed", "concurrency": 2}} | tables
    path.write_text(dumps(whole), encoding="utf-8")
    return path


def test_observe_runs_scenarios_on_an_engine_and_validate_reads_them(recorded: Path, tmp_path: Path) -> None:
    plain = scenario(recorded, "plain")
    drafting = {"drafter": {"name": "exit-2"}, "stopping": {"policy": "fixed", "draft_tokens": 2}}
    exit_2 = scenario(recorded, "exit", **drafting)
    seen = scenario(recorded, "seen", **drafting, workload={"kind": "closed", "concurrency": 1})
    out = tmp_path / "runs" / "own"
    command = ["observe", "--engine", "own", "--job", recorded / "job.toml", "--fit", plain, "--fit", seen]
    command += ["--scenario", exit_2]
    done = run(*command, "--out", out, "--repeats", "2")
    assert done.exit_code == 0, done.output
    run_ = MeasuredRun.read(out / "exit")
    assert (run_.manifest.role, run_.manifest.repeats, run_.manifest.clock) == ("held-out", 2, "thread-cpu")
    assert sum(run_.requests["drafted_tokens"].to_pylist()) > 0
    assert run(*command, "--out", out, "--repeats", "2").exit_code == 0  # all of it is there: nothing is run again
    found = run("validate", tmp_path / "runs", "--out", tmp_path / "validation")
    assert found.exit_code == 0, found.output


def test_observe_drives_a_server(recorded: Path, tmp_path: Path) -> None:
    plain = scenario(recorded, "plain")
    with OpenAIServer() as server:
        done = run("observe", "--url", server.url, "--fit", plain, "--out", tmp_path, "--repeats", "1")
    assert done.exit_code == 0, done.output
    seen = MeasuredRun.read(tmp_path / "plain")
    assert seen.manifest.clock == "wall"
    assert seen.steps.num_rows == 0
    assert sum(seen.requests["output_tokens"].to_pylist()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "own"], "at least one --scenario"),
        (["--scenario", "S"], "--url or --engine"),
        (["--scenario", "S", "--engine", "own"], "needs --job"),
        (["--scenario", "S", "--engine", "vllm"], "'own', 'openvino'"),
    ],
)
def test_observe_says_what_to_give(recorded: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    plain = scenario(recorded, "plain")
    given = [str(plain) if one == "S" else one for one in arguments]
    done = run("observe", *given, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.output


def test_observe_names_a_policy_that_no_engine_runs(recorded: Path, tmp_path: Path) -> None:
    oracle = scenario(recorded, "oracle", drafter={"name": "exit-2"}, stopping={"policy": "oracle"})
    done = run("observe", "--engine", "own", "--job", recorded / "job.toml", "--scenario", oracle, "--out", tmp_path)
    assert done.exit_code == 1
    assert "none, fixed or by_batch" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_is_one_line(recorded: Path, tmp_path: Path) -> None:
    plain = scenario(recorded, "plain")
    done = run("observe", "--url", "http://127.0.0.1:9", "--scenario", plain, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "http://127.0.0.1:9" in done.output
    assert "Traceback" not in done.output


# --- imports


def test_a_measured_run_becomes_a_traceset(recorded: Path, tmp_path: Path) -> None:
    plain = scenario(recorded, "plain")
    job = recorded / "job.toml"
    assert run("observe", "--engine", "own", "--job", job, "--fit", plain, "--out", tmp_path).exit_code == 0
    done = run(
        "traces",
        "import",
        "measured-run",
        tmp_path / "plain",
        "--prompts",
        recorded / "traces",
        "--out",
        tmp_path / "t",
    )
    assert done.exit_code == 0, done.output
    assert run("traces", "validate", tmp_path / "t").exit_code == 0


def test_counters_become_a_traceset_that_says_it_is_made_up(tmp_path: Path) -> None:
    page = tmp_path / "metrics.txt"
    page.write_text(
        "vllm:spec_decode_num_drafts_total 1000\nvllm:spec_decode_num_draft_tokens_total 3000\n"
        "vllm:spec_decode_num_accepted_tokens_total 1400\n"
        + "".join(
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}} {count}\n'
            for i, count in enumerate((800, 400, 200))
        ),
        encoding="utf-8",
    )
    done = run("traces", "import", "vllm-counters", page, "--out", tmp_path / "t", "--lengths", "10,500,2400")
    assert done.exit_code == 0, done.output
    assert "MADE UP" in done.output
    wrong = run("traces", "import", "vllm-counters", page, "--out", tmp_path / "u", "--lengths", "ten")
    assert wrong.exit_code == 2
    assert "--lengths" in wrong.output
