"""The ``[routing] drafter`` table: what is refused, in which words, and what is written back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from several import COSTS, routed, several

from calibration.common.errors import ReplayError, ScenarioError
from calibration.traces import TraceSet
from simulator import Scenario, load_scenario, parse_scenario, simulate
from simulator.drafter_routing.make import drafter_rule, in_memory
from simulator.scenario.fleet import EngineSettings
from simulator.serving.kv import num_blocks

BASE = {"workload": {"kind": "closed", "concurrency": 2}, "stopping": {"policy": "fixed", "draft_tokens": 2}}


def two() -> TraceSet:
    runs = [[0, 1, 0, 0]] * 3
    return several(
        {"prompt-lookup": runs, "student": runs},
        domains=("chat", "math"),
        felt={"prompt-lookup": 0.5, "student": 0.5},
    )


def rule(**settings: Any) -> dict[str, Any]:
    return {"routing": {"drafter": {"drafters": ["prompt-lookup", "student"], **settings}}}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (rule(policy="statik"), "routing.drafter.policy: no such policy, got 'statik'; did you mean 'static'?"),
        (rule(policy="pakucb"), "routing.drafter.policy: no such policy, got 'pakucb'; did you mean 'pak_ucb'?"),
        (
            rule(policy="static", drafter="studnet"),
            "routing.drafter.drafter: must be one of the drafters, got 'studnet'; did you mean 'student'?",
        ),
        (
            rule(policy="by_domain", table={"chat": "promptlookup"}),
            "table.chat: must be one of the drafters, got 'promptlookup'; did you mean 'prompt-lookup'?",
        ),
        (
            rule(policy="by_domain", table={"chat": "student"}, default="x"),
            "routing.drafter.default: must be one of the drafters, got 'x'; choose from prompt-lookup, student",
        ),
        (rule(policy="ucb", drafters=["a", "a"]), "routing.drafter.drafters: must name each drafter once, got a, a"),
        (rule(policy="ucb", exploration=0), "routing.drafter.exploration: must be > 0, got 0"),
        (rule(policy="classifier", folds=1), "routing.drafter.folds: must be >= 2, got 1"),
        (rule(policy="pak_ucb", kernel="polly"), "routing.drafter.kernel: must be one of linear, poly, rbf"),
        ({**rule(policy="ucb"), "drafter": {"name": "student"}}, "drafter: must be left out where routing.drafter"),
        (
            {**rule(policy="merged"), "stopping": {"policy": "heuristic"}},
            "routing.drafter: policy 'merged' needs a stopping policy of none, fixed,",
        ),
        (
            {**rule(policy="ucb"), "stopping": {"policy": "tree", "shape": {"kind": "chain", "depth": 2}}},
            "routing.drafter: must be left out where stopping.policy is 'tree'",
        ),
        (
            {**rule(policy="ucb"), "placement": {"kind": "overlapped"}},
            "routing.drafter: needs placement.kind = 'serial', got 'overlapped'",
        ),
        (
            {**rule(policy="ucb"), "costs": {"drafters": {"studnt": COSTS["drafter"]}}},
            "costs.drafters: must be one of the drafters, got 'studnt'; did you mean 'student'?",
        ),
        (
            {"drafter": {"name": "student"}, "costs": {"drafters": {"student": COSTS["drafter"]}}},
            "costs.drafters: needs routing.drafter",
        ),
    ],
)
def test_faults_are_told_with_their_place(data: dict[str, Any], fault: str) -> None:
    with pytest.raises(ScenarioError) as raised:
        parse_scenario({**BASE, **data})
    assert fault in str(raised.value)


def test_names_are_looked_up_in_the_traceset(tmp_path: Path) -> None:
    two().write(tmp_path / "traces")
    (tmp_path / "s.toml").write_text(
        """
        traces.path = "traces"
        [routing.drafter]
        policy = "by_domain"
        drafters = ["prompt-lookup", "studnet"]
        table = {maths = "studnet"}
        [stopping]
        policy = "fixed"
        draft_tokens = 2
        [workload]
        kind = "closed"
        concurrency = 1
        """
    )
    with pytest.raises(ScenarioError) as raised:
        load_scenario(tmp_path / "s.toml")
    assert "routing.drafter.drafters: not in the TraceSet, got 'studnet'; did you mean 'student'?" in str(
        raised.value
    )
    assert "routing.drafter.table: not in the TraceSet, got 'maths'; did you mean 'math'?" in str(raised.value)


def test_a_domain_without_a_drafter_is_refused() -> None:
    given = {"policy": "by_domain", "table": {"chat": "student"}}
    with pytest.raises(ScenarioError, match=r"routing\.drafter\.table: .* lacks 'math'; choose from chat"):
        simulate(routed(given, drafters=["prompt-lookup", "student"]), two())


def test_merging_sampled_drafts_is_refused() -> None:
    chances = {name: [[0.5] * 4] * 2 for name in ("a", "b")}
    traces = several({name: [[0] * 4] * 2 for name in ("a", "b")}, probabilities=chances)
    with pytest.raises(ReplayError, match=r"routing\.drafter\.policy: 'merged' must have greedy traces"):
        simulate(routed({"policy": "merged"}), traces)


def test_confidence_needs_drafters_that_have_one() -> None:
    traces = several({name: [[0] * 4] * 2 for name in ("a", "b")})
    with pytest.raises(ReplayError, match="'drafter_confidence'"):
        simulate(routed({"policy": "confidence"}), traces)


def test_a_replica_drafts_elsewhere_only_with_a_drafter_of_its_own() -> None:
    replica = {"name": "x", "placement": {"kind": "overlapped"}}
    data = {**BASE, **rule(policy="ucb"), "replica": [replica]}
    with pytest.raises(ScenarioError, match=r"replica\[0\]\.placement\.kind: must be serial beside routing\.drafter"):
        parse_scenario(data)
    data["replica"] = [{**replica, "drafter": {"name": "student"}}, {"name": "y"}]
    costs = {"costs": {"verifier": COSTS["verifier"], "drafter": COSTS["drafter"]}}
    result = simulate(parse_scenario({**data, **costs}), two())
    assert set(result.summary["drafter_routing"]) == {"y"}


def test_a_replica_may_not_stop_as_its_rule_forbids() -> None:
    replica = [{"name": "x", "stopping": {"policy": "heuristic", "start_tokens": 2, "max_draft_tokens": 4}}]
    with pytest.raises(ScenarioError, match=r"routing\.drafter: policy 'merged' needs"):
        simulate(routed({"policy": "merged"}, drafters=["prompt-lookup", "student"], replica=replica), two())


@pytest.mark.parametrize("policy", ["by_domain", "pak_ucb", "confidence"])
def test_a_scenario_is_written_as_it_was_read(policy: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "by_domain": {"table": {"chat": "prompt-lookup"}, "default": "student"},
        "pak_ucb": {"eta": 0.5},
    }
    costs = {**COSTS, "drafters": {"student": {"kind": "fraction_of_verify", "fraction": 0.01}}}
    scenario = routed({"policy": policy, **more.get(policy, {})}, drafters=["prompt-lookup", "student"], costs=costs)
    again = Scenario.model_validate(tomllib.loads(scenario.to_toml()))
    assert again == scenario
    assert again.hash == scenario.hash


def test_a_baseline_without_drafting_serves_the_same_requests() -> None:
    result = simulate(routed({"policy": "ucb"}, None, drafters=["prompt-lookup", "student"]), two())
    assert result.requests.num_rows == 3
    assert "drafter_routing" not in result.summary
    assert result.summary["draft_s"] == 0


def test_the_result_says_who_drafted_and_at_which_price() -> None:
    summary = simulate(routed({"policy": "oracle_round"}, drafters=["prompt-lookup", "student"]), two()).summary
    assert summary["drafter_routing"]["oracle"] is True
    assert summary["provenance"]["drafter"] == "prompt-lookup, student"
    assert summary["costs"]["draft"]["student"]["source"] == "scenario"
    assert "joules" not in summary


@pytest.mark.parametrize(
    ("given", "resident"),
    [
        ({"policy": "static", "drafter": "b"}, ("b",)),
        ({"policy": "by_domain", "table": {"chat": "b"}}, ("b",)),
        ({"policy": "by_domain", "table": {"chat": "b"}, "default": "a"}, ("a", "b")),
        ({"policy": "ucb"}, ("a", "b")),
    ],
)
def test_only_drafters_that_may_draft_take_memory(given: dict[str, Any], resident: tuple[str, ...]) -> None:
    """Weights and KV bytes of a drafter that is never chosen are not counted."""
    rule = drafter_rule(routed(given))
    assert rule is not None
    assert in_memory(rule) == resident
    traces = several({name: [[0] * 4] for name in ("a", "b")})
    sizes = {"parameters": 10**9, "layers": 2, "heads": 4, "kv_heads": 4, "hidden_size": 64, "dtype": "float16"}
    shapes = traces.manifest.model_copy(
        update={
            "verifier": traces.manifest.verifier.model_copy(update=sizes),
            "drafters": tuple(drafter.model_copy(update=sizes) for drafter in traces.manifest.drafters),
            "device": traces.manifest.device.model_copy(update={"memory_bytes": 10**10}),
        }
    )
    engine = EngineSettings(gpu_memory_utilization=0.9)
    block = 16 * 2 * 2 * 4 * 16 * 2 * (1 + len(resident))
    assert num_blocks(engine, shapes, resident) == int((9e9 - 2e9 * (1 + len(resident))) / block)
