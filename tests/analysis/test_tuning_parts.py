"""Pieces of the search with known answers: limits, intervals, plans, rungs, candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from builders import felt_traces
from scenarios import traces_of
from several import several

from analysis.tuning.findings import BatchLength, Goal, Rung, make_goal, parse_slo
from analysis.tuning.halving import Judge, ascend, behind, interval, ratio_of_means, widening
from analysis.tuning.hybrids import hybrids
from analysis.tuning.plan import make_length, make_rungs, plan_by_clock
from analysis.tuning.runs import Runs, batch_sizes, table
from analysis.tuning.space import (
    Candidate,
    fixed,
    fixed_lengths,
    make_base,
    neighbours,
    nothing,
    oracles,
    policies,
    routings,
)
from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet, bundled, make_table
from simulator import simulate
from simulator.experiments.pool import Outcome
from simulator.playback.replay import select_sequences
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario

LINEAR = {"kind": "linear", "base_s": 0.01}


def scenario(workload: Mapping[str, Any] | None = None, **settings: Any) -> Scenario:
    load = {"kind": "closed", "concurrency": 2, **(workload or {})}
    return parse_scenario({"workload": load, "costs": {"verifier": LINEAR, "drafter": LINEAR}, **settings})


def test_limits_are_read_and_every_fault_is_told() -> None:
    assert parse_slo(" ttft_ms=500, tpot_ms = 50.5") == {"ttft_ms": 500.0, "tpot_ms": 50.5}
    with pytest.raises(ScenarioError) as fault:
        parse_slo("ttf_ms=1,tpot_ms=fast,itl_ms,e2el_ms=-3,ttft_ms=inf")
    lines = str(fault.value).splitlines()
    assert lines[0] == "--slo: no such limit, got 'ttf_ms'; did you mean 'ttft_ms'?"
    assert lines[1] == "--slo: tpot_ms must be a number of ms above 0, got 'fast'"
    assert lines[2].startswith("--slo: must be KEY=MS,KEY=MS")
    assert "'-3'" in lines[3]
    assert "'inf'" in lines[4]


def test_goal_reads_the_number_that_belongs_to_the_objective() -> None:
    assert make_goal(scenario(), "throughput").metric == "output_throughput"
    filled = make_goal(scenario({"keep_full": True}), "throughput")
    assert filled.metric == "engine_output_throughput"
    energy = make_goal(scenario(), "energy")
    assert energy.value({"joules_per_million_output_tokens": 2e6}) == 2.0
    assert not energy.larger_is_better


def test_interval_is_students_with_the_widening_of_a_finite_sample() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    sd = values.std(ddof=1)
    t3 = 3.182446305284263
    plain = interval(values, 0.0, 10)
    assert plain.value == 3.0
    assert plain.high == pytest.approx(3 + t3 * sd / 2, rel=1e-5)
    wide = interval(values, 1.0, 10)
    assert wide.high == pytest.approx(3 + t3 * sd * math.sqrt(1 / 4 + 1), rel=1e-5)
    assert interval(values[:1], 1.0, 10).low is None
    assert interval(values, 0.0, 10, comparisons=9).high > plain.high


def test_widening_gives_the_standard_error_of_the_mean_over_all_recorded_requests() -> None:
    """Means over random halves of N numbers: their widened interval covers the true mean, the plain one does not."""
    rng = np.random.default_rng(7)
    covered, rounds = 0, 400
    for _ in range(rounds):
        sample = rng.normal(5.0, 2.0, size=40)
        means = np.array([rng.choice(sample, 20, replace=False).mean() for _ in range(12)])
        found = interval(means, widening(0.5), 40)
        covered += found.low <= 5.0 <= found.high
    assert 0.91 <= covered / rounds <= 0.99
    narrow = 0
    for _ in range(rounds):
        sample = rng.normal(5.0, 2.0, size=40)
        means = np.array([rng.choice(sample, 20, replace=False).mean() for _ in range(12)])
        found = interval(means, 0.0, 40)
        narrow += found.low <= 5.0 <= found.high
    assert narrow / rounds < 0.7  # what the widening is for


def test_widening_of_a_share() -> None:
    assert widening(None) == 0.0
    assert widening(0.5) == 1.0
    assert widening(0.25) == pytest.approx(1 / 3)


def test_paired_shares_and_ratios() -> None:
    best, mine = np.array([10.0, 12.0, 11.0]), np.array([9.0, 11.0, 10.0])
    found = behind(mine, best, 1, 0.0, 3, 1)
    assert found.value == pytest.approx(-1 / 11, rel=1e-5)
    assert found.low == found.high == found.value  # every pair differs by the same
    assert behind(mine, best, -1, 0.0, 3, 1).value == pytest.approx(1 / 11, rel=1e-5)
    assert ratio_of_means(mine, best, 0.0, 3).value == pytest.approx(30 / 33, rel=1e-5)
    assert ratio_of_means(mine, np.zeros(3), 0.0, 3).value is None


@pytest.mark.parametrize(
    ("workload", "recorded", "requests", "share"),
    [
        ({}, 40, 20, 0.5),
        ({"concurrency": 8}, 40, None, None),  # half would leave the loop empty
        ({"requests": 10}, 40, 10, 0.25),
        ({"requests": 80}, 40, 80, None),
        ({"concurrency": 4, "copies": 4}, 40, 80, 0.5),
        ({"kind": "poisson", "concurrency": None, "rate_rps": 2.0}, 40, 20, 0.5),
        ({"kind": "poisson", "concurrency": None, "rate_rps": 2.0, "duration_s": 9.0}, 40, None, None),
        ({"mix": {"chat": 1.0}}, 40, 20, None),
    ],
)
def test_lengths_of_runs(workload: dict[str, Any], recorded: int, requests: int | None, share: float | None) -> None:
    load = {key: value for key, value in {"concurrency": 2, **workload}.items() if value is not None}
    given = Scenario.model_validate({"workload": {"kind": "closed", **load}})
    length = make_length(given, recorded)
    assert (length.requests, length.share) == (requests, share)
    assert length.overrides["workload.order"] == "shuffled"
    shorter = make_length(given, recorded, 2)
    if length.requests is not None:
        copies = workload.get("copies", 1)
        assert shorter.requests == max(length.requests // 2, min(32, length.requests // copies) * copies)


def test_a_plan_fits_the_budget_or_shortens_the_runs() -> None:
    given = scenario()

    def plan(seconds: float, budget_s: float) -> Any:
        now = [0.0]

        def run(one: Scenario) -> Outcome:
            now[0] += seconds * one.workload.requests
            return Outcome({})

        def make(overrides: Mapping[str, Any]) -> list[Scenario]:
            return [scenario({"requests": overrides["workload.requests"]})]

        return plan_by_clock(given, make, 400, 9, workers=2, budget_s=budget_s, clock=lambda: now[0], run=run)[0]

    easy, tight, tiny = plan(0.0005, 100.0), plan(0.0009, 100.0), plan(0.004, 100.0)
    assert easy.rungs[-1].replications == 16
    assert easy.predicted_s <= 80
    assert 6 <= tight.rungs[-1].replications < 16
    assert tight.requests == easy.requests == 200
    assert tiny.requests == 32
    assert tiny.seconds_per_run == pytest.approx(0.13)


def test_rungs_grow() -> None:
    assert [rung.replications for rung in make_rungs(16)] == [3, 8, 16]
    assert [rung.replications for rung in make_rungs(2)] == [2, 2, 2]


class Told(Judge):
    """A judge of numbers that are given."""

    def __init__(self, values: dict[str, list[float]]) -> None:
        goal = Goal("throughput", "output_throughput", 1.0, "tokens/s", True, {}, 0.99)
        runs = Runs(make_base(scenario(), traces_of([[1, 0]]), None, {}))
        super().__init__(runs, goal, 0.0, 10)
        for name, row in values.items():
            for r, value in enumerate(row):
                runs._summaries[name, r] = {"output_throughput": value}


def candidates(*names: str) -> list[Candidate]:
    return [Candidate(name, "fixed", (name,), {}) for name in names]


def test_who_is_shown_worse_leaves_and_the_crowd_is_cut_by_its_means() -> None:
    judge = Told(
        {
            "best": [10.0, 12.0, 14.0],
            "noisy": [14.0, 9.0, 11.0],
            "close": [9.9, 12.1, 13.9],
            "worse": [8.0, 10.0, 12.1],
            "none": [1.0, 1.1, 1.2],
        }
    )
    everyone = candidates("best", "noisy", "close", "worse", "none")
    staying, told = ascend(judge, everyone, Rung(3, 4), 3, lambda c: c.name == "none")
    assert {c.name for c in staying} == {"best", "noisy", "close", "none"}
    assert told == {"worse": "shown worse"}
    staying, told = ascend(judge, everyone, Rung(3, 2), 3, lambda c: c.name == "none")
    assert [c.name for c in staying] == ["best", "close", "none"]
    assert told["noisy"] == "not among the best 2"


def test_a_router_that_always_chose_one_drafter_leaves() -> None:
    judge = Told({"a": [3.0, 4.0], "router": [3.0, 4.0]})
    pair = [Candidate("a", "fixed", ("a",), {}), Candidate("router", "ucb", ("a", "b"), {})]
    staying, told = ascend(judge, pair, Rung(2, 9), 2, lambda c: False)
    assert [c.name for c in staying] == ["a"]
    assert told == {"router": "does the same as a"}


def test_space_leaves_out_what_was_not_recorded_and_keeps_oracles_apart() -> None:
    felt, _ = felt_traces(np.random.default_rng(1))
    base = make_base(scenario(), felt, None, {})
    kinds = {one.kind for one in policies(base, felt, "drafter", 2, 8)}
    assert {"confidence", "adaedl", "specdec++", "tree", "budget", "goodput", "moving_average"} <= kinds
    blind = traces_of([[1, 0, 2, 1, 0]])
    base = make_base(scenario(), blind, None, {})
    kinds = {one.kind for one in policies(base, blind, "drafter", 2, 8)}
    assert kinds.isdisjoint({"confidence", "adaedl", "specdec++", "tree"})
    assert all(bound.oracle for bound in oracles(base, ["drafter"]))
    assert not any(one.oracle for one in policies(base, blind, "drafter", 2, 8))
    every = [*fixed_lengths(base, (1, 2)), *policies(base, blind, "drafter", 2, 8), *oracles(base, ["drafter"])]
    assert len({one.name for one in every}) == len(every)


def test_routings_pair_the_best_drafter_with_others() -> None:
    three = several({name: [[1, 0, 1, 0]] for name in "abc"})
    base = make_base(scenario(), three, None, {})
    groups = {one.drafters for one in routings(base, three, [("b", 3), ("a", 2), ("c", 1)])}
    assert groups == {("b", "a"), ("b", "c"), ("b", "a", "c")}
    assert routings(base, three, [("b", 3)]) == []


def test_neighbours_fill_the_gaps_around_the_best_length() -> None:
    base = make_base(scenario(), traces_of([[1, 0]]), None, {})

    def lengths(best: int) -> list[int]:
        return [int(c.at or 0) for c in neighbours(base, fixed(base, "drafter", best), (1, 2, 4, 8), 8)]

    assert lengths(4) == [3, 5, 6]
    assert lengths(8) == [6, 7, 12, 16]
    assert lengths(1) == []


def test_tables_by_batch_size_join_equal_lengths() -> None:
    rows = [
        BatchLength("d", batch, k, 1.0, k == best)
        for batch, best in ((1, 8), (2, 8), (4, 2), (6, 0))
        for k in (0, 2, 8)
    ]
    assert table(rows, "d") == [[1, 2, 8], [3, 4, 2], [5, 6, 0]]
    assert table(rows, "other") == []


def test_batch_sizes_that_can_occur() -> None:
    assert batch_sizes(scenario({"concurrency": 6})) == (1, 2, 4, 6)
    assert batch_sizes(scenario({"concurrency": 64}, engine={"max_num_seqs": 4})) == (1, 2, 4)
    assert batch_sizes(scenario({"concurrency": 1})) == ()
    opened = parse_scenario({"workload": {"kind": "poisson", "rate_rps": 1.0}})
    assert batch_sizes(opened)[-1] == 64


def test_drafters_on_different_sequences_serve_those_that_all_have() -> None:
    both = several({"a": [[1, 0], [2, 1]], "b": [[0, 0], [0, 1]]})
    rows = [row for row in both.positions.to_pylist() if (row["drafter"], row["sequence_id"]) != ("b", "request-1")]
    names = ("sequence_id", "drafter", "position", "run_length", "accept_probability")
    positions = make_table("positions", {name: [row[name] for row in rows] for name in names})
    traces = TraceSet.build(both.manifest, {"sequences": both.sequences, "positions": positions})
    base = make_base(scenario(), traces, None, {})
    assert not base.shared
    for one in (nothing(base), fixed(base, "a", 2)):
        assert simulate(base.make(one.overrides), traces=traces).summary["completed"] == 1
    alone = make_base(scenario(), traces, ("a",), {})
    assert alone.shared
    assert simulate(alone.make(fixed(alone, "a", 2).overrides), traces=traces).summary["completed"] == 2


def test_hybrids_need_token_ids_and_are_settings_of_a_scenario() -> None:
    traces = bundled("smollm2-135m-cpu-greedy")
    given = parse_scenario({"traces": {"domains": ["chat"]}, "workload": {"kind": "closed", "concurrency": 2}})
    base = make_base(given, traces, ("prompt-lookup", "exit-28"), {})
    served = select_sequences(traces, domains=("chat",), drafter=base.names).ids
    rows = [
        BatchLength(name, batch, k, 1.0, k == best)
        for name, lengths in (("prompt-lookup", (8, 4)), ("exit-28", (2, 0)))
        for batch, best in zip((1, 2), lengths, strict=True)
        for k in (0, 2, 4, 8)
    ]
    found = hybrids(base, traces, served, [("exit-28", 2), ("prompt-lookup", 4)], 8, rows)
    assert {one.kind for one in found} == {"context_match", "forecast"}
    assert len({one.name for one in found}) == len(found)
    tiers = next(one for one in found if one.name.endswith("by batch size")).overrides["routing.drafter"]["tiers"]
    assert {key: (tier["lookup_tokens"], tier["model_tokens"]) for key, tier in tiers.items()} == {
        "1": (8, 2),
        "2": (4, 0),
    }
    scenarios = [base.make(one.overrides) for one in found]
    assert simulate(scenarios[0], traces=traces).summary["completed"] == len(served)
    without = several({"a": [[1, 0]], "b": [[0, 0]]})
    assert (
        hybrids(make_base(scenario(), without, None, {}), without, ["request-0"], [("a", 1), ("b", 1)], 8, ()) == []
    )
