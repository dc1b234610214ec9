"""`paceline report`, driven as a user drives it, on results that are quick to plan for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import iid_traces
from click.testing import CliRunner, Result
from pypdf import PdfReader
from scenarios import scenario

import paceline
from simulator import simulate


def run(*arguments: str) -> Result:
    return CliRunner().invoke(paceline.main, ["report", *arguments])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of a scenario with objectives and a price, whose requests have four tokens."""
    root = tmp_path_factory.mktemp("results")
    iid_traces(0.8, np.random.default_rng(1), sequences=8, output_tokens=4, prompt_tokens=3).write(root / "set")
    plan = scenario(
        2,
        batch=2,
        workload={"kind": "poisson", "rate_rps": 2.0, "requests": 12},
        traces={"path": "set"},
        slo={"ttft_ms": 400.0},
        name="two tokens",
    ).placed(root)
    return simulate(plan).write(root / "run")


def test_a_result_is_planned_for_and_its_files_lie_beside_the_pdf(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.pdf"
    options = ("--template", "capacity", "--load-rps", "100", "--price-per-hour", "2", "--workers", "1")
    found = run(str(result), "--out", str(out), *options)
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    for said in ("Answered", "Capacity.", "TTFT of at most 400 ms", "A load of 100 requests per second needs"):
        assert said in words.replace("│ ", "").replace("  ", " "), words
    assert found.output.rstrip().endswith("plan.pdf")
    assert "not answered" not in found.output
    plan = json.loads((tmp_path / "plan-figures" / "capacity.json").read_text(encoding="utf-8"))
    assert [one["policy"] for one in plan["policies"]] == ["no speculation", "two tokens"]
    assert plan["usd_per_device_hour"] == 2.0
    assert plan["objective"]["source"] == "stated"
    assert len(plan["trials"]) >= 2
    assert (tmp_path / "plan-figures" / "capacity.csv").is_file()
    assert len(PdfReader(out).pages) >= 2


def test_a_brief_names_what_it_cannot_answer_and_takes_objectives(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reports.writing.collect
    from calibration.common.errors import ReportError

    def quick(*_: object) -> None:
        raise ReportError("left out of this test")

    monkeypatch.setattr(reports.writing.collect, "_bundled_cascade", quick)
    monkeypatch.setattr(reports.writing.collect, "_bundled_fidelity", quick)
    monkeypatch.setattr("paceline.commands.study.STUDY_REQUESTS", 40)
    options = ("--template", "brief", "--ttft-ms", "900", "--workers", "1")
    found = run(str(result), "--out", str(tmp_path / "short"), *options)
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    assert "not answered: Drafter size, because there is no TraceSet among the inputs" in words
    plan = json.loads((tmp_path / "short" / "capacity.json").read_text(encoding="utf-8"))
    assert plan["objective"]["ttft_ms"] == 900.0
    assert plan["requests_per_run"] == 40
    assert len(PdfReader(tmp_path / "short" / "report.pdf").pages) <= 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 1, "nowhere: no such folder or bundled TraceSet"),
        ([], 2, "Missing argument 'RUN...'"),
        (["smollm2-135m-cpu-greedy", "--template", "breif"], 2, "'breif' is not one of"),
        (["smollm2-135m-cpu-greedy", "--load-rps", "0"], 2, "0.0 is not in the range"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    found = run(*arguments, "--out", str(tmp_path / "x"))
    assert found.exit_code == code
    assert words in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "x").exists()
