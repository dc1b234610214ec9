"""Token-level and block verification of chains, against enumeration of all drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from enumeration import chi_square_p_value, random_pair, total_variation
from horizons import Model, chains, continuation, emitted, path_probability, random_model, rows_along, same_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.common.errors import CalibrationError
from calibration.verification.chains import BlockVerification, TokenLevelChain

RULES = [TokenLevelChain(), BlockVerification()]
EXACT = 1e-12


def laws(rule: Any, target: Model, drafter: Model, gamma: int) -> list[tuple[Any, float]]:
    return [
        (rule.law(path, rows_along(target, path, gamma + 1), rows_along(drafter, path, gamma)), weight)
        for path, weight in chains(drafter, gamma)
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_emitted_text_is_the_verifiers(rule: Any, gamma: int, zeros: bool) -> None:
    for seed in range(4):
        target, drafter = random_model(seed, 3, zeros=zeros), random_model(100 + seed, 3, zeros=zeros)
        joint = emitted(laws(rule, target, drafter, gamma), target, gamma + 1)
        assert total_variation(joint, continuation(target, (), gamma + 1)) < EXACT


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_equal_and_disjoint_models(rule: Any) -> None:
    model = random_model(5, 3)
    assert rule.expected_accepted(model, model, 3) == pytest.approx(3.0)
    joint = emitted(laws(rule, model, model, 3), model, 4)
    assert total_variation(joint, continuation(model, (), 4)) < EXACT
    left, right = same_everywhere([0.4, 0.6, 0.0]), same_everywhere([0.0, 0.0, 1.0])
    assert rule.expected_accepted(left, right, 3) == 0.0
    assert total_variation(emitted(laws(rule, left, right, 2), left, 3), continuation(left, (), 3)) < EXACT


def test_a_correction_that_forgets_what_was_accepted_is_caught() -> None:
    """Block verification must correct from [pi p - q]+; [p - q]+ is the token-level rule's."""
    target, drafter, gamma = random_model(1, 3), random_model(2, 3), 2
    wrong = []
    for law, weight in laws(BlockVerification(), target, drafter, gamma):
        rows = law.corrections.copy()
        for i in range(1, gamma):
            path = law.prefixes[i]
            left = np.maximum(target(path) - drafter(path), 0.0)
            rows[i] = left / left.sum()
        wrong.append((replace(law, corrections=rows), weight))
    joint = emitted(wrong, target, gamma + 1)
    assert total_variation(joint, continuation(target, (), gamma + 1)) > 1e-3


def test_the_papers_example() -> None:
    """Sun et al. 2024: two tokens, p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 10/9 and 11/9 accepted."""
    target, drafter = same_everywhere([1 / 3, 2 / 3]), same_everywhere([2 / 3, 1 / 3])
    assert TokenLevelChain().expected_accepted(target, drafter, 2) == pytest.approx(10 / 9, abs=1e-14)
    assert BlockVerification().expected_accepted(target, drafter, 2) == pytest.approx(11 / 9, abs=1e-14)


def test_token_level_is_the_capped_geometric_where_acceptance_is_constant() -> None:
    target, drafter = same_everywhere([0.5, 0.3, 0.2]), same_everywhere([0.2, 0.3, 0.5])
    alpha = 0.7
    expected = alpha * (1 - alpha**6) / (1 - alpha)
    assert TokenLevelChain().expected_accepted(target, drafter, 6) == pytest.approx(expected)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(1, 3), st.booleans())
def test_expected_lengths_are_the_means_over_all_drafts_and_block_is_never_shorter(
    seed: int, size: int, gamma: int, zeros: bool
) -> None:
    target, drafter = random_model(seed, size, zeros=zeros), random_model(seed + 1, size, zeros=zeros)
    means = []
    for rule in RULES:
        mean = sum(weight * law.expected_accepted for law, weight in laws(rule, target, drafter, gamma))
        assert rule.expected_accepted(target, drafter, gamma) == pytest.approx(mean, abs=1e-12)
        means.append(mean)
    token, block = means
    assert block >= token - 1e-12
    if gamma == 1:
        assert block == pytest.approx(token, abs=1e-12)


