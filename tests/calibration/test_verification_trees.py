"""Verification of trees, from the root and from the leaves, against enumeration of all drafted trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enumeration import chi_square_p_value, random_pair, total_variation
from horizons import Model, chains, continuation, emitted, path_probability, random_model, rows_along, same_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.common.errors import CalibrationError
from calibration.verification import (
    Greedy,
    GreedyDrafts,
    KSequential,
    Naive,
    Recursive,
    TokenLevel,
    gumbel_top_k,
    stochastic_beam_search,
)
from calibration.verification.builders import opt_tree
from calibration.verification.chains import BlockVerification, TokenLevelChain
from calibration.verification.recursive import TopDown
from calibration.verification.traversal import Traversal
from calibration.verification.trees import DraftTree, TreeShape, draft_tuples, draw_tree, enumerate_trees

EXACT = 1e-12
SHAPES = {
    "one child": TreeShape.chain(1),
    "chain": TreeShape.chain(3),
    "fan of 2": TreeShape.k_ary(2, 1),
    "fan of 3": TreeShape.k_ary(3, 1),
    "late fork": TreeShape.from_paths([(0,), (0, 0), (0, 1)]),
    "unequal, deep first": TreeShape.from_paths([(0,), (1,), (0, 0), (0, 0, 0)]),
    "unequal, deep last": TreeShape.from_paths([(0,), (1,), (1, 0), (1, 1)]),
    "two chains": TreeShape.from_paths([(0,), (1,), (0, 0), (1, 0)]),
    "3, then 1": TreeShape.from_paths([(0,), (1,), (2,), (1, 0)]),
    "mixed": TreeShape.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
}
RULES: dict[str, tuple[Any, str]] = {
    "naive, top": (TopDown(Naive()), "top"),
    "naive, iid": (TopDown(Naive("iid")), "iid"),
    "naive, distinct": (TopDown(Naive("without_replacement")), "without_replacement"),
    "recursive, iid": (TopDown(Recursive("iid")), "iid"),
    "recursive, distinct": (TopDown(Recursive()), "without_replacement"),
    "k-seq": (TopDown(KSequential()), "iid"),
    "greedy drafts": (TopDown(GreedyDrafts()), "greedy"),
    "traversal, iid": (Traversal(), "iid"),
    "traversal, distinct": (Traversal(without_replacement=True), "without_replacement"),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
rules = pytest.mark.parametrize(("rule", "drafting"), RULES.values(), ids=RULES.keys())


def depth(shape: TreeShape) -> int:
    return int(shape.depths.max())


def deviation(rule: Any, drafting: Any, shape: TreeShape, target: Model, drafter: Model) -> float:
    """Total variation of the emitted text from the verifier's, over all trees of a shape."""
    laws = [(rule.law(tree), weight) for tree, weight in enumerate_trees(shape, target, drafter, drafting)]
    horizon = depth(shape) + 1
    return total_variation(emitted(laws, target, horizon), continuation(target, (), horizon))


@shapes
@rules
def test_the_emitted_text_is_the_verifiers(rule: Any, drafting: str, shape: TreeShape) -> None:
    size = 3 if shape.nodes < 5 else 2
    for seed in range(2):
        for zeros in (False, True):
            target = random_model(seed, size, zeros=zeros)
            drafter = random_model(seed + 40, size, zeros=zeros)
            assert deviation(rule, drafting, shape, target, drafter) < EXACT
    assert rule.lossless


@st.composite
def random_shapes(draw: st.DrawFn) -> TreeShape:
    paths: set[tuple[int, ...]] = set()
    for _ in range(draw(st.integers(1, 5))):
        parent = draw(st.sampled_from([(), *sorted(paths)]))
        siblings = sum(path[:-1] == parent for path in paths)
        if len(parent) < 3 and siblings < 3:
            paths.add((*parent, siblings))
    return TreeShape.from_paths(sorted(paths or {(0,)}))


