"""The search: made-up traces whose best setting is known, ties, constraints, budgets, and what is written."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import DRAFT, LINEAR, random_runs
from several import several

from analysis.common.records import from_json, to_json
from analysis.tuning import TuneFindings, TuneSettings, tune
from analysis.tuning.runs import batch_sizes
from analysis.tuning.space import fixed, make_base
from analysis.tuning.write import write_findings
from calibration.common.errors import PacelineError, ScenarioError
from calibration.traces import TraceSet
from simulator import load_scenario, simulate
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario

TOKENS = 24
COSTS = {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT}


def runs(alpha: float, sequences: int = 12, seed: int = 3) -> list[list[int]]:
    """Run lengths of a drafter that matches each token with probability `alpha`."""
    rng = np.random.default_rng(seed)
    return [random_runs(rng, TOKENS, alpha=alpha) for _ in range(sequences)]


PERFECT = [[TOKENS - t for t in range(TOKENS)] for _ in range(12)]
USELESS = [[0] * TOKENS for _ in range(12)]


def scenario(costs: dict[str, Any] | None = None, concurrency: int = 1, **settings: Any) -> Scenario:
    """A closed loop at made-up prices; no drafter and no policy of its own."""
    workload = {"kind": "closed", "concurrency": concurrency, **settings.pop("workload", {})}
    return parse_scenario({"name": "made", "workload": workload, "costs": costs or COSTS, **settings})


def search(traces: TraceSet, given: Scenario | None = None, **settings: Any) -> TuneFindings:
    """Search in this process with a fixed number of replications: nothing depends on the clock."""
    asked = TuneSettings(**{"replications": 4, "workers": 1, **settings})
    return tune(given or scenario(), asked, traces=traces)


@pytest.fixture(scope="module")
def mixed() -> TraceSet:
    """A good drafter and a bad one at the same price."""
    return several({"good": runs(0.9), "bad": runs(0.2, seed=4)}, domains=("chat", "code"))


@pytest.fixture(scope="module")
def found(mixed: TraceSet) -> TuneFindings:
    return search(mixed)


def test_a_perfect_drafter_is_given_the_longest_draft() -> None:
    findings = search(several({"drafter": PERFECT}), draft_tokens=(1, 2, 4))
    assert findings.best_fixed.overrides["stopping"]["draft_tokens"] > 4  # refinement goes beyond the grid
    assert findings.best.value.value >= findings.best_fixed.value.value
    assert findings.baseline.status.startswith(("worse", "left"))
    assert findings.baseline.behind.value == pytest.approx(
        findings.baseline.value.value / findings.best.value.value - 1, rel=1e-4
    )


def test_a_useless_drafter_is_not_used() -> None:
    findings = search(several({"drafter": USELESS}))
    assert findings.best.kind == "none"
    assert all(one.kind != "fixed" for one in findings.runners_up)
    assert max(gap.reached.value for gap in findings.oracles) == pytest.approx(1.0)


def test_the_best_fixed_length_is_what_brute_force_finds(mixed: TraceSet, found: TuneFindings) -> None:
    best = found.best_fixed
    length = best.overrides["stopping"]["draft_tokens"]
    requests, values = found.plan.requests, {}
    for k in (1, 2, 4, 8, length):
        one = scenario(
            workload={"order": "shuffled", "requests": requests},
            drafter={"name": "good"},
            stopping={"policy": "fixed", "draft_tokens": k},
        )
        summary = simulate(one, traces=mixed).summary
        values[k] = summary["total_output_tokens"] / summary["duration"]
    assert best.drafters == ("good",)
    fine = [one for one in found.candidates if one.name == f"good: {length}"]
    assert fine[0].replications == 4
    # On the first seed alone another length may be ahead by chance, but not far.
    assert values[length] >= 0.97 * max(values.values())


def test_never_below_the_best_fixed_length_that_was_tried(found: TuneFindings) -> None:
    fixed_ones = [one for one in found.candidates if one.kind == "fixed" and one.replications == 4]
    assert found.best_fixed.value.value == max(one.value.value for one in fixed_ones)
    assert found.best.value.value >= found.best_fixed.value.value


def test_identical_drafters_cannot_be_told_apart() -> None:
    same = runs(0.8)
    costs = COSTS | {"drafter": {"kind": "linear", "base_s": 0.01}}
    findings = search(several({"one": same, "two": same}), scenario(costs), draft_tokens=(1, 2, 3))
    by_name = {one.name: one for one in findings.candidates}
    one, two = by_name["one: 2"], by_name["two: 2"]
    assert one.value == two.value
    assert one.behind == two.behind
    assert {one.status, two.status} <= {"best", "indistinct"}
    assert [c for c in findings.candidates if len(c.drafters) == 2 and "does the same as" in c.status]


def test_runners_up_are_those_whose_paired_interval_contains_zero(found: TuneFindings) -> None:
    for one in found.candidates:
        if one.status == "indistinct":
            assert one.behind.low <= 0 <= one.behind.high
        elif one.status == "worse":
            assert one.behind.high < 0
    assert {one.name for one in found.runners_up} == {
        one.name for one in found.candidates if one.status == "indistinct"
    }


def test_paired_differences_are_those_of_the_runs(mixed: TraceSet, found: TuneFindings) -> None:
    """The difference on the scenario's own seed is that of two plain simulations."""
    base = make_base(
        scenario(), mixed, None, {"workload.order": "shuffled", "workload.requests": found.plan.requests}
    )
    one = simulate(base.make(fixed(base, "good", 2).overrides), traces=mixed).summary["output_throughput"]
    best = simulate(parse_scenario(tomllib.loads(found.best_toml)), traces=mixed).summary["output_throughput"]
    assert best == pytest.approx(found.first_run, rel=1e-12)
    listed = next(c for c in found.candidates if c.name == "good: 2")
    assert listed.behind.value == pytest.approx(one / best - 1, abs=0.15)


