"""The command line, driven as a user drives it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from click.testing import CliRunner, Result

import paceline

HEAVY = (
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich",
    "simpy",
    "statsmodels",
    "seaborn",
    "torch",
    "typst",
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(paceline.main, list(arguments))


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_help_imports_nothing_heavy_and_is_instant() -> None:
    code = (
        "import sys, paceline\n"
        "try: paceline.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    seconds = []
    for _ in range(3):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(code)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert min(seconds) < 1.0  # of CPU time


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["traces"],
        ["traces", "import"],
        ["simulate"],
        ["calibrate"],
        ["demo"],
        ["distill"],
        ["time-shapes"],
        ["keys"],
    ],
)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_public_names_are_what_they_say() -> None:
    for name in paceline.__all__:
        assert getattr(paceline, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = paceline.nonsense


@pytest.mark.parametrize("package", ["calibration", "simulator", "analysis", "reports"])
def test_packages_import_without_torch(package: str) -> None:
    code = (
        f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; import {package}; print('ok')"
    )
    assert python(code).stdout == "ok\n"


def test_import_arrows_point_one_way() -> None:
    for package, above in {
        "calibration": ("simulator", "analysis", "reports"),
        "simulator": ("analysis", "reports"),
        "analysis": ("reports",),
    }.items():
        code = f"import sys, {package}; print(sorted(set({above!r}) & set(sys.modules)))"
        assert python(code).stdout == "[]\n"


def test_a_missing_extra_says_which_command_brings_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import paceline\n"
        "paceline.main(['calibrate', 'smollm2-135m', '--drafter', 'exit-16', '--out', 'traces'])"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install 'paceline[calibration]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    return iid_traces(0.7, rng, sequences=6, output_tokens=40, domains=("chat", "code")).write(tmp_path / "set")


def test_traces_show_and_validate(folder: Path) -> None:
    shown = run("traces", "show", str(folder))
    assert shown.exit_code == 0, shown.output
    for word in ("verifier", "drafter", "chat", "code", "match", "greedy", "accepted/drafted", "depth 4"):
        assert word in shown.output
    checked = run("traces", "validate", str(folder))
    assert checked.exit_code == 0
    assert "keeps the contract (6 sequences, 240 positions, 0 rollouts, 0 timings)" in checked.output


def test_broken_and_missing_traces_are_one_line(folder: Path) -> None:
    (folder / "positions.parquet").write_bytes(b"PAR1")
    result = run("traces", "validate", str(folder))
    assert result.exit_code == 1
    assert "positions.parquet: not a readable Parquet file" in result.output
    assert "Traceback" not in result.output
    result = run("traces", "show", "smolm2-135m-cpu-greedy")
    assert result.exit_code == 1
    assert "did you mean 'smollm2-135m-cpu-greedy'?" in result.output


def test_a_mistyped_command_is_corrected() -> None:
    result = run("traces", "valdate", "x")
    assert result.exit_code == 2
    assert "validate" in result.output


REQUESTS = [
    {
        "id": str(i),
        "prompt_token_ids": list(range(1, 9)),
        "generated_token_ids": list(range(20, 40)),
        "acc_eagle": {"acc_len": [3, 2, 1] * 6 + [2, 1]},
        "acc_ngram": {"acc_len": [1] * 20},
    }
    for i in range(4)
]

SCENARIO = """
name = "imported"
seed = 3
[traces]
path = "traces"
[drafter]
name = "eagle"
[stopping]
policy = "fixed"
draft_tokens = 2
[engine]
max_num_seqs = 2
[workload]
kind = "closed"
concurrency = 2
"""


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    source = tmp_path / "combined_talk.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in REQUESTS))
    result = run(
        *("traces", "import", "specdecode-bench", str(source), "--out", str(tmp_path / "traces")),
        *("--verifier-cost", "0.005,0.00002,0", "--drafter-cost", "eagle=0.002,0,0,per_round"),
        *("--drafter-cost", "ngram=0.006", "--overhead", "0.001", "--cost-source", "a public table"),
    )
    assert result.exit_code == 0, result.output
    return tmp_path


def test_import_then_simulate_by_the_imported_prices(imported: Path) -> None:
    (imported / "scenario.toml").write_text(SCENARIO + "stagger_s = 0.0\n")
    result = run("simulate", str(imported / "scenario.toml"), "--out", str(imported / "run"))
    assert result.exit_code == 0, result.output
    summary = json.loads((imported / "run" / "summary.json").read_text())
    assert summary["completed"] == 4
    assert summary["total_output_tokens"] == 80
    assert {p.name for p in (imported / "run").iterdir()} == {
        "scenario.toml",
        "summary.json",
        "requests.parquet",
        "iterations.parquet",
    }
    # Two batches of two equal requests: a prefill of 16 prompt tokens, then rounds of 6 verified tokens, walked by
    # hand through acc_len 3 2 1 3 2 1 ... from position 1 on with at most 3 tokens emitted a round.
    emitted = [3, 2, 1] * 6 + [2, 1]
    t, rounds = 1, 0
    while t < 20:
        t, rounds = t + min(emitted[t], 3), rounds + 1
    prefill = 0.005 + 16 * 0.00002 + 0.001
    round_s = 0.002 + 0.005 + 6 * 0.00002 + 0.001
    assert summary["duration"] == pytest.approx(2 * (prefill + rounds * round_s), rel=1e-9)


def test_every_fault_of_a_scenario_is_told_at_once(imported: Path) -> None:
    bad = SCENARIO.replace('policy = "fixed"', 'policy = "fixd"').replace("concurrency = 2", "concurency = 2")
    (imported / "bad.toml").write_text(bad.replace("max_num_seqs = 2", "max_num_seqs = 0"))
    result = run("simulate", str(imported / "bad.toml"), "--out", str(imported / "run"))
    assert result.exit_code == 1
    for words in ("did you mean 'fixed'?", "did you mean 'concurrency'?", "max_num_seqs", "bad.toml"):
        assert words in result.output, result.output
    assert "Traceback" not in result.output
    assert not (imported / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verifier-cost", "1,2"], "must be 3 number(s)"),
        (["--verifier-cost", "1,-2,3"], "must be 3 number(s) >= 0"),
        (["--drafter-cost", "eagle=1,2,3"], "need --verifier-cost"),
        (["--verifier-cost", "1,0,0", "--drafter-cost", "eagle"], "must be NAME="),
        (["--alignment", "publishd"], "published"),
    ],
)
def test_bad_prices_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    source = tmp_path / "combined_talk.jsonl"
    source.write_text(json.dumps(REQUESTS[0]))
    result = run("traces", "import", "specdecode-bench", str(source), "--out", str(tmp_path / "t"), *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "t").exists()


@pytest.fixture
def scenarios(folder: Path) -> Path:
    """Two scenarios that differ in the policy alone, beside the traces they replay."""
    text = SCENARIO.replace('path = "traces"', 'path = "set"').replace('name = "eagle"', 'name = "drafter"')
    text = text.replace('kind = "closed"\nconcurrency = 2', 'kind = "poisson"\nrate_rps = 5.0\nrequests = 12')
    prices = '[costs.verifier]\nkind = "linear"\nbase_s = 0.01\n[costs.drafter]\nkind = "linear"\nbase_s = 0.001\n'
    (folder.parent / "a.toml").write_text(text + prices)
    plain = text.replace('policy = "fixed"\ndraft_tokens = 2', 'policy = "none"').replace("imported", "plain")
    (folder.parent / "b.toml").write_text(plain + prices)
    return folder.parent


def test_replications_give_intervals(scenarios: Path) -> None:
    out = scenarios / "several"
    result = run("simulate", str(scenarios / "a.toml"), "--replications", "3", "--workers", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads((out / "replications.json").read_text())
    assert len(found["seeds"]) == 3
    assert ".." in result.output


def test_compare_says_which_is_better(scenarios: Path) -> None:
    files = [str(scenarios / "b.toml"), str(scenarios / "a.toml")]
    result = run("compare", *files, "--replications", "3", "--workers", "1", "--out", str(scenarios / "versus"))
    assert result.exit_code == 0, result.output
    assert "better" in result.output
    assert (scenarios / "versus" / "comparison.json").is_file()


def test_a_sweep_is_resumed_from_its_store(scenarios: Path) -> None:
    arguments = ["sweep", str(scenarios / "a.toml"), "stopping.draft_tokens=1,2", "--workers", "1"]
    first = run(*arguments, "--out", str(scenarios / "cells.csv"))
    assert first.exit_code == 0, first.output
    assert "0 of 2 cells from the store" in first.output
    again = run(*arguments, "--out", str(scenarios / "cells.csv"))
    assert "2 of 2 cells from the store" in again.output
    assert len((scenarios / "cells.csv").read_text().splitlines()) == 3


def test_a_sweep_over_an_unknown_key_runs_nothing(scenarios: Path) -> None:
    result = run("sweep", str(scenarios / "a.toml"), "stopping.draft_token=1,2", "--out", str(scenarios / "c.csv"))
    assert result.exit_code == 1
    assert "did you mean" in result.output
    assert not (scenarios / "c.csv").exists()


TINY_JOB = """
verifier = "tiny"
out = "pair"
[prompts]
file = "mine.jsonl"
[decoding]
max_new_tokens = 6
[timings]
batches = [1]
new_tokens = [1]
contexts = [4]
prefill_batches = [1]
prefill_tokens = [3]
repeats = 1
[[drafter]]
kind = "early-exit"
layers = 2
[[drafter]]
kind = "suffix"
"""


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny verifier, three prompts and a job file, as the working folder."""
    from tiny import save_tiny

    save_tiny(tmp_path / "tiny")
    rows = [{"id": f"p{i}", "domain": "a", "text": f"say {i}"} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "job.toml").write_text(TINY_JOB, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_file_is_recorded_and_timed_anew(tiny_folder: Path) -> None:
    assert run("calibrate", "job.toml").exit_code == 0
    before = (tiny_folder / "pair" / "positions.parquet").read_bytes()
    (tiny_folder / "job.toml").write_text(TINY_JOB.replace("repeats = 1", "repeats = 3"), encoding="utf-8")
    result = run("calibrate", "job.toml", "--retime")
    assert result.exit_code == 0, result.output
    assert (tiny_folder / "pair" / "positions.parquet").read_bytes() == before
    shown = run("traces", "validate", "pair")
    assert "12 timings" in shown.output, shown.output  # prefill, verify and two drafters, three times


def test_the_short_way_and_a_job_file_do_not_mix(tiny_folder: Path) -> None:
    result = run("calibrate", "job.toml", "--limit", "1")
    assert result.exit_code == 2
    assert "--limit-per-domain belongs to the short way; with a job file, write it there" in result.output
    assert run("calibrate", "tiny").exit_code == 2
    assert "--drafter and --out must be given" in run("calibrate", "tiny").output


def test_a_typo_in_a_job_file_is_told_with_its_place(tiny_folder: Path) -> None:
    (tiny_folder / "job.toml").write_text(TINY_JOB.replace('"suffix"', '"sufix"'), encoding="utf-8")
    result = run("calibrate", "job.toml")
    assert result.exit_code == 1
    wanted = "Error: job.toml: drafter[1].kind: no such kind, got 'sufix'; did you mean 'suffix'?"
    assert result.output.splitlines()[0].startswith(wanted)


def test_a_student_is_distilled_and_drafts(tiny_folder: Path) -> None:
    (tiny_folder / "distill.toml").write_text(
        """
out = "made"
[verifier]
name = "tiny"
device = "cpu"
[corpus]
prompt_file = "mine.jsonl"
texts_per_domain = 8
held_out = 2
max_new_tokens = 12
[training]
tokens = 200
[[student]]
name = "small"
shape = { from_layers = [0, 3] }
""",
        encoding="utf-8",
    )
    result = run("distill", "distill.toml")
    assert result.exit_code == 0, result.output
    assert "Tokens per round" in result.output
    assert re.search(r"measured on the verifier's stored states,\s+n = [1-9]\d* held-out", result.output)
    job = TINY_JOB + '[[drafter]]\nkind = "distilled"\npath = "made/students/small"\n'
    (tiny_folder / "job.toml").write_text(job, encoding="utf-8")
    assert run("calibrate", "job.toml").exit_code == 0
    manifest = json.loads((tiny_folder / "pair" / "manifest.json").read_text(encoding="utf-8"))
    assert [d["name"] for d in manifest["drafters"]] == ["exit-2", "suffix", "small"]


def test_shapes_are_timed_and_what_is_left_is_said(tiny_folder: Path) -> None:
    grid = (
        "[[grid]]\nshapes = ['tiny']\ndtypes = ['fp32']\ngraphs = [false]\nbatches = [1, 2]\nnew_tokens = [1]\n"
        "contexts = [4]\n"
    )
    (tiny_folder / "t.toml").write_text(f"device = 'cpu'\nrepeats = 1\nbudget_s = 1e-6\n{grid}", encoding="utf-8")
    first = run("time-shapes", "t.toml", "--out", "grid")
    assert first.exit_code == 0, first.output
    assert "1 cells timed" in first.output
    assert "the budget is spent, the same command goes on" in first.output
    (tiny_folder / "t.toml").write_text(f"device = 'cpu'\nrepeats = 1\n{grid}", encoding="utf-8")
    assert "6 cells timed, 0 skipped" in run("time-shapes", "t.toml", "--out", "grid").output
