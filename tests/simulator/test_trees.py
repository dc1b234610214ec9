"""Trees against walks written node by node, brute force over all trees, and laws they must obey."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from builders import felt_traces, manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import DRAFT, LINEAR, scenario

from calibration.common.errors import ReplayError, ScenarioError
from calibration.traces import TraceSet, bundled
from simulator import simulate
from simulator.playback.replay import select_sequences
from simulator.playback.signals import DrafterRecording
from simulator.pricing.costs import DraftPerStep, LinearStep, Prices
from simulator.trees.trees import (
    Tree,
    TreeShape,
    dynamic_tree,
    rank_frequencies,
    rank_probabilities,
    static_tree,
    tree_table,
)

Paths = frozenset[tuple[int, ...]]


def walk(paths: Paths, ranks: list[int]) -> int:
    """How deep the text's path of ranks stays in the tree, from the definition."""
    depth = 0
    while depth < len(ranks) and tuple(ranks[: depth + 1]) in paths:
        depth += 1
    return depth


@st.composite
def trees(draw: st.DrawFn) -> Paths:
    paths: set[tuple[int, ...]] = set()
    for _ in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from([(), *sorted(paths)]))
        paths.add((*parent, draw(st.integers(0, 3))))
    return frozenset(paths)


@settings(max_examples=100)
@given(trees(), st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=12), min_size=1, max_size=4))
def test_accepted_lengths_are_those_of_a_walk_from_the_root(paths: Paths, texts: list[list[int]]) -> None:
    shape = TreeShape.from_paths(sorted(paths))
    accepted = shape.accepted(np.array([r for text in texts for r in text]), np.array([len(t) for t in texts]))
    expected = [walk(paths, text[t:]) for text in texts for t in range(len(text))]
    assert accepted.tolist() == expected
    assert shape.nodes == len(paths)
    assert shape.depths.max() == max(map(len, paths))
    parents = {path[:-1] for path in paths}
    assert shape.widths == tuple(
        sum(len(parent) == depth for parent in parents) for depth in range(max(map(len, parents)) + 1)
    )


def test_presets() -> None:
    assert TreeShape.chain(3) == TreeShape.from_paths([(0,), (0, 0), (0, 0, 0)]) == TreeShape.k_ary(1, 3)
    assert TreeShape.k_ary(2, 2) == TreeShape.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)])
    assert TreeShape.k_ary(3, 3).nodes == 3 + 9 + 27
    assert TreeShape.k_ary(3, 3).widths == (1, 3, 9)
    assert TreeShape.chain(4).widths == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: TreeShape.from_paths([(0,), (1, 0)]), r"\[1\] is missing for \[1, 0\]"),
        (lambda: TreeShape.from_paths([(0,), (0,)]), "1 more than once"),
        (lambda: TreeShape((-1, 2), (0, 0)), "got 2 at node 1"),
        (lambda: TreeShape((-1, -1), (0, 0)), r"\(-1, 0\) twice"),
        (lambda: TreeShape((-1,), (0, 1)), "equally long"),
    ],
)
def test_what_is_no_tree_is_refused(make: Any, fault: str) -> None:
    with pytest.raises(ScenarioError, match=fault):
        make()


def material_of(traces: TraceSet, drafter: str = "drafter") -> DrafterRecording:
    return DrafterRecording(traces, drafter, select_sequences(traces, drafter=drafter))


@pytest.mark.parametrize("drafter", ["exit-28", "skip-13-17"])
def test_on_the_real_recording_a_chain_tree_accepts_what_a_chain_accepts(drafter: str) -> None:
    material = material_of(bundled("smollm2-135m-cpu-greedy"), drafter)
    (runs,) = material.columns("run_length")
    needed = material.needed
    for depth in (1, 4, 9):
        tree = static_tree(material, TreeShape.chain(depth))
        assert np.array_equal(tree.accepted(needed), np.minimum(runs[needed], depth))
    wide = static_tree(material, TreeShape.k_ary(3, 4)).accepted(needed)
    assert (wide >= static_tree(material, TreeShape.chain(4)).accepted(needed)).all()
    assert wide.mean() > np.minimum(runs[needed], 4).mean() * 1.1


