"""What a result stands on: grades in summaries, terminal and on page one; who names the verifier; limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graded import from_answers, from_counters
from pypdf import PdfReader

from analysis.capacity import plan_capacity
from analysis.speedup.findings import StudySettings
from analysis.speedup.study import study
from calibration.traces import TraceSet, bundled
from calibration.traces.grades import PER_ROUND, RECORDED, SYNTHESISED
from paceline.terminal.runs import caption
from reports.page.document import CLOSING, evidence_line
from reports.writing.report import write_report
from simulator import Scenario, compare, simulate
from simulator.results.evidence import Evidence, lowest_told, served, verifier_on

ROOFLINE = {"kind": "roofline", "model": "llama-3.1-8b", "device": "h100-sxm"}
CHEAP = {"kind": "linear", "base_s": 1e-3}
MADE_UP = {"verifier": ROOFLINE, "drafter": CHEAP}


def scenario(drafter: str, draft_tokens: int = 3, **more: Any) -> Scenario:
    stopping = {"policy": "fixed", "draft_tokens": draft_tokens} if draft_tokens else {"policy": "none"}
    whole = {
        "name": "evidence",
        "traces": {"path": "."},
        "drafter": {"name": drafter},
        "stopping": stopping,
        "workload": {"kind": "closed", "concurrency": 2, "requests": 12},
    }
    return Scenario.model_validate(whole | more)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TraceSet]:
    folder = tmp_path_factory.mktemp("graded")
    return {PER_ROUND: from_answers(folder), SYNTHESISED: from_counters(folder)}


def page_one(path: Path) -> str:
    """The text of the first page, spaces and soft hyphens evened out."""
    text = PdfReader(path).pages[0].extract_text()
    return " ".join(text.replace("\u00ad\n", "").replace("-\n", "-").split())


# --- summaries


def test_a_recorded_run_says_so() -> None:
    told = simulate(scenario("prompt-lookup"), bundled("smollm2-135m-cpu-greedy")).summary["provenance"]
    assert told["acceptance_grade"] == RECORDED
    assert told["step_time_grade"] == "measured here"
    assert told["replay"] == "exact (recorded run lengths)"
    assert (told["verifier"], "named_by_costs" in told) == ("smollm2-135m", False)


def test_imports_say_what_they_are(imported: dict[str, TraceSet]) -> None:
    rounds = simulate(scenario("small", costs=MADE_UP), imported[PER_ROUND]).summary["provenance"]
    made_up = simulate(scenario("drafter", costs=MADE_UP), imported[SYNTHESISED]).summary["provenance"]
    assert (rounds["acceptance_grade"], made_up["acceptance_grade"]) == (PER_ROUND, SYNTHESISED)
    assert "recorded run lengths" not in rounds["replay"] + made_up["replay"]
    assert made_up["replay"].startswith("in mean only (exact replay of synthesised rounds)")
    assert made_up["step_time_grade"] == "stated constants"
    assert made_up["step_time_grades"] == {"verifier": "fitted roofline", "drafter": "stated constants"}


def test_the_lowest_of_the_step_times_counts(imported: dict[str, TraceSet]) -> None:
    plain = simulate(scenario("drafter", 0, costs={"verifier": ROOFLINE}), imported[SYNTHESISED]).summary
    assert plain["provenance"]["step_time_grade"] == "fitted roofline"
    hosted = simulate(scenario("drafter", 0, costs={"verifier": ROOFLINE, "overhead_s": 1e-3}), imported[SYNTHESISED])
    assert hosted.summary["provenance"]["step_time_grades"]["host overhead"] == "stated constants"
    assert hosted.summary["provenance"]["step_time_grade"] == "stated constants"


def test_a_fleet_has_the_grade_of_its_lowest_replica(imported: dict[str, TraceSet], tmp_path: Path) -> None:
    source = imported[PER_ROUND]
    worse = source.manifest.model_copy(update={"import_grain": "aggregate"})
    tables = {"sequences": source.sequences, "positions": source.positions}
    TraceSet.build(worse, tables).write(tmp_path / "worse")
    replicas = [{"name": "a"}, {"name": "b", "traces": {"path": str(tmp_path / "worse")}}]
    told = simulate(scenario("small", costs=MADE_UP, replica=replicas), source).summary["provenance"]
    assert told["acceptance_grade"] == SYNTHESISED
    assert "synthesised rounds" in told["replay"]


def test_costs_name_what_an_import_does_not(imported: dict[str, TraceSet]) -> None:
    told = simulate(scenario("drafter", costs=MADE_UP), imported[SYNTHESISED]).summary["provenance"]
    assert (told["verifier"], told["device"]) == ("llama-3.1-8b", "h100-sxm")
    assert told["named_by_costs"] == ["verifier", "device"]
    assert verifier_on(told) == "llama-3.1-8b on h100-sxm (named by the scenario's costs)"
    half = simulate(scenario("small", costs=MADE_UP), imported[PER_ROUND]).summary["provenance"]
    assert half["named_by_costs"] == ["device"]
    assert verifier_on(half) == "verifier-8b on h100-sxm (named by the scenario's costs)"
    assert half["costs_of"] == "llama-3.1-8b on h100-sxm"
    bare = simulate(scenario("drafter", costs={"verifier": CHEAP, "drafter": CHEAP}), imported[SYNTHESISED])
    assert verifier_on(bare.summary["provenance"]) == "unknown on unknown"  # nobody names it


def test_what_is_recorded_keeps_its_name_and_says_whose_prices_it_has() -> None:
    manifest = bundled("smollm2-135m-cpu-greedy").manifest
    roofline = dict(ROOFLINE, model="llama-3.1-70b", tensor_parallel=4)
    told = served(scenario("prompt-lookup", costs={"verifier": roofline, "drafter": CHEAP}), manifest)
    assert told["verifier"] == "smollm2-135m"
    assert told["costs_of"] == "llama-3.1-70b on 4 x h100-sxm"
    assert "costs_of" not in served(scenario("prompt-lookup"), manifest)


# --- terminal


def test_the_terminal_names_both_grades(imported: dict[str, TraceSet]) -> None:
    made_up = simulate(scenario("drafter", costs=MADE_UP), imported[SYNTHESISED]).summary
    recorded = simulate(scenario("prompt-lookup"), bundled("smollm2-135m-cpu-greedy")).summary
    told = caption(made_up)
    assert "acceptance synthesised from aggregates (imported: vllm prometheus counters" in told
    assert "(stated constants: verifier fitted roofline, drafter stated constants)" in told
    assert "recorded run lengths" not in told
    assert "acceptance recorded, replay exact (recorded run lengths)" in caption(recorded)
    assert "(measured here)" in caption(recorded)
    both = caption(recorded, made_up)  # no better than the lowest
    assert "acceptance synthesised from aggregates" in both
    assert "acceptance recorded" not in both


def test_comparisons_have_the_lowest_grade(imported: dict[str, TraceSet]) -> None:
    load = {"kind": "poisson", "rate_rps": 2.0, "requests": 12}
    several = [scenario("drafter", k, name=f"draft {k}", workload=load, costs=MADE_UP) for k in (0, 3)]
    told = compare(*several, replications=2, traces=imported[SYNTHESISED], workers=1).to_dict()["provenance"]
    assert lowest_told(told.values())["acceptance_grade"] == SYNTHESISED
    assert lowest_told(told.values())["step_time_grade"] == "stated constants"


def test_results_of_before_state_no_grade_of_step_times() -> None:
    old = {"acceptance": "imported: vllm log lines (synthesised from aggregates)", "verifier": "v", "device": "d"}
    evidence = Evidence.of([old])
    assert (evidence.acceptance, evidence.step_times, evidence.steps) == (SYNTHESISED, None, "grade not stated")


# --- page one


def test_page_one_tells_recorded_from_imported_from_synthesised(
    imported: dict[str, TraceSet], tmp_path: Path
) -> None:
    runs = {
        RECORDED: simulate(scenario("prompt-lookup"), bundled("smollm2-135m-cpu-greedy")),
        PER_ROUND: simulate(scenario("small", costs=MADE_UP), imported[PER_ROUND]),
        SYNTHESISED: simulate(scenario("drafter", costs=MADE_UP), imported[SYNTHESISED]),
    }
    for number, (grade, run) in enumerate(runs.items()):
        page = page_one(write_report(run, tmp_path / f"{number}.pdf"))
        assert f"acceptance {grade}" in page
        assert not [other for other in runs if other != grade and f"acceptance {other}" in page]
        assert CLOSING.split()[-1] in page
        assert "unknown on unknown" not in page
        assert "step times" in page


def test_a_study_of_counters_says_so_on_page_one_and_in_its_limits(
    imported: dict[str, TraceSet], tmp_path: Path
) -> None:
    settings = StudySettings(draft_tokens=(1, 3), batches=(1, 2), draws=100, costs=MADE_UP)
    findings = study(imported[SYNTHESISED], settings=settings, workers=1)
    path = write_report(findings, tmp_path / "study.pdf")
    page = page_one(path)
    assert "acceptance synthesised from aggregates" in page
    assert "llama-3.1-8b on h100-sxm (named by the scenario's costs)" in page
    assert "unknown on unknown" not in page
    assert "imported drafter" in page
    assert "recorded drafter" not in page
    whole = " ".join(" ".join(one.extract_text() for one in PdfReader(path).pages).split())
    assert "no round was measured" in whole
    assert "Greedy replay is exact: acceptance is that of the live pair" not in whole
    assert "[synthesised" in whole


def test_several_results_are_told_apart(imported: dict[str, TraceSet], tmp_path: Path) -> None:
    recorded = simulate(scenario("prompt-lookup"), bundled("smollm2-135m-cpu-greedy"))
    made_up = simulate(scenario("drafter", costs=MADE_UP), imported[SYNTHESISED])
    line = evidence_line([("one", Evidence.of([recorded.summary["provenance"]]))])
    assert line.startswith("acceptance recorded; step times measured here; verifier smollm2-135m on ")
    page = page_one(write_report([recorded, made_up], tmp_path / "both.pdf"))
    assert "acceptance recorded" in page
    assert "acceptance synthesised from aggregates" in page


def test_a_capacity_plan_says_its_grade(imported: dict[str, TraceSet], tmp_path: Path) -> None:
    load = {"kind": "poisson", "rate_rps": 2.0, "requests": 40}
    asked = scenario("drafter", costs=MADE_UP, workload=load, slo={"ttft_ms": 400.0, "tpot_ms": 40.0})
    found = plan_capacity(asked, traces=imported[SYNTHESISED], replications=2, requests=40, workers=1)
    assert found.acceptance == SYNTHESISED
    assert (found.verifier, found.device) == ("llama-3.1-8b", "h100-sxm")
    assert found.evidence is not None
    assert found.evidence.step_times == "stated constants"
    page = page_one(write_report(found, tmp_path / "plan.pdf"))
    assert "acceptance synthesised from aggregates" in page