def test_the_answer_is_the_same_twice_and_with_workers(mixed: TraceSet, found: TuneFindings) -> None:
    assert to_json(search(mixed, workers=2)) == to_json(found)


def test_findings_survive_json(found: TuneFindings) -> None:
    assert from_json(TuneFindings, to_json(found), "tune.json") == found


def test_intervals_of_halves_are_widened_to_cover_which_requests_were_recorded(found: TuneFindings) -> None:
    assert found.plan.share == 0.5
    assert found.plan.requests == 6
    assert found.plan.recorded == 12
    stated = search(several({"good": runs(0.9)}), scenario(workload={"requests": 12}), draft_tokens=(2,))
    assert stated.plan.share is None
    assert any("do not cover which requests" in note for note in stated.notes)


def test_oracles_bound_the_answer_and_are_never_chosen(found: TuneFindings) -> None:
    assert found.oracles
    for gap in found.oracles:
        assert gap.name not in {one.name for one in found.candidates}
    top = max(gap.value.value for gap in found.oracles)
    assert top >= found.best.value.value
    length = next(gap for gap in found.oracles if "drafter and" not in gap.name)
    expected = (found.best.value.value - found.best_fixed.value.value) / (
        length.value.value - found.best_fixed.value.value
    )
    assert length.closed.value == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_sensitivity_holds_the_grid_relative_to_the_best(found: TuneFindings) -> None:
    lines = {(p.dimension, p.series) for p in found.sensitivity}
    assert ("draft length (tokens)", "good") in lines
    assert ("draft length (tokens)", "bad") in lines
    assert {p.at for p in found.sensitivity if p.series == "bad"} >= {1.0, 2.0, 4.0, 8.0}
    assert all(p.ratio.value == 1.0 for p in found.sensitivity if p.is_best)


def test_lengths_by_batch_size_fall_where_tokens_cost(mixed: TraceSet) -> None:
    costs = {
        "verifier": {"kind": "linear", "base_s": 0.01, "per_token_s": 0.002},
        "drafter": {"kind": "linear", "base_s": 0.0002},
    }
    findings = search(mixed, scenario(costs, concurrency=8), drafters=("good",), replications=2)
    chosen = {row.batch: row.draft_tokens for row in findings.batch_lengths if row.chosen}
    assert list(chosen) == [1, 2, 4, 8]
    assert chosen[1] > chosen[8]
    table = next(one for one in findings.candidates if one.kind == "by_batch").overrides["stopping"]["table"]
    assert table[0][0] == 1
    assert table[-1][1] == 8
    assert all(first == before[1] + 1 for before, (first, _, _) in itertools.pairwise(table))