def shape_scenario(shape: dict[str, Any], **others: Any) -> Any:
    return scenario(**others).model_validate(
        {**scenario(**others).model_dump(), "stopping": {"policy": "tree", "shape": shape}}
    )


def test_a_chain_tree_is_simulated_like_the_fixed_length() -> None:
    traces, _ = felt_traces(np.random.default_rng(1))
    tree = simulate(shape_scenario({"kind": "chain", "depth": 3}), traces)
    fixed = simulate(scenario(3), traces)
    columns = ["rounds", "output_tokens", "drafted_tokens", "accepted_tokens"]
    assert tree.requests.select(columns).equals(fixed.requests.select(columns))
    ends = [result.requests["finish_s"].to_numpy() for result in (tree, fixed)]
    assert ends[0] == pytest.approx(ends[1])


def test_a_wider_tree_takes_no_more_rounds_and_pays_for_its_nodes() -> None:
    traces, _ = felt_traces(np.random.default_rng(2))
    chain = simulate(shape_scenario({"kind": "chain", "depth": 3}), traces)
    wide = simulate(shape_scenario({"kind": "k_ary", "branching": 3, "depth": 3}), traces)
    assert (wide.requests["rounds"].to_numpy() <= chain.requests["rounds"].to_numpy()).all()
    assert wide.summary["total_output_tokens"] == chain.summary["total_output_tokens"]
    rounds = sum(
        chain.iterations["active"].to_pylist()[i] for i, k in enumerate(chain.iterations["kind"].to_pylist())
    )
    assert rounds > 0
    drafted = wide.requests["drafted_tokens"].to_numpy()
    assert (drafted == 39 * wide.requests["rounds"].to_numpy()).all()


def test_prices_count_every_node_once_and_levels_in_lock_step() -> None:
    """Nodes 0 .. 3: two children of the root, two of the first child; the drafter runs the root, then one node."""
    shape = TreeShape.from_paths([(0,), (1,), (0, 0), (0, 1)])
    tree = Tree(np.zeros(1, dtype=np.int64), shape.nodes, 2, shape.widths)
    linear = scenario(2).costs
    assert linear.verifier is not None
    assert linear.drafter is not None
    step = LinearStep(linear.drafter, "test")  # type: ignore[arg-type]
    verify = LinearStep(linear.verifier, "test")  # type: ignore[arg-type]
    draft_s, verify_s, _ = tree.seconds(Prices(verify, verify, DraftPerStep(step), 0.0), batch=5, total_context=700)
    assert verify_s == pytest.approx(
        LINEAR["base_s"] + LINEAR["per_token_s"] * 25 + LINEAR["per_context_token_s"] * 700
    )
    base, token, context = (float(DRAFT[key]) for key in ("base_s", "per_token_s", "per_context_token_s"))
    assert draft_s == pytest.approx(2 * base + 10 * token + context * (700 + 705))


def test_what_cannot_be_replayed_is_refused() -> None:
    traces, _ = felt_traces(np.random.default_rng(3))
    sampled = dataclasses.replace(traces, manifest=manifest(mode="sampled"))
    with pytest.raises(ReplayError, match="greedy traces only"):
        static_tree(material_of(sampled), TreeShape.chain(2))
    given_tokens = dataclasses.replace(traces, manifest=manifest(deterministic=True))
    with pytest.raises(ReplayError, match="proposes given ones"):
        static_tree(material_of(given_tokens), TreeShape.chain(2))


# --- Sequoia


