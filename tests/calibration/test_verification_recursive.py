"""Recursive rejection: against a plain forward recursion, at exhaustion, and its estimate for large vocabularies."""

from __future__ import annotations

import numpy as np
import pytest
from enumeration import instances, random_pair, without_replacement_tuples
from hypothesis import given, settings

from calibration.common.errors import CalibrationError
from calibration.verification import Recursive, estimate_acceptance


def rejections(p: np.ndarray, q: np.ndarray, drafts: tuple[int, ...]) -> float:
    """The probability that all drafts are rejected, written out step by step."""
    missed = 1.0
    for token in drafts:
        missed *= 1.0 - min(1.0, p[token] / q[token])
        if missed < 1e-14:  # p = q but for rounding: nothing is left to go on with
            return 0.0
        left = np.clip(p - q, 0, None)
        p = left / left.sum()
        q = np.where(np.arange(len(q)) == token, 0.0, q)
        q = q / q.sum() if q.any() else q
    return missed


@settings(max_examples=100)
@given(instance=instances())
def test_acceptance_without_replacement_is_the_sum_over_drafts(instance: tuple[np.ndarray, np.ndarray, int]) -> None:
    p, q, k = instance
    missed = sum(weight * rejections(p, q, drafts) for drafts, weight in without_replacement_tuples(q, k))
    assert Recursive().acceptance(p, q, k) == pytest.approx(1.0 - missed, abs=1e-10)


def test_k_2_at_a_large_vocabulary_against_the_sum_over_rejected_drafts() -> None:
    p, q = random_pair(np.random.default_rng(1), 1000)
    rest = np.clip(p - q, 0, None) / np.clip(p - q, 0, None).sum()
    total = np.minimum(p, q).sum()
    for x in np.flatnonzero(q > p):
        second = q / (1.0 - q[x])
        second[x] = 0.0
        total += (q[x] - p[x]) * np.minimum(rest, second).sum()
    assert Recursive().acceptance(p, q, 2) == pytest.approx(float(total), abs=1e-12)


def test_draft_set_stops_growing_with_the_support() -> None:
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.6, 0.4, 0.0])
    rule = Recursive()
    drafts = rule.draw(q, 5, np.random.default_rng(0))
    assert sorted(drafts.tolist()) == [0, 1]
    assert rule.acceptance(p, q, 5) == pytest.approx(rule.acceptance(p, q, 2), abs=1e-15)
    law = rule.law(p, q, drafts)
    assert law.correction == pytest.approx([0.0, 0.0, 1.0])


def test_estimate_agrees_with_the_exact_value() -> None:
    p, q = random_pair(np.random.default_rng(2), 200, spread=2.0)
    for k in (3, 4):
        exact = Recursive().acceptance(p, q, k)
        found = estimate_acceptance(p, q, k, 400, np.random.default_rng(k))
        assert abs(found.mean - exact) < 4.0 * found.standard_error
        assert 0.0 < found.standard_error < 0.01
        assert found.by_token.sum() == pytest.approx(found.mean, abs=1e-12)
        by_token = Recursive().acceptance_by_token(p, q, k)
        assert np.abs(found.by_token - by_token).sum() < 0.02


def test_estimate_of_two_drafts_is_exact() -> None:
    p, q = random_pair(np.random.default_rng(3), 500)
    found = estimate_acceptance(p, q, 2, 3, np.random.default_rng(0))
    assert found.standard_error < 1e-15
    assert found.mean == pytest.approx(Recursive().acceptance(p, q, 2), abs=1e-12)


def test_what_is_out_of_reach_is_refused_and_points_to_the_estimate() -> None:
    p, q = random_pair(np.random.default_rng(4), 50_000)
    with pytest.raises(CalibrationError, match=r"Recursive.acceptance: .*; estimate_acceptance gives an unbiased"):
        Recursive().acceptance(p, q, 3)
    with pytest.raises(CalibrationError, match="draws must be >= 2, got 1"):
        estimate_acceptance(p, q, 3, 1, np.random.default_rng(0))


def test_distinct_drafts_are_asked_for() -> None:
    q = np.full(4, 0.25)
    with pytest.raises(CalibrationError, match=r"Recursive.law: drafts must be distinct, got \[1, 1\]"):
        Recursive().law(q, q, [1, 1])
    assert Recursive("iid").law(q, q, [1, 1]).acceptance == 1.0
