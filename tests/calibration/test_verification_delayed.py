"""Delayed tree expansion: the merged trie, its verification and its expected length, against enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from enumeration import chi_square_p_value, total_variation
from horizons import Model, continuation, emitted, path_probability, random_model, same_everywhere

from calibration.common.errors import CalibrationError
from calibration.verification import KSequential, Naive, OptimalTransport, Recursive, TokenLevel
from calibration.verification.chains import TokenLevelChain
from calibration.verification.delayed import (
    DelayedAction,
    DelayedExpansion,
    best_action,
    draw_delayed_tree,
    merge_branches,
)
from calibration.verification.recursive import TopDown
from calibration.verification.trees import DraftTree, TreeShape

RULES = [Naive("iid"), Recursive("iid"), KSequential(), OptimalTransport("iid")]
ACTIONS = [
    DelayedAction(branches=2, trunk=1, length=2),
    DelayedAction(branches=2, trunk=2, length=1),
    DelayedAction(branches=3, trunk=0, length=2),
    DelayedAction(branches=3, trunk=1, length=1),
    DelayedAction(branches=1, trunk=1, length=2),
    DelayedAction(branches=2, trunk=2, length=0),
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
actions = pytest.mark.parametrize("action", ACTIONS, ids=lambda a: f"K{a.branches}-{a.trunk}-{a.length}")


def all_trees(action: DelayedAction, target: Model, drafter: Model) -> Any:
    """Every drafted delayed tree with its probability, from the definition: a trunk, and paths from its end."""
    tokens = range(len(drafter(())))
    for trunk in itertools.product(tokens, repeat=action.trunk):
        paths = list(itertools.product(tokens, repeat=action.length))
        root = path_probability(drafter, trunk)
        weights = [path_probability(drafter, (*trunk, *path)) / root if root else 0.0 for path in paths]
        for chosen in itertools.product(range(len(paths)), repeat=action.branches):
            weight = root * float(np.prod([weights[i] for i in chosen]))
            if weight > 0:
                nodes, parents, draws = merge_branches(trunk, [paths[i] for i in chosen])
                yield DraftTree.of_models(nodes, parents, target, drafter, draws), weight


@actions
@rules
def test_the_emitted_text_is_the_verifiers_and_its_length_as_expected(rule: Any, action: DelayedAction) -> None:
    verification = DelayedExpansion(rule, action.trunk)
    for seed, zeros in ((1, False), (2, True)):
        target, drafter = random_model(seed, 2, zeros=zeros), random_model(seed + 10, 2, zeros=zeros)
        laws = [(verification.law(tree), weight) for tree, weight in all_trees(action, target, drafter)]
        horizon = action.draft_steps + 1
        assert total_variation(emitted(laws, target, horizon), continuation(target, (), horizon)) < 1e-12
        mean = sum(weight * law.expected_accepted for law, weight in laws)
        assert verification.block_efficiency(action, target, drafter) == pytest.approx(1 + mean, abs=1e-12)
    assert verification.lossless


def test_three_tokens_two_branches() -> None:
    action, rule = DelayedAction(2, 1, 2), Recursive("iid")
    target, drafter = random_model(5, 3), random_model(6, 3)
    laws = [(DelayedExpansion(rule, 1).law(tree), weight) for tree, weight in all_trees(action, target, drafter)]
    assert total_variation(emitted(laws, target, 4), continuation(target, (), 4)) < 1e-12


def test_judging_merged_draws_once_is_caught() -> None:
    """The rule must see every live path: K-SEQ on the distinct tokens alone is no longer the verifier."""
    action = DelayedAction(3, 0, 1)
    target, drafter = random_model(5, 3), random_model(6, 3)
    laws = []
    for tree, weight in all_trees(action, target, drafter):
        once = DraftTree(tree.tokens, tree.parents, tree.p, tree.q)
        laws.append((TopDown(KSequential()).law(once), weight))
    assert total_variation(emitted(laws, target, 2), continuation(target, (), 2)) > 1e-3


def test_merging() -> None:
    tokens, parents, draws = merge_branches([7, 8], [[1, 2], [1, 3], [4, 2], [1, 2]])
    assert tokens == (7, 8, 1, 2, 3, 4, 2)
    assert parents == (-1, 0, 1, 2, 2, 1, 5)
    assert draws == ((0,), (1,), (2, 2, 5, 2), (3, 4, 3), (), (), (6,), ())
    assert merge_branches([], [[1], [1]]) == ((1,), (-1,), ((0, 0), ()))


def test_one_branch_is_a_chain() -> None:
    target, drafter = random_model(1, 3), random_model(2, 3)
    chain = 1 + TokenLevelChain().expected_accepted(target, drafter, 3)
    for rule in (Recursive("iid"), KSequential()):
        for trunk in range(4):
            action = DelayedAction(branches=1, trunk=trunk, length=3 - trunk)
            efficiency = DelayedExpansion(rule, trunk).block_efficiency(action, target, drafter)
            assert efficiency == pytest.approx(chain)


@rules
def test_one_level_at_the_root_is_the_rules_own_acceptance(rule: Any) -> None:
    p, q = random_model(1, 4)(()), random_model(2, 4)(())
    action = DelayedAction(branches=3, trunk=0, length=1)
    efficiency = DelayedExpansion(rule, 0).block_efficiency(action, same_everywhere(p), same_everywhere(q))
    assert efficiency == pytest.approx(1 + rule.acceptance(p, q, 3), abs=1e-8)


def test_live_paths_are_worth_more_than_a_tree_with_one_path_below_each_draft() -> None:
    """Merging keeps every path through an accepted token alive; separate chains keep the accepted one's alone."""
    target, drafter = random_model(3, 3), random_model(4, 3)
    merged = DelayedExpansion(Recursive("iid"), 0).block_efficiency(DelayedAction(2, 0, 2), target, drafter)
    separate = TreeShape.from_paths([(0,), (1,), (0, 0), (1, 0)])
    assert merged > 1 + TopDown(Recursive("iid")).expected_accepted(separate, target, drafter) + 1e-3


