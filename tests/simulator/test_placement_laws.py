"""What must hold under every placement: same text, same bytes for the same seed, faults told in the user's words."""

from __future__ import annotations

import tomllib
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import DRAFT, LINEAR, random_runs, scenario, traces_of

from calibration.common.errors import ScenarioError
from simulator import RunResult, Scenario, parse_scenario, simulate

PLACEMENTS: list[dict[str, Any]] = [
    {"kind": "serial"},
    {"kind": "overlapped"},
    {"kind": "asynchronous"},
    {"kind": "many_servers"},
    {"kind": "many_servers", "servers": 2},
    {"kind": "remote", "round_trip_s": 0.01, "bandwidth_gb_s": 0.001},
    {"kind": "layer_parallel", "group": 4, "layers": 12, "sync_s": 0.0001, "acceptance_drop": 0.07},
]
WAIT_FREE = ("overlapped", "asynchronous", "many_servers")
FAST = {"overhead_s": 0.001, "verifier": {"kind": "linear", "base_s": 0.05}, "drafter": DRAFT}


def names(placement: dict[str, Any]) -> str:
    return "-".join(str(value) for value in placement.values())


every = pytest.mark.parametrize("placement", PLACEMENTS, ids=names)


@every
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), sampled=st.booleans(), tight=st.booleans())
def test_placements_change_when_and_never_what(
    placement: dict[str, Any], seed: int, sampled: bool, tight: bool
) -> None:
    """Every request gets all its tokens, once; time goes on; no slot starves; whatever memory and preemption do."""
    rng = np.random.default_rng(seed)
    runs = [random_runs(rng, int(n), alpha=0.7, own_state=bool(rng.integers(2))) for n in rng.integers(1, 30, 9)]
    probabilities = [rng.random(len(run)).tolist() for run in runs] if sampled else None
    engine: dict[str, Any] = {"max_num_seqs": 4}
    if tight:
        engine |= {"num_gpu_blocks": 24, "block_size": 4, "enable_chunked_prefill": True}
        engine |= {"max_num_batched_tokens": 32}
    run = simulate(
        scenario(int(rng.integers(0, 6)), placement=placement, engine=engine, workload={"concurrency": 6}),
        traces_of(runs, probabilities=probabilities),
    )
    requests, iterations = run.requests, run.iterations
    assert sorted(requests["output_tokens"].to_pylist()) == sorted(len(row) for row in runs)
    preempted = run.summary.get("num_preemptions", 0)
    emitted = int(iterations["emitted_tokens"].to_numpy().sum())
    assert emitted == sum(len(row) for row in runs)
    decoding = iterations.filter(np.array(iterations["kind"].to_pylist()) == "decode")
    assert (decoding["emitted_tokens"].to_numpy() >= decoding["active"].to_numpy()).all(), "somebody starved"
    assert (iterations["accepted_tokens"].to_numpy() <= iterations["drafted_tokens"].to_numpy()).all()
    assert (iterations["accepted_tokens"].to_numpy() <= iterations["emitted_tokens"].to_numpy()).all()
    start, duration = (iterations[name].to_numpy() for name in ("start_s", "duration_s"))
    assert (duration >= 0).all()
    assert (start[1:] >= (start + duration)[:-1] - 1e-12).all()
    assert preempted >= 0 if tight else preempted == 0


@every
def test_equal_seeds_give_equal_results(placement: dict[str, Any]) -> None:
    traces = traces_of([[0] * 40] * 6, probabilities=[[0.8] * 40] * 6)
    runs = [simulate(scenario(4, batch=3, seed=seed, placement=placement), traces) for seed in (5, 5, 6)]
    assert runs[0].requests.equals(runs[1].requests)
    assert runs[0].iterations.equals(runs[1].iterations)
    assert runs[0].summary == runs[1].summary
    assert not runs[0].iterations.equals(runs[2].iterations)


def throughput(run: RunResult) -> float:
    value: float = run.summary["output_throughput"]
    return value


def test_overlap_gains_and_a_link_costs() -> None:
    """Batch 1, acceptance .95. (At .8 PEARL loses here: its first round after a mismatch gives one token only.)"""
    traces = iid_traces(0.95, np.random.default_rng(11), sequences=10, output_tokens=200)
    found = {
        names(place): throughput(simulate(scenario(10, batch=1, costs=FAST, placement=place), traces))
        for place in PLACEMENTS
    }
    none = throughput(simulate(scenario(None, batch=1, costs=FAST), traces))
    serial = found["serial"]
    assert found["many_servers"] > found["asynchronous"] >= found["overlapped"] > serial
    assert found["remote-0.01-0.001"] < serial
    assert min(found[kind] for kind in WAIT_FREE) > none


@pytest.mark.parametrize("policy", ["by_batch", "heuristic", "goodput", "per_request"])
@pytest.mark.parametrize("kind", WAIT_FREE)
def test_policies_that_look_back_only_work_where_drafting_runs_ahead(kind: str, policy: str) -> None:
    traces = iid_traces(0.8, np.random.default_rng(12), sequences=6, output_tokens=60)
    table = {"table": [[1, 2, 4], [3, 8, 2]]} if policy == "by_batch" else {}
    run = simulate(scenario(placement={"kind": kind}, stopping={"policy": policy, **table}), traces)
    assert sum(run.requests["output_tokens"].to_pylist()) == 360
    assert run.summary["spec_decode_accepted_tokens"] > 0


