"""Tree builders against brute force over all trees, and their promised lengths against verification itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from horizons import Model, path_probability, random_model, same_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.common.errors import CalibrationError
from calibration.verification import Naive
from calibration.verification.builders import eagle_bars, eagle_candidates, eagle_tree, opt_tree, tree_table
from calibration.verification.recursive import TopDown
from calibration.verification.trees import DraftTree, TreeShape

Path = tuple[int, ...]


def trees_of(nodes: int, depth: int, ranks: int) -> set[frozenset[Path]]:
    """Every tree of so many nodes: those of one node fewer, each with one node more."""
    trees: set[frozenset[Path]] = {frozenset()}
    for _ in range(nodes):
        trees = {
            tree | {(*parent, rank)}
            for tree in trees
            for parent in [(), *tree]
            for rank in range(ranks)
            if len(parent) < depth and (*parent, rank) not in tree
        }
    return trees


def promised(paths: Any, acceptance: list[float]) -> float:
    return 1 + sum(float(np.prod([acceptance[rank] for rank in path])) for path in paths)


@settings(max_examples=20)
@given(st.lists(st.floats(0.0, 0.5), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 3))
def test_sequoia_is_the_best_of_all_trees(acceptance: list[float], nodes: int, depth: int) -> None:
    acceptance = sorted(acceptance, reverse=True)
    values = [promised(tree, acceptance) for tree in trees_of(nodes, depth, len(acceptance))]
    table = tree_table(acceptance, nodes, depth)
    if not values:
        with pytest.raises(CalibrationError, match="no tree has"):
            table.shape(nodes, depth)
        return
    assert table.best[nodes + 1, depth + 1] == pytest.approx(max(values))
    shape = table.shape(nodes, depth)
    assert (shape.nodes, shape.depths.max() <= depth) == (nodes, True)
    assert shape.expected_tokens(acceptance) == pytest.approx(max(values))


@pytest.mark.parametrize("depth", [3, 6])
@pytest.mark.parametrize("nodes", [1, 7, 30])
def test_with_falling_acceptance_sequoia_takes_the_largest_products(nodes: int, depth: int) -> None:
    acceptance = [0.6, 0.2, 0.1, 0.05]
    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(4), repeat=d)]
    products = np.sort([np.prod([acceptance[rank] for rank in path]) for path in paths])[::-1]
    assert tree_table(acceptance, nodes, depth).best[nodes + 1, depth + 1] == pytest.approx(
        1 + products[:nodes].sum()
    )


def test_sequoias_promise_is_naive_verification_where_context_does_not_matter() -> None:
    """The r-th likeliest token is the text with the verifier's probability of it."""
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.3, 0.6, 0.1])
    acceptance = [float(p[token]) for token in np.argsort(-q)]
    shape = tree_table(acceptance, 7, 4).shape(7, 4)
    exact = TopDown(Naive("top")).expected_accepted(shape, same_everywhere(p), same_everywhere(q))
    assert 1 + exact == pytest.approx(shape.expected_tokens(acceptance))


def test_the_fastest_size_and_depth() -> None:
    """Deep and large where steps and tokens are free; one node where verification is dear."""
    acceptance = [0.7, 0.2, 0.05]
    table = tree_table(acceptance, 12, 5)
    assert table.fastest(0.0, [1.0] * 14) == (12, 5)
    assert table.fastest(0.0, [float(m) for m in range(14)])[0] == 1
    verify_s = [1 + 0.03 * m for m in range(14)]
    tried = {}
    for nodes, depth in itertools.product(range(1, 13), range(1, 6)):
        if np.isfinite(table.best[nodes + 1, depth + 1]):
            tokens = table.shape(nodes, depth).expected_tokens(acceptance)
            tried[nodes, depth] = (depth * 0.1 + verify_s[nodes + 1]) / tokens
    best = table.fastest(0.1, verify_s)
    assert tried[best] == pytest.approx(min(tried.values()))
    with pytest.raises(CalibrationError, match="must reach 13 tokens, got 3"):
        table.fastest(0.1, verify_s[:4])
    with pytest.raises(CalibrationError, match="1 to 12 and 1 to 5"):
        table.shape(13, 2)


def all_products(drafter: Model, depth: int) -> dict[Path, float]:
    size = len(drafter(()))
    paths = [path for d in range(1, depth + 1) for path in itertools.product(range(size), repeat=d)]
    return {path: path_probability(drafter, path) for path in paths}


@pytest.mark.parametrize("nodes", [1, 4, 11, 25])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_opt_tree_is_the_global_best_by_path_product(nodes: int, depth: int) -> None:
    for seed in range(5):
        drafter = random_model(seed, 4, zeros=seed > 2)
        products = {path: value for path, value in all_products(drafter, depth).items() if value > 0}
        best = sorted(products.values(), reverse=True)[:nodes]
        tree = opt_tree(drafter, nodes, depth)
        assert tree.products.sum() == pytest.approx(sum(best))
        assert tree.expected_tokens == pytest.approx(1 + sum(best))
        for path, product in zip(tree.paths, tree.products, strict=True):
            assert product == pytest.approx(products[path])
        assert len(set(tree.paths)) == len(best)