def test_drawn_trees_and_verdicts_follow_the_expected_length_and_the_verifier() -> None:
    target, drafter, rng = random_model(7, 4), random_model(8, 4), np.random.default_rng(0)
    action = DelayedAction(branches=3, trunk=1, length=2)
    verification = DelayedExpansion(KSequential(), 1)
    counts, lengths, exact = np.zeros((4, 4)), [], []
    for _ in range(2500):
        tree = draw_delayed_tree(action, target, drafter, rng)
        assert 3 <= tree.nodes <= action.most_nodes
        assert len(tree.draws[1]) == 3
        exact.append(verification.law(tree).expected_accepted)
        text = verification.verify(tree, rng).emitted
        lengths.append(len(text))
        counts[text[:2] if len(text) > 1 else (text[0], rng.choice(4, p=target(text)))] += 1
    expected = verification.block_efficiency(action, target, drafter)
    assert np.mean(lengths) == pytest.approx(expected, abs=4 * np.std(lengths) / 50)
    assert 1 + np.mean(exact) == pytest.approx(expected, abs=4 * np.std(exact) / 50)
    assert chi_square_p_value(counts.ravel(), continuation(target, (), 2).ravel()) > 1e-3


def test_the_best_action_has_the_most_tokens_per_second() -> None:
    efficiency = {DelayedAction(1, 4, 0): 3.0, DelayedAction(4, 0, 4): 4.0, DelayedAction(2, 2, 2): 3.5}
    cheap_nodes = {action: 1.0 + 0.01 * action.most_nodes for action in efficiency}
    dear_nodes = {action: 1.0 + 0.2 * action.most_nodes for action in efficiency}
    assert best_action(efficiency, cheap_nodes) == DelayedAction(4, 0, 4)
    assert best_action(efficiency, dear_nodes) == DelayedAction(1, 4, 0)
    equal = {DelayedAction(2, 1, 2): 3.0, DelayedAction(1, 3, 0): 3.0}
    assert best_action(equal, dict.fromkeys(equal, 1.0)) == DelayedAction(1, 3, 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(CalibrationError, match="got branches=0, trunk=1, length=1"):
        DelayedAction(0, 1, 1)
    with pytest.raises(CalibrationError, match="draft a token"):
        DelayedAction(2, 0, 0)
    with pytest.raises(CalibrationError, match="must verify independent drafts"):
        DelayedExpansion(Recursive("without_replacement"), 1)
    with pytest.raises(CalibrationError, match="at least 0"):
        DelayedExpansion(TokenLevel(), -1)
    with pytest.raises(CalibrationError, match="trunk of 1, got 2"):
        DelayedExpansion(KSequential(), 1).block_efficiency(DelayedAction(2, 2, 1), *[random_model(0, 2)] * 2)
    with pytest.raises(CalibrationError, match="missing"):
        best_action({DelayedAction(1, 1, 1): 2.0}, {})
    with pytest.raises(CalibrationError, match="above 0"):
        best_action({DelayedAction(1, 1, 1): 2.0}, {DelayedAction(1, 1, 1): 0.0})
