"""Recorded trees and drafters of varying depth: what a round verifies and what its drafting costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenarios import DRAFT, LINEAR, scenario, traces_of
from several import routed, several

from calibration.common.errors import PacelineError, ReplayError
from calibration.traces import TraceSet
from calibration.traces.manifest import LinearCost
from simulator import simulate
from simulator.playback.replay import compile_replay, select_sequences
from simulator.pricing.costs import DraftPerStep, LinearStep

RUNS = [[0, 2, 1, 0, 3, 2, 1, 0, 0, 1, 0, 0], [0, 1, 0, 2, 1, 0, 0, 4, 3, 2, 1, 0]]
DEPTHS = [[3, 3, 2, 1, 4, 2, 3, 0, 1, 2, 3, 1], [2, 1, 4, 3, 2, 0, 1, 4, 3, 2, 1, 1]]


def nodes_of(depth: int, t: int) -> list[int]:
    """Nodes down to depth 1, 2, ... of the tree at t: level j has 1 + (t + j) % 3 of them."""
    return np.cumsum([1 + (t + j) % 3 for j in range(depth)]).tolist()


def with_lists(traces: TraceSet, column: str, values: list[Any], **changes: Any) -> TraceSet:
    """The same TraceSet with a list column, and changes to its drafter."""
    import pyarrow as pa

    positions = traces.positions
    index = positions.column_names.index(column)
    table = positions.set_column(index, positions.schema.field(column), pa.array(values, pa.list_(pa.int32())))
    first, *others = traces.manifest.drafters
    manifest = traces.manifest.model_copy(update={"drafters": (first.model_copy(update=changes), *others)})
    tables = {name: getattr(traces, name) for name in ("sequences", "rollouts", "timings")}
    return TraceSet.build(manifest, {**tables, "positions": table})


def chains() -> TraceSet:
    return traces_of(RUNS, proposals=DEPTHS)


def trees() -> TraceSet:
    lists = [nodes_of(depth, t) for row in DEPTHS for t, depth in enumerate(row)]
    return with_lists(chains(), "proposal_nodes", lists)


def price(batch_tokens: int, context: int, cost: dict[str, Any]) -> float:
    return cost["base_s"] + cost["per_token_s"] * batch_tokens + cost["per_context_token_s"] * context


@pytest.mark.parametrize("gamma", [1, 2, 3, 8])
@pytest.mark.parametrize("tree", [False, True])
def test_a_lone_request_verifies_the_nodes_down_to_its_draft_length(gamma: int, tree: bool) -> None:
    """Round by round: chains and trees accept alike, trees pay for their nodes and draft in as many steps."""
    runs, depths = RUNS[0], DEPTHS[0]
    traces = traces_of(RUNS[:1], proposals=DEPTHS[:1])
    if tree:
        traces = with_lists(traces, "proposal_nodes", [nodes_of(depth, t) for t, depth in enumerate(depths)])
    table = simulate(scenario(gamma, batch=1, workload={"requests": 1}), traces).iterations.to_pylist()
    rounds = [row for row in table if row["drafted_tokens"] or row["context_tokens"]]
    t = 1
    for row in rounds:
        drafted = min(gamma, depths[t])
        accepted = min(runs[t], drafted, len(runs) - t)
        nodes = nodes_of(depths[t], t)[drafted - 1] if tree and drafted else drafted
        context = 7 + t
        assert (row["drafted_tokens"], row["accepted_tokens"]) == (drafted, accepted)
        assert row["verify_s"] == pytest.approx(price(1 + nodes, context, LINEAR))
        assert row["draft_s"] == pytest.approx(sum(price(1, context + j, DRAFT) for j in range(drafted)))
        t += min(accepted + 1, len(runs) - t)
    assert t == len(runs)


def test_a_tree_with_one_node_a_level_is_a_chain() -> None:
    lists = [list(range(1, depth + 1)) for row in DEPTHS for depth in row]
    plain, same = chains(), with_lists(chains(), "proposal_nodes", lists)
    for gamma in (1, 3, "oracle"):
        results = [simulate(scenario(gamma, batch=2, workload={"requests": 8}), traces) for traces in (plain, same)]
        assert results[0].iterations.equals(results[1].iterations)


def test_rows_without_a_tree_are_chains() -> None:
    lists = [nodes_of(depth, t) if t % 2 else None for row in DEPTHS for t, depth in enumerate(row)]
    traces = with_lists(chains(), "proposal_nodes", lists)
    replay = compile_replay(traces, "drafter", select_sequences(traces), slots=1, seed=0, longest_draft=4)
    assert replay.shapes is not None
    for t, depth in enumerate(DEPTHS[0]):
        for k in range(depth + 1):
            wanted = k if t % 2 == 0 else [0, *nodes_of(depth, t)][k]
            assert replay.shapes.verified(np.array([t]), np.array([k])).tolist() == [wanted]
    most = max([0, *(nodes_of(d, t)[:3][-1] for row in DEPTHS for t, d in enumerate(row) if t % 2 and d), 3])
    assert replay.shapes.most(3) == most


def test_outputs_longer_than_recorded_keep_their_trees() -> None:
    traces = trees()
    sequences = select_sequences(traces)
    replay = compile_replay(traces, "drafter", sequences, slots=1, seed=0, longest_draft=4, block_tokens=3)
    assert replay.shapes is not None
    start = replay.open(0, 5, 40)
    cursors = np.arange(start + 1, start + 40)
    assert replay.proposal_length is not None
    drafted = replay.proposal_length[cursors]
    flat = [[0, *nodes_of(depth, t)] for row in DEPTHS for t, depth in enumerate(row)]
    wanted = [flat[place][-1] for place in replay.positions(cursors).tolist()]
    assert replay.shapes.verified(replay.positions(cursors), drafted).tolist() == wanted


def test_kv_slots_are_kept_for_the_nodes_of_a_draft() -> None:
    """A pool that holds the deepest chain but not the widest tree serves chains alone."""
    wide = with_lists(chains(), "proposal_nodes", [[9 * (j + 1) for j in range(d)] for row in DEPTHS for d in row])
    settings = {"engine": {"max_num_seqs": 1, "num_gpu_blocks": 6, "block_size": 4}}
    simulate(scenario(3, batch=1, workload={"requests": 2}, **settings), chains())
    with pytest.raises(PacelineError, match="block"):
        simulate(scenario(3, batch=1, workload={"requests": 2}, **settings), wide)


def test_tokens_of_fewer_layers_take_their_share_of_a_step() -> None:
    """Per band of layers: the slots whose token goes that deep run a step's share, at their contexts."""
    rng = np.random.default_rng(3)
    cost = DraftPerStep(LinearStep(LinearCost(**DRAFT), "test"))
    for _ in range(50):
        drafted = rng.integers(0, 5, 4)
        context = rng.integers(5, 50, 4)
        layers = rng.integers(0, 7, (4, 5))
        share = np.where(np.arange(drafted.max()) < drafted[:, None], layers[:, : drafted.max()] / 6, 0.0)
        wanted = 0.0
        for j in range(int(drafted.max())):
            for layer in range(6):
                mine = [i for i in range(4) if drafted[i] > j and layers[i, j] > layer]
                if mine:
                    wanted += price(len(mine), sum(int(context[i]) + j for i in mine), DRAFT) / 6
        assert cost.seconds(drafted, context, 0.0, share)[0] == pytest.approx(wanted)