def all_trees(nodes: int, depth: int) -> Iterator[Paths]:
    """Every tree of `nodes` drafted nodes, children of a node having ranks 0, 1, .. without gaps."""

    def subtrees(total: int, level: int) -> Iterator[tuple[tuple[int, ...], ...]]:
        if total == 0:
            yield ()
            return
        if level == 0:
            return
        for children in range(1, total + 1):
            for split in itertools.product(range(total - children + 1), repeat=children):
                if sum(split) != total - children:
                    continue
                options = [list(subtrees(size, level - 1)) for size in split]
                for choice in itertools.product(*options):
                    paths: list[tuple[int, ...]] = []
                    for rank, below in enumerate(choice):
                        paths.append((rank,))
                        paths += [(rank, *path) for path in below]
                    yield tuple(paths)

    for paths in subtrees(nodes, depth):
        yield frozenset(paths)


def promised(paths: Paths, p: np.ndarray) -> float:
    """Expected tokens of a round, bonus included: the sum of path products, and one."""
    return 1 + float(sum(np.prod(p[list(path)]) if max(path) < len(p) else 0.0 for path in paths))


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 4))
def test_the_programme_finds_the_best_of_all_trees(seed: int, nodes: int, depth: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(6))[:5]
    best = max((promised(paths, p) for paths in all_trees(nodes, depth)), default=None)
    assert best is not None
    table = tree_table(p.tolist(), nodes, depth)
    assert table.best[nodes + 1, depth + 1] == pytest.approx(best)
    shape = table.shape(nodes, depth)
    assert shape.nodes == nodes
    assert shape.depths.max() <= depth
    rebuilt = {-1: ()}
    for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
        rebuilt[node] = (*rebuilt[parent], rank)  # type: ignore[assignment]
    assert promised(frozenset(path for path in rebuilt.values() if path), p) == pytest.approx(best)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 8))
def test_with_falling_acceptance_it_equals_best_first_on_path_products(seed: int, nodes: int, depth: int) -> None:
    p = np.sort(np.random.default_rng(seed).dirichlet(np.ones(8)))[::-1]
    if sum(len(p) ** level for level in range(1, depth + 1)) < nodes:
        nodes = len(p)
    frontier = [(float(p[0]), (0,))]
    total = 1.0
    for _ in range(nodes):  # every node opens its first child and its next sibling
        value, path = max(frontier)
        frontier.remove((value, path))
        total += value
        if len(path) < depth:
            frontier.append((value * float(p[0]), (*path, 0)))
        if path[-1] + 1 < len(p):
            frontier.append((value / float(p[path[-1]]) * float(p[path[-1] + 1]), (*path[:-1], path[-1] + 1)))
    assert tree_table(p.tolist(), nodes, depth).best[nodes + 1, depth + 1] == pytest.approx(total)


def test_the_fastest_size_is_that_of_trying_all() -> None:
    p, draft_s = [0.6, 0.2, 0.1], 0.3
    table = tree_table(p, 10, 5)
    verify_s = [1.0 + 0.02 * m**1.5 for m in range(12)]
    tried = {
        (m - 1, level - 1): ((level - 1) * draft_s + verify_s[m]) / table.best[m, level]
        for m in range(2, 12)
        for level in range(2, 7)
        if np.isfinite(table.best[m, level])
    }
    assert table.fastest(draft_s, verify_s) == min(tried, key=lambda size: tried[size])


def test_ranks_that_never_match_do_no_harm() -> None:
    table = tree_table([0.5, 0.0, 0.0], 6, 2)
    assert table.best[4, 3] == pytest.approx(1 + 0.5 + 0.25)
    assert table.shape(6, 2).nodes == 6


def test_a_tree_that_cannot_be_is_refused() -> None:
    with pytest.raises(ScenarioError, match="no tree has 3 nodes, depth 1 and 2 ranks"):
        tree_table([0.5, 0.2], 3, 1).shape(3, 1)


def test_the_optimised_tree_beats_other_trees_of_its_size_on_the_recording() -> None:
    material = material_of(bundled("smollm2-135m-cpu-greedy"), "exit-28")
    p = rank_frequencies(material, 8)
    assert p[0] == pytest.approx((material.columns("emitted_rank")[0][material.needed] == 0).mean())
    best = static_tree(material, tree_table(p.tolist(), 14, 14).shape(14, 14)).accepted(material.needed).mean()
    for other in (TreeShape.chain(14), TreeShape.k_ary(2, 3), TreeShape.k_ary(14, 1)):
        assert static_tree(material, other).accepted(material.needed).mean() < best