def test_no_prefix_is_accepted_more_often_than_both_models_write_it() -> None:
    """What is accepted was drafted, and is then the text: E[tau] is at most the sum of min(P, Q) over prefixes."""
    for seed in range(20):
        target, drafter = random_model(seed, 3), random_model(seed + 50, 3)
        bound = [
            sum(min(path_probability(target, path), weight) for path, weight in chains(drafter, gamma))
            for gamma in (1, 2, 3)
        ]
        block = BlockVerification().expected_accepted(target, drafter, 3)
        assert block <= sum(bound) + 1e-12
        assert BlockVerification().expected_accepted(target, drafter, 1) == pytest.approx(bound[0])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_verify_draws_from_the_law(rule: Any) -> None:
    target, drafter, path = random_model(3, 4), random_model(4, 4), (1, 0, 2)
    p, q = rows_along(target, path, 4), rows_along(drafter, path, 3)
    law, rng = rule.law(path, p, q), np.random.default_rng(0)
    counts = np.zeros((2, 4, 4))
    for _ in range(4000):
        for kind, verdict in enumerate((rule.verify(path, p, q, rng), law.sample(rng))):
            assert path[: len(verdict.accepted)] == verdict.accepted
            assert verdict.emitted == (*verdict.accepted, verdict.token)
            counts[kind, len(verdict.accepted), verdict.token] += 1
    expected = (law.ends[:, None] * law.corrections).ravel()
    for kind in range(2):
        assert chi_square_p_value(counts[kind].ravel(), expected) > 1e-3


class _TokenByPlainP(TokenLevelChain):
    """Wrong on purpose: a rejected draft is replaced by a token from p, not from [p - q]+."""

    def verify(self, drafts: Any, p: Any, q: Any, rng: np.random.Generator) -> Any:
        verdict = super().verify(drafts, p, q, rng)
        if len(verdict.accepted) == len(drafts):
            return verdict
        return replace(verdict, token=int(rng.choice(p.shape[1], p=p[len(verdict.accepted)])))


def text_counts(rule: Any, rounds: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts and expectation of the first two tokens, grouped by p / q, over rounds of a model of positions alone."""
    rng = np.random.default_rng(11)
    pairs = [random_pair(rng, size) for _ in range(4)]
    p, q = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs[:3]])
    groups = [np.digitize(p[i] / q[i], [0.3, 0.8, 1.2, 3.0]) for i in range(2)]
    counts = np.zeros((5, 5))
    drafts = np.array([rng.choice(size, size=rounds, p=row) for row in q]).T
    for path, later in zip(drafts, rng.choice(size, size=rounds, p=p[1]), strict=True):
        text = rule.verify(path, p, q, rng).emitted
        counts[groups[0][text[0]], groups[1][text[1] if len(text) > 1 else later]] += 1
    shares = [np.bincount(groups[i], weights=p[i], minlength=5) for i in range(2)]
    return counts.ravel(), np.outer(*shares).ravel()


def test_a_large_vocabulary_is_emitted_as_the_verifier_would() -> None:
    for rule in RULES:
        assert chi_square_p_value(*text_counts(rule, 3000, 20_000)) > 1e-3
    assert chi_square_p_value(*text_counts(_TokenByPlainP(), 3000, 20_000)) < 1e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    ("drafts", "p", "q", "fault"),
    [
        ([0], [[0.5, 0.5]], [[0.5, 0.5]], r"p must be \[gamma \+ 1, V\]"),
        ([], [[0.5, 0.5]], np.zeros((0, 2)), "at least one"),
        ([1], [[0.5, 0.5]] * 2, [[1.0, 0.0]], "token 1 with q = 0"),
        ([0], [[0.5, 0.5]] * 2, [[0.5, 0.2]], "q must sum to 1"),
        ([0], [[0.5, 0.5]] * 2, [[0.5, 0.2, 0.3]], "share a vocabulary"),
    ],
)
def test_what_is_no_drafted_chain_is_refused(rule: Any, drafts: Any, p: Any, q: Any, fault: str) -> None:
    with pytest.raises(CalibrationError, match=fault):
        rule.law(drafts, p, q)
    with pytest.raises(CalibrationError, match=fault):
        rule.verify(drafts, p, q, np.random.default_rng(0))
