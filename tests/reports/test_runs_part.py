"""Results of simulations as parts: what is shown is what the files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from capacity_made import made_capacity
from fidelity_made import made_fidelity
from part_page import written_from_python
from pypdf import PdfReader
from scenarios import scenario

from calibration.common.errors import ReportError
from calibration.traces import TraceSet
from reports.page.document import Part, Table
from reports.page.inputs import Summed
from reports.questions.runs import QUANTITIES, comparison_part, replications_part, run_part
from reports.writing.collect import Answered, Answers
from reports.writing.report import write_answers, write_report
from simulator import Scenario, compare, replicate, simulate


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    return iid_traces(0.8, np.random.default_rng(1), sequences=6, output_tokens=20)


def plan(draft_tokens: int | None, **more: Any) -> Scenario:
    load = {"kind": "poisson", "rate_rps": 2.0, "requests": 12}
    name = "plain" if draft_tokens is None else f"draft {draft_tokens}"
    return scenario(draft_tokens, workload=load, name=name, **more)


def rows(part: Part) -> dict[str, tuple[str, ...]]:
    """Rows of all tables of a part by their first cell."""
    tables = [block for block in part.blocks if isinstance(block, Table)]
    return {row[0]: row[1:] for table in tables for row in table.rows}


def test_a_run_shows_its_summary_without_intervals(traces: TraceSet) -> None:
    result = simulate(plan(3, slo={"ttft_ms": 1e6}), traces)
    part = run_part(result, "tuesday")
    shown = rows(part)
    assert float(shown["Output tokens per second"][0]) == pytest.approx(result.summary["output_throughput"], rel=1e-3)
    assert shown["Share of requests within the objectives"] == ("1",)
    assert "USD per million output tokens" not in shown
    assert "no interval" in part.answer.text
    assert part.answer.lead == "tuesday."


def test_replications_show_means_with_intervals(traces: TraceSet) -> None:
    several = replicate(plan(3), 3, traces, workers=1)
    part = replications_part(Summed(several.to_dict(), (several.scenario,)), "week")
    mean = several.estimates["output_throughput"]
    assert rows(part)["Output tokens per second"][0] == f"{mean.mean:.3g} ({mean.low:.3g}\u2013{mean.high:.3g})"
    assert "over 3 replications" in part.answer.text


def test_a_comparison_shows_paired_ratios_and_their_verdicts(traces: TraceSet, tmp_path: Path) -> None:
    found = compare(plan(None), plan(3), plan(1), replications=3, traces=traces, workers=1)
    part = comparison_part(Summed(found.to_dict(), ()), "versus")
    contrast = found.contrasts[0]["mean_tpot_ms"]
    assert contrast.ratio is not None
    assert f"draft 3 has {found.contrasts[0]['output_throughput'].ratio.mean:.3g}" in part.answer.text  # type: ignore[union-attr]
    (drawing,) = part.drawings
    drawn = {(row["scenario"], row["number"]): row["ratio"] for row in drawing.data}
    assert drawn["draft 3", "mean_tpot_ms"] == contrast.ratio.mean
    assert {scenario for scenario, _ in drawn} == {"draft 3", "draft 1"}
    assert {number for _, number in drawn} <= set(QUANTITIES)
    answers = Answers("2026-01-01", None, (Answered("comparison-versus", part, None),), ())
    path = write_answers(answers, ("versus",), answers.created, tmp_path / "report.pdf")
    text = "".join(page.extract_text() for page in PdfReader(path).pages)
    assert contrast.verdict in text


def test_write_report_takes_a_run_several_and_nothing_else(traces: TraceSet, tmp_path: Path) -> None:
    run = simulate(plan(3), traces)
    both = written_from_python([made_capacity(), run, run, made_fidelity()], tmp_path)
    for title in ("Capacity plan", "Run: draft 3", "Predicted against measured"):
        assert title in both
    with pytest.raises(ReportError, match=r"must be one of Findings, SizeFindings, .*, or a list of them, got int"):
        write_report(3, tmp_path / "no.pdf")
    assert not (tmp_path / "no.pdf").exists()