def test_closed_batches_of_copies_have_one_batch_size_and_are_drawn_anew(mixed: TraceSet) -> None:
    given = scenario(concurrency=4, workload={"copies": 4})
    assert batch_sizes(given) == ()
    findings = search(mixed, given, drafters=("good",), draft_tokens=(2, 4), replications=3)
    assert findings.plan.requests == 24
    assert findings.plan.share == 0.5
    assert findings.best.value.low is not None
    assert findings.batch_lengths == ()


def test_goodput_and_constraints(mixed: TraceSet) -> None:
    loose = search(mixed, objective="goodput", slo={"e2el_ms": 1e6}, drafters=("good",), replications=2)
    assert loose.goal.metric == "request_goodput"
    assert loose.best.attainment == 1.0
    impossible = search(mixed, slo={"e2el_ms": 0.001}, drafters=("good",), replications=2)
    assert not impossible.feasible
    assert any("no candidate keeps the SLO" in note for note in impossible.notes)
    plain = search(mixed, drafters=("bad",), replications=2)
    limit = 1000 * (plain.best.value.value and TOKENS / plain.best.value.value) * 1.05
    tight = search(mixed, slo={"e2el_ms": limit}, attainment=0.5, drafters=("bad",), replications=2)
    assert tight.feasible
    assert tight.best.attainment is not None
    assert tight.best.attainment >= 0.5


def test_cost_is_price_over_throughput(mixed: TraceSet) -> None:
    findings = search(mixed, objective="cost", price_per_hour=3.6, drafters=("good",), replications=2)
    speed = search(mixed, drafters=("good",), replications=2)
    assert not findings.goal.larger_is_better
    assert findings.best.name == speed.best.name
    assert findings.first_run == pytest.approx(3.6 / 3600 / speed.first_run * 1e6, rel=1e-9)
    replicas = parse_scenario(
        {"workload": {"kind": "closed", "concurrency": 2}, "costs": COSTS, "replica": [{"count": 2}]}
    )
    double = search(mixed, replicas, objective="cost", price_per_hour=1.0, drafters=("good",), replications=2)
    assert tomllib.loads(double.best_toml)["costs"]["usd_per_hour"] == 2.0


def test_settings_of_the_engine_are_tried_on_request(mixed: TraceSet) -> None:
    given = scenario(concurrency=6)
    findings = search(mixed, given, drafters=("good",), draft_tokens=(2,), max_num_seqs=(1, 2), replications=2)
    tried = {one.overrides["engine.max_num_seqs"]: one for one in findings.candidates if one.kind == "engine"}
    assert set(tried) == {1, 2}
    assert tried[1].value.value < findings.best.value.value
    assert {p.at for p in findings.sensitivity if p.dimension == "max_num_seqs"} == {1.0, 2.0}


def test_prices_by_drafter_reach_single_candidates() -> None:
    same = runs(0.8)
    dear = {"kind": "linear", "base_s": 0.05}
    costs = {"overhead_s": 0.002, "verifier": LINEAR, "drafters": {"cheap": DRAFT, "dear": dear}}
    rule = {"policy": "static", "drafters": ["cheap", "dear"], "drafter": "cheap"}
    given = scenario(costs, routing={"drafter": rule})
    findings = search(several({"cheap": same, "dear": same}), given, draft_tokens=(2,), replications=2)
    assert "cheap" in findings.best_fixed.drafters
    values = {one.name: one.value.value for one in findings.candidates}
    assert values["dear: 2"] < values["cheap: 2"]


def test_candidates_that_cannot_run_are_told_with_their_reason() -> None:
    traces = several({"a": runs(0.9), "b": runs(0.3)}, probabilities={"b": [[0.3] * TOKENS] * 12})
    findings = search(traces, draft_tokens=(2,), replications=2)
    assert any("merged" in one.name for one in findings.skipped)
    assert all(one.reason for one in findings.skipped)