# --- Dynamic trees


@settings(max_examples=50)
@given(st.floats(0.05, 0.999), st.floats(0.05, 0.95))
def test_rank_probabilities_have_the_confidence_and_the_entropy(confidence: float, ratio: float) -> None:
    tail = (1 - confidence) * (1 - ratio) * ratio ** np.arange(4000)
    q = np.concatenate(([confidence], tail))
    entropy = -float(np.sum(q[q > 0] * np.log(q[q > 0])))
    given_back = rank_probabilities(np.array([confidence]), np.array([entropy]), 12)[0]
    assert given_back[0] == confidence
    # No rank may be likelier than the first, and the grid of ratios is finite.
    assert given_back == pytest.approx(np.minimum(q[:12], confidence), rel=0.03, abs=1e-4)


def plain_dynamic(chain: np.ndarray, text: np.ndarray, ranks: list[int], n: int, k: int) -> int:
    """EAGLE-2's selection node by node; children of every node of a level have that level's probabilities."""
    nodes = {(r,): chain[0][r] for r in range(k)}
    level = dict(nodes)
    for depth in range(1, len(chain)):
        beam = sorted(level, key=lambda path: -level[path])[:k]
        level = {(*path, r): level[path] * chain[depth][r] for path in beam for r in range(k)}
        nodes |= level
    kept = sorted(nodes.values(), reverse=True)[n - 1]
    by_depth = [[v for path, v in nodes.items() if len(path) == d + 1] for d in range(len(chain))]
    accepted, value = 0, 1.0
    for depth, rank in enumerate(ranks[: len(chain)]):
        if rank >= k:
            break
        value *= text[depth][rank]
        if value < kept * (1 - 1e-9):
            break
        accepted += 1
        if value < sorted(by_depth[depth], reverse=True)[k - 1] * (1 - 1e-9):
            break
    return accepted


def test_dynamic_trees_are_those_of_the_plain_rule_on_the_same_probabilities() -> None:
    traces, paths = felt_traces(np.random.default_rng(5), stride=1, sequences=2, output_tokens=40)
    material = material_of(traces)
    tree = dynamic_tree(material, total_tokens=9, depth=4, top_k=3)
    confidence, entropy, rank = material.columns("drafter_confidence", "drafter_entropy", "emitted_rank")
    assert (tree.nodes, tree.depth, tree.widths) == (9, 4, (1, 3, 3, 3))
    seen = set()
    for (name, t), (sure, unsure) in paths.items():
        if t == 0:
            continue
        place = int(material.starts[material.sequences.ids.index(name)]) + t
        end = place + 40 - t
        stored = [path[:4].astype(np.float32).astype(float) for path in (sure, unsure)]
        chain = rank_probabilities(stored[0], stored[1], 3)
        text = rank_probabilities(confidence[place:end], entropy[place:end], 3)
        expected = plain_dynamic(chain, text, rank[place:end].astype(int).tolist(), 9, 3)
        assert tree.accepted(np.array([place]))[0] == expected
        seen.add(expected)
    assert seen == {0, 1, 2, 3, 4}


def test_a_dynamic_tree_of_all_candidates_is_the_static_tree_of_its_size() -> None:
    """With total_tokens = top_k at depth 1 nothing is left out."""
    traces, _ = felt_traces(np.random.default_rng(6))
    material = material_of(traces)
    dynamic = dynamic_tree(material, total_tokens=3, depth=1, top_k=3).accepted(material.needed)
    assert np.array_equal(dynamic, static_tree(material, TreeShape.k_ary(3, 1)).accepted(material.needed))
    with pytest.raises(ScenarioError, match="must be at most 3"):
        dynamic_tree(material, total_tokens=4, depth=1, top_k=3)
