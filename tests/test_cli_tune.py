"""``paceline tune``, driven as a user drives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from analysis.common.records import from_json
from analysis.tuning import TuneFindings
from analysis.tuning.engine_schemas import VllmSpeculativeConfig
from paceline.commands.tune import tune
from paceline.terminal.progress import Failsafe

SCENARIO = """
name = "chat"

[traces]
bundled = "smollm2-135m-cpu-greedy"
domains = ["chat", "code"]

[workload]
kind = "closed"
concurrency = 2
requests = 4
"""
QUICK = ("--drafters", "prompt-lookup", "--draft-tokens", "2,4", "--replications", "2", "--workers", "1")


def run(*arguments: str) -> Result:
    main = Failsafe("paceline", commands={"tune": tune})
    return CliRunner().invoke(main, ["tune", *arguments])


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "chat.toml"
    path.write_text(SCENARIO)
    return path


def test_a_search_from_scenario_to_folder(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(str(scenario), *QUICK, "--out", str(out), "--export", "vllm", "--export", "sglang")
    assert done.exit_code == 0, done.output
    assert "best" in done.output
    assert "output tokens/s" in done.output
    assert "stands on: acceptance " in done.output
    assert done.output.splitlines()[-1] == str(out)
    findings = from_json(TuneFindings, (out / "tune.json").read_text(), "tune.json")
    assert findings.plan.chosen_by == "user"
    assert [one.engine for one in findings.exports] == ["vllm", "sglang"]
    VllmSpeculativeConfig.model_validate(json.loads((out / "vllm.json").read_text()))
    for name in ("candidates.csv", "best.toml", "sglang.yaml"):
        assert (out / name).stat().st_size > 0
    for name in ("tuning-sensitivity", "tuning-contenders", "tuning-batches"):
        assert (out / f"{name}.svg").read_text().lstrip().startswith("<?xml")
        assert len((out / f"{name}.csv").read_text().splitlines()) > 1
    again = run(str(scenario), *QUICK, "--out", str(out), "--slo", "e2el_ms=1e9", "--objective", "goodput")
    assert again.exit_code == 0, again.output
    assert not (out / "vllm.json").exists()  # the older result is replaced as a whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--objective", "throughputs"), "got 'throughputs'; did you mean 'throughput'?"),
        (("--slo", "ttft=500"), "--slo: no such limit, got 'ttft'; did you mean 'ttft_ms'?"),
        (("--drafters", "promt-lookup"), "got 'promt-lookup'; did you mean 'prompt-lookup'?"),
        (("--export", "vlm"), "--export: no such engine, got 'vlm'; did you mean 'vllm'?"),
        (("--export", "vllm", "--drafters", "skip-13-17"), "drafters only, got layer-skip"),
        (("--draft-tokens", "1;2"), "--draft-tokens: must be whole numbers like 1,2,4, got '1;2'"),
        (("--objective", "cost"), "--objective cost: needs a price, e.g. --price-per-hour 2.5"),
        (("--drafter-model", "exit-61=x"), "--drafter-model: no such drafter, got 'exit-61'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    scenario: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    done = run(str(scenario), "--out", str(out), *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert not out.exists()


def test_a_typo_in_an_option_and_in_the_file(scenario: Path) -> None:
    assert "--objective" in run(str(scenario), "--objectiv", "cost").output
    scenario.write_text(SCENARIO.replace("concurrency", "concurency"))
    done = run(str(scenario))
    assert done.exit_code == 1
    assert "did you mean 'concurrency'?" in done.output


def test_a_folder_with_other_files_is_refused_before_the_search(scenario: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    done = run(str(scenario), "--out", str(tmp_path / "mine"))
    assert done.exit_code == 1
    assert "must be new, empty or an older result with tune.json" in done.output
    assert "fixed lengths" not in done.output


def test_ctrl_c_leaves_nothing(scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import analysis.tuning.runs as runs

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_one", stop)
    done = run(str(scenario), *QUICK, "--out", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert "nothing was left half-written" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["chat.toml"]