class Clock:
    """A clock that goes on by `step` seconds whenever it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def timed(traces: TraceSet, step: float, budget_s: float) -> TuneFindings:
    settings = TuneSettings(workers=1, budget_s=budget_s, drafters=("bad",), draft_tokens=(1,))
    return tune(scenario(), settings, traces=traces, clock=Clock(step))


def test_the_budget_plans_fewer_replications_and_says_so(mixed: TraceSet) -> None:
    rich, poor = timed(mixed, 1e-4, 100.0), timed(mixed, 0.05, 20.0)
    assert rich.plan.chosen_by == poor.plan.chosen_by == "clock"
    assert rich.plan.rungs[-1].replications == 16
    assert rich.plan.cuts == ()
    assert poor.plan.rungs[-1].replications < 16
    assert poor.plan.predicted_s is not None


def test_what_the_budget_cuts_on_the_way_is_told(mixed: TraceSet) -> None:
    findings = timed(mixed, 1.0, 30.0)
    assert findings.plan.cuts
    assert findings.best.replications >= 2
    assert findings.best.replications < findings.plan.rungs[-1].replications


def test_an_interrupted_search_goes_on_from_its_store(mixed: TraceSet, tmp_path: Path) -> None:
    settings = TuneSettings(replications=2, workers=1, drafters=("good",), draft_tokens=(1, 2))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "policies" and done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tune(scenario(), settings, traces=mixed, store=tmp_path / "runs.sqlite", progress=stop)
    told: dict[str, int] = {}
    again = tune(
        scenario(),
        settings,
        traces=mixed,
        store=tmp_path / "runs.sqlite",
        progress=lambda stage, done, total: told.setdefault(stage, done),
    )
    assert told["fixed lengths"] == 6  # all of them were there
    assert to_json(again) == to_json(tune(scenario(), settings, traces=mixed))


def test_the_folder_is_whole_and_best_toml_gives_the_objective(
    mixed: TraceSet, found: TuneFindings, tmp_path: Path
) -> None:
    mixed.write(tmp_path / "traces")
    given = parse_scenario(
        {
            "name": "made",
            "traces": {"path": "traces"},
            "workload": {"kind": "closed", "concurrency": 1},
            "costs": COSTS,
        },
        folder=tmp_path,
    )
    findings = tune(given, TuneSettings(replications=2, workers=1, draft_tokens=(1, 2)))
    folder = write_findings(findings, given, tmp_path / "far" / "out", {"extra.txt": "x"})
    names = {path.name for path in folder.iterdir()}
    assert names == {"tune.json", "candidates.csv", "best.toml", "extra.txt"}
    best = load_scenario(folder / "best.toml")
    assert findings.goal.value(simulate(best).summary) == pytest.approx(findings.first_run, rel=1e-12)
    assert from_json(TuneFindings, (folder / "tune.json").read_text(), "tune.json") == findings
    rows = (folder / "candidates.csv").read_text().splitlines()
    assert len(rows) == 1 + len(findings.candidates)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ScenarioError, match="must be new, empty or an older result"):
        write_findings(findings, given, tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "speed"}, "--objective: must be one that is known, got 'speed'"),
        ({"objective": "goodput"}, "--objective goodput: needs service-level objectives"),
        ({"objective": "cost"}, "--objective cost: needs a price"),
        ({"objective": "energy"}, "--objective energy: the prices give no joules"),
        ({"drafters": ("god",)}, "--drafters: not in the TraceSet, got 'god'; did you mean 'good'?"),
        ({"drafters": ("good", "good")}, "--drafters: must name each drafter once"),
        ({"draft_tokens": (0, 1)}, "--draft-tokens: must be different whole numbers of at least 1"),
        ({"attainment": 2.0}, "--attainment: must be above 0 and at most 1, got 2"),
        ({"budget_s": 0.0}, "--budget-s: must be above 0"),
        ({"replications": 1}, "--replications: must be at least 2"),
    ],
)
def test_mistakes_are_told_by_option(mixed: TraceSet, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PacelineError) as fault:
        search(mixed, **{"replications": 2, **settings})
    assert message in str(fault.value)


def test_replicas_with_a_policy_of_their_own_are_refused(mixed: TraceSet) -> None:
    replica = {"stopping": {"policy": "none"}}
    given = parse_scenario({"workload": {"kind": "closed", "concurrency": 2}, "costs": COSTS, "replica": [replica]})
    with pytest.raises(ScenarioError, match=r"replica\[0\].stopping: must be left out"):
        search(mixed, given)


def test_nothing_random_means_no_interval() -> None:
    traces = several({"drafter": [[TOKENS - t for t in range(TOKENS)]]})
    findings = search(traces, draft_tokens=(2,), replications=3)
    assert findings.best.value.low is None
    assert any("there are no intervals" in note for note in findings.notes)
    assert json.loads(to_json(findings))["best"]["value"]["low"] is None
    assert math.isfinite(findings.first_run)
