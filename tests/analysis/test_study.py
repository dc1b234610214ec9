"""The whole study: what it answers, what it refuses, and that it is the same every time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from builders import iid_traces
from drawn import clustered, given_runs

from analysis import Findings, StudySettings, study
from analysis.speedup.costfit import cost_fits
from calibration.common.errors import CostError, ReplayError, ReportError, ScenarioError
from calibration.traces import TraceSet, make_table

SMALL = StudySettings(draft_tokens=(1, 2, 4), batches=(1, 2), draws=200)


@pytest.fixture(scope="module")
def findings() -> Findings:
    return study(clustered(np.random.default_rng(1), sequences=12, tokens=40), settings=SMALL, workers=1)


def test_it_answers_from_timings(findings: Findings) -> None:
    """`lookup` drafts for nothing and accepts four tokens in seven; a step of `slow` costs most of a verify step."""
    assert findings.cost_source == "fitted"
    head = findings.answer.headline
    assert (head.drafter, head.batch, head.domain, head.pays) == ("lookup", 1, None, True)
    assert findings.answer.paying == ("lookup",)
    # At draft length 1 a round gets 1 + a tokens for (10 + 2) / (10 + 1) of a plain step and 0.1 ms.
    got = next(
        c for c in findings.speedup if (c.drafter, c.draft_tokens, c.batch, c.domain) == ("lookup", 1, 1, None)
    )
    assert got.break_even_tokens == pytest.approx((12 + 0.1) / 11, rel=0.02)


def test_it_holds_every_row(findings: Findings) -> None:
    drafters, domains, lengths, batches = 2, 4, 3, 2
    assert len(findings.acceptance) == drafters * lengths * domains
    assert len(findings.depth) == drafters * 4 * domains
    assert len(findings.speedup) == drafters * lengths * batches * domains
    assert len(findings.best) == drafters * batches * domains
    assert len(findings.crossovers) == drafters * domains
    assert len(findings.runs) == batches + drafters * lengths * batches
    assert findings.drafters == ("slow", "lookup")
    assert findings.domains == ("domain-0", "domain-1", "domain-2")
    assert findings.sizes.requests == {"domain-0": 4, "domain-1": 4, "domain-2": 4}
    assert findings.sizes.output_tokens["domain-1"] == 160
    assert findings.reference_draft_tokens == 4


def test_fits_of_exact_timings_are_exact(findings: Findings) -> None:
    fits = {(f.model, f.operation): f for f in findings.cost_fits}
    assert set(fits) == {("verifier", "prefill"), ("verifier", "verify"), ("slow", "draft"), ("lookup", "draft")}
    verify = fits["verifier", "verify"]
    assert verify.error < 0.01
    assert len(verify.points) == 30
    for point in verify.points:
        assert point.measured_s == pytest.approx(0.010 + 0.001 * point.batch * point.new_tokens)
        assert point.fitted_s == pytest.approx(point.measured_s, rel=0.02)


def test_cost_error_weights_the_held_out_errors_by_time(findings: Findings) -> None:
    fits = {f.operation: f.held_out_error for f in findings.cost_fits if f.model in ("verifier", "slow")}
    run = findings.run("slow", 4, 1)
    parts = {"prefill": run.prefill_s, "verify": run.verify_s, "draft": run.draft_s}
    if any(fits[name] is None for name in parts):
        assert run.cost_error is None
    else:
        expected = sum(parts[name] * (fits[name] or 0) for name in parts) / sum(parts.values())
        assert run.cost_error == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ReportError, match="no run of 'slow' with draft length 9 at batch 1"):
        findings.run("slow", 9, 1)


def test_json_brings_everything_back(findings: Findings) -> None:
    text = findings.to_json()
    assert Findings.from_json(text) == findings
    assert json.loads(text)["answer"]["headline"]["drafter"] == "lookup"
    assert "NaN" not in text


def test_broken_json_names_the_field(findings: Findings) -> None:
    raw = json.loads(findings.to_json())
    raw["answer"]["headline"]["batch"] = "one"
    with pytest.raises(ReportError, match=r"findings: answer\.headline\.batch: .*integer"):
        Findings.from_json(json.dumps(raw))


def test_findings_of_another_version_are_refused_as_such(findings: Findings) -> None:
    raw = json.loads(findings.to_json()) | {"schema_version": 1}
    del raw["schedules"]
    with pytest.raises(ReportError, match=r"findings: schema_version must be 2, got 1: .* make them again"):
        Findings.from_json(json.dumps(raw))


def test_same_traces_same_findings(findings: Findings) -> None:
    again = study(clustered(np.random.default_rng(1), sequences=12, tokens=40), settings=SMALL, workers=2)
    assert again.to_json() == findings.to_json()


def test_assumed_costs_are_called_so() -> None:
    costs = {"verifier": {"kind": "linear", "base_s": 1.0}, "drafter": {"kind": "linear", "base_s": 0.0}}
    traces = iid_traces(0.8, np.random.default_rng(2), sequences=10, output_tokens=60, domains=("a", "b"))
    found = study(traces, settings=dataclasses.replace(SMALL, costs=costs), workers=1)
    assert found.cost_source == "assumed"
    assert found.cost_fits == ()
    assert found.run("drafter", 2, 1).cost_error is None
    # Free drafts, verification at one price: speed-up is tokens per round but for the prefill of each request.
    best = found.answer.headline
    assert best.draft_tokens == 4
    assert best.speedup.value == pytest.approx((1 - 0.8**5) / 0.2, rel=0.15)


def test_without_any_costs_it_says_what_to_give() -> None:
    with pytest.raises(CostError, match=r"holds no timings.*give the costs table"):
        study(iid_traces(0.5, np.random.default_rng(0)), settings=SMALL, workers=1)


def test_draft_lengths_beyond_every_recording_are_refused() -> None:
    traces = given_runs([[1, 0, 1, 0, 0, 0]] * 3, cap=1)
    costs = {"verifier": {"kind": "linear", "base_s": 1.0}, "drafter": {"kind": "linear", "base_s": 0.1}}
    with pytest.raises(ReplayError, match=r"drafter 'drafter': recorded for drafts of at most 1 tokens"):
        study(traces, settings=StudySettings(draft_tokens=(2, 4), batches=(1,), costs=costs), workers=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_tokens": ()}, r"study: draft_tokens must be increasing whole numbers from 1, got \[\]"),
        ({"draft_tokens": (0, 1)}, r"got \[0, 1\]"),
        ({"batches": (4, 2)}, r"study: batches .* got \[4, 2\]"),
        ({"draws": 10}, "study: draws must be at least 100, got 10"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        StudySettings(**settings)  # type: ignore[arg-type]


def test_importing_stays_light() -> None:
    heavy = ("pandas", "scipy.stats", "seaborn", "matplotlib", "statsmodels", "torch", "typst")
    code = f"import sys, analysis, reports; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_spread_of_repeats_tells_a_noisy_machine() -> None:
    """Repeats of 1, 2, 3, 4 and 5 ms: quartiles 2 and 4, median 3."""
    traces = clustered(np.random.default_rng(1), sequences=4, tokens=10)
    columns = {name: traces.timings[name].to_pylist() for name in traces.timings.column_names}
    noisy = {name: [value for value in values for _ in range(5)] for name, values in columns.items()}
    noisy["repeat"] = list(range(5)) * len(columns["repeat"])
    noisy["seconds"] = [0.001 * (i + 1) for i in range(5)] * len(columns["repeat"])
    tables = {"sequences": traces.sequences, "positions": traces.positions, "timings": make_table("timings", noisy)}
    fits = cost_fits(TraceSet.build(traces.manifest, tables))
    assert {fit.repeat_spread for fit in fits} == {0.666667}
    assert {fit.repeat_spread for fit in cost_fits(traces)} == {None}


def test_text_that_runs_in_circles_is_noticed() -> None:
    """Of 100 tokens with a period of 20, the first 36 are new: 20 and the 16 of the first match."""
    traces = iid_traces(0.5, np.random.default_rng(1), sequences=2, output_tokens=100)
    columns = {name: traces.sequences[name].to_pylist() for name in traces.sequences.column_names}
    circling, plain = [*range(20)] * 5, [*range(100)]
    for ids, share in (([circling, plain], 0.5 * 0.64), ([plain, plain], 0.0), ([plain, None], None)):
        changed = make_table("sequences", {**columns, "output_token_ids": ids})
        again = TraceSet.build(traces.manifest, {"sequences": changed, "positions": traces.positions})
        costs = {"verifier": {"kind": "linear", "base_s": 1.0}, "drafter": {"kind": "linear", "base_s": 0.1}}
        settings = StudySettings(draft_tokens=(1,), batches=(1,), draws=100, costs=costs)
        assert study(again, settings=settings, workers=1).sizes.repetition == share