def test_whole_layers_cost_what_a_plain_chain_costs() -> None:
    layers = [[12 * (j + 1) for j in range(depth)] for row in DEPTHS for depth in row]
    given = scenario(3, batch=2, workload={"requests": 8})
    plain = simulate(given, chains()).iterations.to_pandas()
    whole = simulate(given, with_lists(chains(), "draft_layers", layers, layers=12)).iterations.to_pandas()
    half = simulate(given, with_lists(chains(), "draft_layers", layers, layers=24)).iterations.to_pandas()
    assert whole["draft_s"].to_numpy() == pytest.approx(plain["draft_s"].to_numpy())
    assert half["draft_s"].to_numpy() == pytest.approx(plain["draft_s"].to_numpy() / 2)
    assert (half["verify_s"] == plain["verify_s"]).all()


def test_layers_of_a_drafter_whose_depth_is_not_known_are_refused() -> None:
    layers = [[3 * (j + 1) for j in range(depth)] for row in DEPTHS for depth in row]
    with pytest.raises(
        ReplayError, match="'drafter': layers must be known where draft_layers are recorded, got None"
    ):
        simulate(scenario(3, batch=1), with_lists(chains(), "draft_layers", layers))


def test_a_remote_drafter_sends_its_nodes() -> None:
    place = {"kind": "remote", "round_trip_s": 0.0, "bandwidth_gb_s": 1e-6, "bytes_per_drafted_token": 10.0}
    given = scenario(3, batch=1, workload={"requests": 1}, placement=place)
    for traces in (chains(), trees()):
        for row in simulate(given, traces).iterations.to_pylist():
            if row["drafted_tokens"]:
                nodes = round((row["verify_s"] - price(1, row["context_tokens"], LINEAR)) / LINEAR["per_token_s"])
                link_s = (10.0 * nodes + 4 * row["emitted_tokens"]) / 1e3
                assert row["duration_s"] == pytest.approx(row["draft_s"] + row["verify_s"] + 0.002 + link_s)