@settings(max_examples=25)
@given(random_shapes(), st.integers(0, 2**31), st.sampled_from(sorted(RULES)), st.booleans())
def test_any_shape_any_rule(shape: TreeShape, seed: int, name: str, zeros: bool) -> None:
    rule, drafting = RULES[name]
    target, drafter = random_model(seed, 2, zeros=zeros), random_model(seed + 1, 2, zeros=zeros)
    assert deviation(rule, drafting, shape, target, drafter) < EXACT


def test_rules_for_other_drafts_are_caught() -> None:
    """Independent drafts judged as distinct ones, and the reverse, lose the verifier's distribution."""
    target, drafter = random_model(1, 3), random_model(9, 3)
    shape = SHAPES["fan of 3"]
    assert deviation(TopDown(Recursive("iid")), "without_replacement", shape, target, drafter) > 1e-3
    assert deviation(Traversal(), "without_replacement", SHAPES["3, then 1"], target, drafter) > 1e-3
    assert deviation(TopDown(TokenLevel()), "top", TreeShape.chain(2), target, drafter) > 1e-3


def test_enumerated_trees_are_all_trees() -> None:
    target, drafter = random_model(1, 3), random_model(2, 3)
    for drafting in ("iid", "without_replacement"):
        weights: dict[tuple[Any, ...], float] = {}
        for tree, weight in enumerate_trees(SHAPES["mixed"], target, drafter, drafting):  # type: ignore[arg-type]
            weights[tree.prefixes] = weights.get(tree.prefixes, 0.0) + weight
            for row, prefix in enumerate(tree.prefixes):
                assert np.array_equal(tree.p[row], target(prefix))
                assert not tree.draws[row] or np.array_equal(tree.q[row], drafter(prefix))
        assert sum(weights.values()) == pytest.approx(1.0)
        assert len(weights) == (3**5 if drafting == "iid" else 6 * 6 * 3)
        rng, counts = np.random.default_rng(3), dict.fromkeys(weights, 0)
        draw = Recursive(drafting).draw  # type: ignore[arg-type]
        for _ in range(2000):
            counts[draw_tree(SHAPES["mixed"], target, drafter, draw, rng).prefixes] += 1
        assert chi_square_p_value(np.array(list(counts.values())), np.array(list(weights.values()))) > 1e-3


def test_distinct_drafts_stop_where_the_drafter_has_no_more() -> None:
    target, drafter = random_model(1, 3), same_everywhere([0.0, 0.25, 0.75])
    shape = TreeShape.from_paths([(0,), (1,), (2,), (0, 0), (2, 0)])
    trees = list(enumerate_trees(shape, target, drafter, "without_replacement"))
    assert {tree.nodes for tree, _ in trees} == {3}  # the third child and what is below it are gone
    assert sum(weight for _, weight in trees) == pytest.approx(1.0)
    assert deviation(Traversal(True), "without_replacement", shape, target, drafter) < EXACT
    assert dict(draft_tuples([0.0, 0.25, 0.75], 3, "without_replacement")) == {(1, 2): 0.25, (2, 1): 0.75}


def test_traversal_is_block_verification_on_chains() -> None:
    for seed in range(6):
        target, drafter = random_model(seed, 3, zeros=seed > 2), random_model(seed + 9, 3, zeros=seed > 2)
        for path, _ in chains(drafter, 3):
            p, q = rows_along(target, path, 4), rows_along(drafter, path, 3)
            block, leaves = BlockVerification().law(path, p, q), Traversal().law(DraftTree.chain(path, p, q))
            assert leaves.prefixes == block.prefixes
            np.testing.assert_allclose(leaves.ends, block.ends, atol=1e-12)
            mass = block.ends[:, None]
            np.testing.assert_allclose(mass * leaves.corrections, mass * block.corrections, atol=1e-12)