@pytest.mark.parametrize("kind", [*WAIT_FREE, "layer_parallel"])
@pytest.mark.parametrize("policy", ["oracle", "tree"])
def test_policies_that_cannot_be_placed_so_are_refused(kind: str, policy: str) -> None:
    placement = next(place for place in PLACEMENTS if place["kind"] == kind)
    stopping: dict[str, Any] = {"policy": policy}
    if policy == "tree":
        stopping["shape"] = {"kind": "chain", "depth": 2}
    traces = ranked_traces()
    if (kind, policy) == ("layer_parallel", "oracle"):
        assert simulate(scenario(placement=placement, stopping=stopping), traces).summary["completed"] == 2
        return
    with pytest.raises(ScenarioError, match=rf"placement\.kind: '{kind}' drafts"):
        simulate(scenario(placement=placement, stopping=stopping), traces)


def ranked_traces() -> Any:
    """Two sequences whose tokens' ranks under the drafter are known."""
    from builders import manifest

    from calibration.traces import TraceSet, make_table

    ranks = [[0, 0, 1, 0, 0, 2], [0, 1, 0, 0, 0, 0]]
    runs = [[next((j for j in range(6 - t) if row[t + j]), 6 - t) for t in range(6)] for row in ranks]
    rows = {
        "sequence_id": ["a"] * 6 + ["b"] * 6,
        "drafter": ["drafter"] * 12,
        "position": [*range(6), *range(6)],
        "run_length": runs[0] + runs[1],
        "emitted_rank": ranks[0] + ranks[1],
    }
    sequences = {
        "sequence_id": ["a", "b"],
        "domain": ["chat"] * 2,
        "prompt_tokens": [5, 6],
        "output_tokens": [6, 6],
        "finish_reason": ["length"] * 2,
    }
    return TraceSet.build(
        manifest(), {"sequences": make_table("sequences", sequences), "positions": make_table("positions", rows)}
    )


def test_trees_cross_the_link_node_by_node() -> None:
    stopping = {"policy": "tree", "shape": {"kind": "chain", "depth": 2}}
    costs = {"verifier": LINEAR, "drafter": DRAFT}
    far, near = (
        simulate(scenario(batch=2, stopping=stopping, costs=costs, placement=place), ranked_traces()).iterations
        for place in ({"kind": "remote", "round_trip_s": 0.5}, None)
    )
    gap = far["duration_s"].to_numpy() - near["duration_s"].to_numpy()
    assert gap == pytest.approx([0.0] + [0.5] * (far.num_rows - 1))


def test_a_drafter_that_proposes_what_it_finds_cannot_run_ahead() -> None:
    traces = traces_of([[1, 0, 0, 0]], proposals=[[2, 1, 1, 1]])
    with pytest.raises(ScenarioError, match="proposes as many tokens as asked"):
        simulate(scenario(2, placement={"kind": "overlapped"}), traces)


def test_replicas_may_be_placed_differently() -> None:
    traces = iid_traces(0.8, np.random.default_rng(13), sequences=8, output_tokens=40)
    replicas = [
        {"name": "near"},
        {"name": "far", "placement": {"kind": "remote", "round_trip_s": 0.2}},
        {"name": "thin", "placement": PLACEMENTS[-1]},
    ]
    run = simulate(scenario(3, batch=2, replica=replicas, workload={"concurrency": 6}), traces)
    by_name = {name: run.iterations.filter(np.array(run.iterations["replica"].to_pylist()) == name) for name in
               ("near", "far", "thin")}  # fmt: skip
    shortest = {
        name: table["duration_s"].to_numpy()[np.array(table["kind"].to_pylist()) == "decode"].min()
        for name, table in by_name.items()
    }
    assert shortest["far"] > 0.2 > shortest["near"]
    assert sum(run.requests["output_tokens"].to_pylist()) == 320


def test_without_drafting_a_placement_changes_nothing() -> None:
    traces = iid_traces(0.8, np.random.default_rng(14), sequences=4, output_tokens=20)
    plain = simulate(scenario(None), traces)
    for placement in PLACEMENTS:
        assert simulate(scenario(None, placement=placement), traces).iterations.equals(plain.iterations)


@every
def test_the_resolved_scenario_reads_back(placement: dict[str, Any]) -> None:
    given_ = scenario(3, placement=placement)
    again = parse_scenario(tomllib.loads(given_.to_toml()))
    assert isinstance(again, Scenario)
    assert again.hash == given_.hash
    assert again.placement == given_.placement


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ('kind = "overlaped"', "placement.kind: no such kind, got 'overlaped'; did you mean 'overlapped'?"),
        ('kind = "remote"', "placement.round_trip_s: must be given"),
        ('kind = "many_servers"\nservers = 0', "placement.servers: must be >= 1, got 0"),
        ('kind = "overlapped"\nservers = 2', "placement.servers: no such key"),
    ],
)
def test_faults_are_told_by_their_place(table: str, sentence: str) -> None:
    text = f'[workload]\nkind = "closed"\nconcurrency = 1\n\n[placement]\n{table}\n'
    with pytest.raises(ScenarioError) as fault:
        parse_scenario(tomllib.loads(text))
    assert sentence in str(fault.value)