def of_two() -> TraceSet:
    """Drafter a drafts trees of tokens that take half a step, b plain chains."""
    runs = {"a": RUNS, "b": [list(reversed(row)) for row in RUNS]}
    runs["b"] = [[min(n, len(row) - t) for t, n in enumerate(row)] for row in runs["b"]]
    traces = several(runs, proposals={"a": DEPTHS})
    mine = [(d, t) for row in DEPTHS for t, d in enumerate(row)]
    trees = [*(nodes_of(d, t) for d, t in mine), *[None] * len(mine)]
    layers = [*([6 * (j + 1) for j in range(d)] for d, t in mine), *[None] * len(mine)]
    traces = with_lists(traces, "proposal_nodes", trees)
    return with_lists(traces, "draft_layers", layers, layers=12)


def test_routing_to_one_drafter_of_trees_is_that_drafter_alone() -> None:
    traces = of_two()
    alone = simulate(routed(None, 3, workload={"requests": 8}), traces).iterations.to_pandas()
    sent = simulate(routed({"policy": "static", "drafter": "a"}, 3, workload={"requests": 8}), traces)
    for column in ("verify_s", "draft_s", "emitted_tokens"):
        assert sent.iterations.to_pandas()[column].to_numpy() == pytest.approx(alone[column].to_numpy())


def test_merged_drafters_verify_the_nodes_of_a_tree() -> None:
    """One request: nodes of both drafts, what they share on the text once."""
    traces = of_two()
    runs = {"a": RUNS[0], "b": [min(n, len(RUNS[0]) - t) for t, n in enumerate(reversed(RUNS[0]))]}
    given = routed({"policy": "merged"}, 2, batch=1, workload={"requests": 1})
    t = 1
    for row in simulate(given, traces).iterations.to_pylist():
        if row["context_tokens"]:
            lengths = {"a": min(2, DEPTHS[0][t]), "b": 2}
            matched = {name: min(runs[name][t], n, len(runs["a"]) - t) for name, n in lengths.items()}
            nodes = {"a": nodes_of(DEPTHS[0][t], t)[lengths["a"] - 1] if lengths["a"] else 0, "b": 2}
            accepted = max(matched.values())
            verified = sum(nodes[name] - matched[name] for name in nodes) + accepted
            assert row["verify_s"] == pytest.approx(price(1 + verified, 7 + t, LINEAR))
            t += min(accepted + 1, len(runs["a"]) - t)
    assert t == len(runs["a"])