def test_top_down_is_token_level_verification_on_chains() -> None:
    target, drafter = random_model(7, 3), random_model(8, 3)
    for path, _ in chains(drafter, 3):
        p, q = rows_along(target, path, 4), rows_along(drafter, path, 3)
        chain, tree = TokenLevelChain().law(path, p, q), TopDown(TokenLevel()).law(DraftTree.chain(path, p, q))
        np.testing.assert_allclose(tree.ends, chain.ends, atol=1e-14)
        np.testing.assert_allclose(tree.corrections, chain.corrections, atol=1e-14)


@pytest.mark.parametrize("drafting", ["iid", "without_replacement"])
@pytest.mark.parametrize("children", [1, 2, 3])
def test_traversal_is_recursive_rejection_at_depth_one(drafting: Any, children: int) -> None:
    target, drafter = random_model(4, 4), random_model(5, 4)
    leaves, root = Traversal(drafting == "without_replacement"), TopDown(Recursive(drafting))
    for tree, _ in enumerate_trees(TreeShape.k_ary(children, 1), target, drafter, drafting):
        one, other = leaves.law(tree), root.law(tree)
        np.testing.assert_allclose(one.ends, other.ends, atol=1e-12)
        mass = one.ends[:, None]
        np.testing.assert_allclose(mass * one.corrections, mass * other.corrections, atol=1e-12)


@shapes
@pytest.mark.parametrize("drafting", ["iid", "without_replacement"])
def test_expected_lengths_are_means_of_laws_and_traversal_accepts_no_less(drafting: Any, shape: TreeShape) -> None:
    for seed in range(3):
        size = 3 if shape.nodes < 5 else 2
        target, drafter = random_model(seed, size), random_model(seed + 20, size)
        means = []
        for rule in (TopDown(Recursive(drafting)), TopDown(Naive(drafting)), Traversal(drafting != "iid")):
            trees = enumerate_trees(shape, target, drafter, drafting)
            mean = sum(weight * rule.law(tree).expected_accepted for tree, weight in trees)
            assert rule.expected_accepted(shape, target, drafter) == pytest.approx(mean, abs=1e-12)
            means.append(mean)
        recursive, naive, traversal = means
        assert recursive <= traversal + 1e-12
        if shape in (SHAPES["chain"], SHAPES["fan of 3"], SHAPES["two chains"]):  # siblings with equal trees below
            assert naive <= recursive + 1e-12


def test_acceptance_of_a_full_tree_is_the_sum_of_products_of_the_rules_acceptance() -> None:
    p, q = random_pair(np.random.default_rng(1), 4)
    target, drafter = same_everywhere(p), same_everywhere(q)
    for rule in (Naive("iid"), Recursive("iid"), Recursive(), KSequential(), Naive("without_replacement")):
        alpha = rule.acceptance(p, q, 2)
        expected = alpha + alpha**2 + alpha**3
        assert TopDown(rule).expected_accepted(TreeShape.k_ary(2, 3), target, drafter) == pytest.approx(expected)


def test_the_expected_length_is_the_sum_over_nodes_of_products_of_edge_acceptances() -> None:
    target, drafter = random_model(3, 4), random_model(6, 4)
    rng = np.random.default_rng(2)
    for rule in (Naive("iid"), Recursive("iid"), KSequential()):
        tree = draw_tree(
            TreeShape.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)]), target, drafter, rule.draw, rng
        )
        total = 0.0
        for node in range(tree.nodes):
            product, at = 1.0, node
            while at >= 0:
                parent = int(tree.parents[at])
                siblings = [int(c) for c in np.flatnonzero(tree.parents == parent)]
                law = rule.law(tree.p[parent + 1], tree.q[parent + 1], tree.tokens[siblings])
                product *= law.accepted[siblings.index(at)]
                at = parent
            total += product
        assert TopDown(rule).law(tree).expected_accepted == pytest.approx(total)


