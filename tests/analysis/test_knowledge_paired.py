"""Paired tests against hand-counted answers."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.knowledge.compare import FLIPS, flip_test, holm


def sums(accepted: list[float], rounds: list[float] | None = None) -> np.ndarray:
    return np.column_stack([accepted, rounds if rounds is not None else [1.0] * len(accepted)]).astype(float)


def test_exact_test_counts_flips() -> None:
    # Differences 1, 2, 3: of the eight sign patterns only all-plus and all-minus are as extreme.
    p, exact = flip_test(sums([1, 2, 3]), sums([0, 0, 0]), np.random.default_rng(0))
    assert (p, exact) == (0.25, True)
    # Differences 3, 1, -2 sum to 2; patterns with |sum| >= 2: all but +-(3 - 1 - 2) = 0, that is six of eight.
    p, _ = flip_test(sums([3, 1, 0]), sums([0, 0, 2]), np.random.default_rng(0))
    assert p == 0.75


def test_the_statistic_is_a_ratio_of_sums() -> None:
    # Prompt 1: 10 of 5 rounds against 2 of 5; prompt 2: 1 of 1 on both sides. Flipping prompt 2 changes nothing,
    # flipping prompt 1 turns the sign round: every pattern is as extreme as the observed one.
    p, exact = flip_test(sums([10, 1], [5, 1]), sums([2, 1], [5, 1]), np.random.default_rng(0))
    assert (p, exact) == (1.0, True)


def test_drawn_flips_agree_with_the_exact_ones() -> None:
    rng = np.random.default_rng(5)
    first, second = sums(list(rng.normal(0.5, 1, 13) + 5)), sums(list(rng.normal(0, 1, 13) + 5))
    p, exact = flip_test(first, second, rng)
    assert exact
    # A fourteenth prompt without any difference doubles every pattern: same p, now from drawn flips.
    more = [np.vstack([part, [[4.0, 1.0]]]) for part in (first, second)]
    drawn, exact = flip_test(*more, rng)
    assert not exact
    assert drawn == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / FLIPS) + 1e-4)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    p = [flip_test(sums(list(rng.normal(5, 1, 9))), sums(list(rng.normal(5, 1, 9))), rng)[0] for _ in range(400)]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.045)  # three standard errors


def test_holm_by_hand() -> None:
    # Sorted .01 * 3, .03 * 2, .04 * 1, each at least the one before: .03, .06, .06.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_no_prompts_no_evidence() -> None:
    assert flip_test(np.zeros((0, 2)), np.zeros((0, 2)), np.random.default_rng(0)) == (1.0, True)
