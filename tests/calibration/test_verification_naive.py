"""Naive multi-draft verification and greedy verification: fixed sets, EAGLE's loop, independent draws."""

from __future__ import annotations

import numpy as np
import pytest
from enumeration import distributions, instances
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.verification import Greedy, Naive


def eagle_loop(p: np.ndarray, children: list[int]) -> list[float]:
    """EAGLE's evaluation of distinct children: accept with p(x), else strike x from p and renormalise."""
    accepted, reached = [], 1.0
    for x in children:
        accepted.append(reached * p[x])
        reached *= 1.0 - p[x]
        p = np.where(np.arange(len(p)) == x, 0.0, p)
        p = p / p.sum() if p.sum() > 1e-9 else p
    return accepted


@settings(max_examples=100)
@given(p=distributions(5), children=st.permutations(range(5)), k=st.integers(1, 4))
def test_a_fixed_set_is_eagles_loop(p: np.ndarray, children: list[int], k: int) -> None:
    law = Naive().law(p, None, children[:k])
    np.testing.assert_allclose(law.accepted, eagle_loop(p, children[:k]), atol=1e-6)
    assert law.acceptance == pytest.approx(float(p[children[:k]].sum()), abs=1e-12)


@settings(max_examples=100)
@given(instance=instances())
def test_independent_drafts_in_closed_form(instance: tuple[np.ndarray, np.ndarray, int]) -> None:
    p, q, k = instance
    assert Naive("iid").acceptance(p, q, k) == pytest.approx(float((p * (1 - (1 - q) ** k)).sum()), abs=1e-12)


def test_a_deterministic_proposal_is_accepted_with_p_of_it() -> None:
    p, one_hot = np.array([0.2, 0.5, 0.3]), np.array([0.0, 0.0, 1.0])
    assert Naive().acceptance(p, one_hot, 1) == pytest.approx(0.3)
    assert Naive().law(p, None, [2, 0]).tokens == pytest.approx(p)


def test_greedy_accepts_the_first_draft_equal_to_the_argmax_alone() -> None:
    p = np.array([0.4, 0.4, 0.2])
    law = Greedy().law(p, None, [2, 0, 0])
    assert law.accepted.tolist() == [0.0, 1.0, 0.0]
    assert law.tokens.tolist() == [1.0, 0.0, 0.0]
    missed = Greedy().law(p, None, [1, 2])
    assert missed.acceptance == 0.0
    assert missed.correction.tolist() == [1.0, 0.0, 0.0]
    q = np.array([0.1, 0.6, 0.3])
    assert [Greedy("top").acceptance(p, q, k) for k in (1, 2, 3)] == [0.0, 0.0, 1.0]
    assert Greedy("iid").acceptance(p, q, 3) == pytest.approx(1 - 0.9**3)