def test_a_deterministic_tree_under_naive_verification_accepts_the_verifiers_mass_of_its_nodes() -> None:
    target, drafter = random_model(3, 5), random_model(6, 5)
    grown = opt_tree(drafter, 9, 4)
    tree = DraftTree.of_models(grown.tokens, grown.parents, target, drafter)
    mass = sum(path_probability(target, path) for path in grown.paths)
    assert TopDown(Naive()).law(tree).expected_accepted == pytest.approx(mass)


def test_greedy_verification_walks_the_verifiers_choices() -> None:
    target, drafter = random_model(3, 5), random_model(6, 5)
    grown = opt_tree(drafter, 40, 4)
    law = TopDown(Greedy()).law(DraftTree.of_models(grown.tokens, grown.parents, target, drafter))
    text: tuple[int, ...] = ()
    while (step := (*text, int(np.argmax(target(text))))) in set(grown.paths):
        text = step
    assert law.expected_accepted == len(text) > 0
    end = law.prefixes.index(text)
    assert (law.ends[end], law.corrections[end].argmax()) == (1.0, np.argmax(target(text)))


def test_per_node_k_seq_can_beat_traversal_on_wide_shallow_trees() -> None:
    """Traversal does not dominate: it needs depth."""
    wide = TreeShape.k_ary(3, 1)
    lead = []
    for seed in range(6):
        target, drafter = random_model(seed, 4), random_model(seed + 60, 4)
        lead.append(
            TopDown(KSequential()).expected_accepted(wide, target, drafter)
            - Traversal().expected_accepted(wide, target, drafter)
        )
    assert min(lead) >= -1e-12
    assert max(lead) > 1e-3


@rules
def test_verify_draws_from_the_law(rule: Any, drafting: Any) -> None:
    target, drafter = random_model(12, 4), random_model(13, 4)
    draw = Recursive("iid").draw if drafting == "iid" else gumbel_top_k
    tree = draw_tree(SHAPES["mixed"], target, drafter, draw, np.random.default_rng(5))
    law, rng = rule.law(tree), np.random.default_rng(0)
    index = {prefix: row for row, prefix in reversed(list(enumerate(law.prefixes)))}
    expected = np.zeros((tree.nodes + 1, 4))
    for row, prefix in enumerate(law.prefixes):  # equal siblings are one prefix
        expected[index[prefix]] += law.ends[row] * law.corrections[row]
    counts = np.zeros_like(expected)
    for _ in range(2500):
        verdict = rule.verify(tree, rng)
        counts[index[verdict.accepted], verdict.token] += 1
    assert chi_square_p_value(counts.ravel(), expected.ravel()) > 1e-3