def test_opt_tree_stops_drafting_where_a_layer_adds_too_little() -> None:
    drafter = same_everywhere([0.7, 0.2, 0.1])
    asked: list[Path] = []

    def counted(prefix: Path) -> np.ndarray:
        asked.append(prefix)
        return drafter(prefix)

    sums = [opt_tree(drafter, 6, depth).products.sum() for depth in range(1, 8)]
    gains = np.diff(sums)
    assert (gains >= 0).all()
    threshold = float(gains[1] + gains[2]) / 2
    tree = opt_tree(counted, 6, 7, threshold)
    assert gains[1] > threshold > gains[2]
    assert tree.products.sum() == pytest.approx(sums[2])
    assert max(map(len, asked)) == 3  # the layer that was not worth it had to be drafted to know


def plain_eagle(drafter: Model, total: int, depth: int, k: int) -> set[Path]:
    """The rule, node by node, on dictionaries."""
    level: dict[Path, float] = {(): 1.0}
    everyone: dict[Path, float] = {}
    for _ in range(depth):
        beam = sorted(level, key=lambda path: -level[path])[:k]
        level = {
            (*path, int(token)): level[path] * drafter(path)[token]
            for path in beam
            for token in np.argsort(-drafter(path))[:k]
        }
        everyone |= level
    return set(sorted(everyone, key=lambda path: -everyone[path])[:total])


@pytest.mark.parametrize(("total", "depth", "k"), [(1, 1, 1), (5, 3, 2), (9, 4, 3), (21, 3, 3), (4, 6, 1)])
def test_eagle_tree_is_the_plain_rule(total: int, depth: int, k: int) -> None:
    for seed in range(5):
        drafter = random_model(seed, 6)
        tree = eagle_tree(drafter, total, depth, k)
        assert set(tree.paths) == plain_eagle(drafter, total, depth, k)
        assert tree.shape.parents == tree.parents
        assert tree.shape.depths.max() <= depth
        assert tree.products.sum() <= opt_tree(drafter, total, depth).products.sum() + 1e-12
    with pytest.raises(CalibrationError, match="total_tokens: must be at most"):
        eagle_tree(drafter, eagle_candidates(depth, k) + 1, depth, k)


def test_bars_of_many_places_are_the_trees_own() -> None:
    rng, total, depth, k = np.random.default_rng(0), 9, 4, 3
    rows = np.sort(rng.dirichlet(np.full(8, 0.5), size=(6, depth)), axis=2)[:, :, ::-1]
    kept, expanded = eagle_bars(rows[:, :, :k], total, k)
    for place in range(6):
        drafter = same_everywhere(*rows[place])
        tree = eagle_tree(drafter, total, depth, k)
        assert tree.products.min() == pytest.approx(kept[place])
        asked: dict[int, list[Path]] = {}

        def counted(prefix: Path, drafter: Model = drafter, asked: dict[int, list[Path]] = asked) -> np.ndarray:
            asked.setdefault(len(prefix), []).append(prefix)
            return drafter(prefix)

        eagle_tree(counted, total, depth, k)
        for level in range(1, depth):
            assert min(path_probability(drafter, path) for path in asked[level]) == pytest.approx(
                expanded[place, level - 1]
            )


def test_the_promise_of_a_grown_tree_is_exact_where_the_drafter_is_the_verifier() -> None:
    drafter = random_model(3, 5)
    for tree in (opt_tree(drafter, 12, 4), eagle_tree(drafter, 12, 4, 4)):
        drafted = DraftTree.of_models(tree.tokens, tree.parents, drafter, drafter)
        assert 1 + TopDown(Naive()).law(drafted).expected_accepted == pytest.approx(tree.expected_tokens)


def test_constant_branching() -> None:
    shape = TreeShape.constant_branching([3, 2])
    assert shape == TreeShape.from_paths([(0,), (1,), (2,), *itertools.product(range(3), range(2))])
    assert shape.widths == (1, 3)
    assert TreeShape.constant_branching([2, 2, 2]) == TreeShape.k_ary(2, 3)
    assert shape.expected_tokens([0.5, 0.2]) == pytest.approx(1 + 0.7 + 0.7 * 0.7)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: TreeShape.from_paths([(0,), (1, 0)]), r"\[1\] is missing for \[1, 0\]"),
        (lambda: TreeShape.from_paths([(0,), (0,)]), "1 more than once"),
        (lambda: TreeShape((-1, 2), (0, 0)), "got 2 at node 1"),
        (lambda: TreeShape((-1, -1), (0, 0)), r"\(-1, 0\) twice"),
        (lambda: TreeShape((-1,), (0, 1)), "equally long"),
        (lambda: opt_tree(random_model(0, 3), 0, 2), "at least 1, got 0"),
        (lambda: eagle_tree(random_model(0, 3), 0, 2, 2), "nodes: must be at least 1, got 0"),
        (lambda: eagle_tree(random_model(0, 3), 1, 0, 1), "at most 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, fault: str) -> None:
    with pytest.raises(CalibrationError, match=fault):
        make()