def text_counts(rule: Any, draw: Any, rounds: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and expectation of the first two tokens, grouped by p / q, over rounds of a model of positions alone."""
    rng = np.random.default_rng(21)
    pairs = [random_pair(rng, size) for _ in range(3)]
    target, drafter = (same_everywhere(*[pair[i] for pair in pairs]) for i in range(2))
    groups = [np.digitize(pairs[i][0] / pairs[i][1], [0.3, 0.8, 1.2, 3.0]) for i in range(2)]
    counts = np.zeros((5, 5))
    for later in rng.choice(size, size=rounds, p=pairs[1][0]):
        text = rule.verify(draw_tree(SHAPES["mixed"], target, drafter, draw, rng), rng).emitted
        counts[groups[0][text[0]], groups[1][text[1] if len(text) > 1 else later]] += 1
    shares = [np.bincount(groups[i], weights=pairs[i][0], minlength=5) for i in range(2)]
    return counts.ravel(), np.outer(*shares).ravel()


@pytest.mark.parametrize("name", ["recursive, distinct", "k-seq", "traversal, iid", "traversal, distinct"])
def test_a_large_vocabulary_is_emitted_as_the_verifier_would(name: str) -> None:
    rule, drafting = RULES[name]
    draw = gumbel_top_k if drafting == "without_replacement" else Recursive("iid").draw
    assert chi_square_p_value(*text_counts(rule, draw, 1500, 4000)) > 1e-3


def test_a_large_vocabulary_shows_a_wrong_rule() -> None:
    """A drafter that always proposes its likeliest token is no draw from q."""
    assert chi_square_p_value(*text_counts(Traversal(True), RULES["naive, top"][0].rule.draw, 1500, 4000)) < 1e-6


def test_single_precision_rows_and_long_trees() -> None:
    """Softmax rows of a model, 300 levels deep: the same law as in double precision."""
    target, drafter = random_model(1, 5), same_everywhere(random_model(2, 5)(()))
    shape = TreeShape.from_paths([path for d in range(1, 301) for path in ((0,) * d, (*(0,) * (d - 1), 1))])
    tree = draw_tree(shape, lambda prefix: target(prefix[-2:]), drafter, gumbel_top_k, np.random.default_rng(0))
    single = DraftTree(tree.tokens, tree.parents, tree.p.astype(np.float32), tree.q.astype(np.float32))
    assert (tree.nodes, len(tree.prefixes[-1])) == (600, 300)
    for rule in (TopDown(Recursive()), Traversal(without_replacement=True)):
        law = rule.law(single)
        assert law.ends.sum() == pytest.approx(1.0, abs=1e-12)
        np.testing.assert_allclose(law.ends, rule.law(tree).ends, atol=1e-5)


def test_stochastic_beams_are_verified_without_loss() -> None:
    target, drafter = random_model(31, 4), random_model(32, 4)
    rng, counts = np.random.default_rng(0), np.zeros((4, 4, 4))
    accepted = 0
    for _ in range(3000):
        nodes = stochastic_beam_search(drafter, 3, 2, rng)
        tree = DraftTree.of_models([n.tokens[-1] for n in nodes], [n.parent for n in nodes], target, drafter)
        text = TopDown(Recursive()).verify(tree, rng).emitted
        accepted += len(text) - 1
        while len(text) < 3:
            text = (*text, int(rng.choice(4, p=target(text))))
        counts[text] += 1
    assert chi_square_p_value(counts.ravel(), continuation(target, (), 3).ravel()) > 1e-3
    assert accepted > 3000


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"parents": [-1, 1]}, "got 1 at 1"),
        ({"tokens": [0, 3]}, "vocabulary of 2, got 3 at node 1"),
        ({"tokens": [0]}, r"must be \[n\]"),
        ({"p": np.full((2, 2), 0.5)}, r"must be \[n \+ 1, V\]"),
        ({"draws": ((0,), (), ())}, "each child of it"),
    ],
)
def test_what_is_no_drafted_tree_is_refused(change: dict[str, Any], fault: str) -> None:
    rows = np.full((3, 2), 0.5)
    with pytest.raises(CalibrationError, match=fault):
        DraftTree(**{"tokens": [0, 1], "parents": [-1, -1], "p": rows, "q": rows, **change})


def test_traversal_refuses_what_it_cannot_judge() -> None:
    rows = np.full((3, 2), 0.5)
    twins = DraftTree(np.array([1, 1]), np.array([-1, -1]), rows, rows)
    assert Traversal().law(twins).ends.sum() == pytest.approx(1.0)
    with pytest.raises(CalibrationError, match=r"must differ, got tokens \[1, 1\]"):
        Traversal(without_replacement=True).law(twins)
    merged = DraftTree(np.array([1, 0]), np.array([-1, -1]), rows, rows, ((0, 0, 1), (), ()))
    with pytest.raises(CalibrationError, match="every child once"):
        Traversal().law(merged)
    never = DraftTree(np.array([1, 0]), np.array([-1, -1]), rows, np.tile([0.0, 1.0], (3, 1)))
    with pytest.raises(CalibrationError, match="q > 0"):
        Traversal().law(never)
