"""The optimum: prefix formula, linear program and brute-force minimal cut agree; greedy drafts attain theirs."""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import pytest
from enumeration import every_draft, greedy_tuples, instances
from hypothesis import given, settings

from calibration.common.errors import CalibrationError
from calibration.verification import GreedyDrafts, Naive, OptimalTransport, Recursive, optimal_coupling

Drafting = Literal["iid", "without_replacement"]


def minimal_cut(p: np.ndarray, drafts: list[tuple[tuple[int, ...], float]]) -> float:
    """min over all 2^V sets H of p(H) + 1 - P(all drafts in H): the dual of the transport, by brute force."""
    best = 1.0
    for inside in product([False, True], repeat=len(p)):
        held = sum(weight for row, weight in drafts if all(inside[x] for x in row))
        best = min(best, float(p[list(inside)].sum()) + 1.0 - held)
    return best


@pytest.mark.parametrize("drafting", ["iid", "without_replacement"])
@settings(max_examples=150)
@given(instance=instances())
def test_prefixes_give_the_minimal_cut_and_the_program_attains_it(
    drafting: Drafting, instance: tuple[np.ndarray, np.ndarray, int]
) -> None:
    p, q, k = instance
    rule = OptimalTransport(drafting)
    cut = minimal_cut(p, every_draft(rule, q, k))
    assert rule.acceptance(p, q, k) == pytest.approx(cut, abs=1e-12)
    assert optimal_coupling(p, q, k, drafting).acceptance == pytest.approx(cut, abs=1e-7)


def test_a_drafter_that_is_all_but_sure_loses_no_digits() -> None:
    """Of two draws without replacement the second is one of two rare tokens, each as likely: 1/2."""
    q = np.array([0.0, 1e-9, 1e-9, 1.0]) / (1.0 + 2e-9)
    p = np.array([0.0, 0.0, 1.0, 0.0])
    assert OptimalTransport("without_replacement").acceptance(p, q, 2) == pytest.approx(0.5, abs=1e-12)


@settings(max_examples=100)
@given(instance=instances())
def test_greedy_drafts_attain_their_own_minimal_cut(instance: tuple[np.ndarray, np.ndarray, int]) -> None:
    p, q, k = instance
    cut = minimal_cut(p, greedy_tuples(q, k))
    assert GreedyDrafts().acceptance(p, q, k) == pytest.approx(cut, abs=1e-12)


@pytest.mark.parametrize("drafting", ["iid", "without_replacement"])
def test_coupling_is_a_flow_within_its_bounds(drafting: Drafting) -> None:
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(9), size=2)
    coupling = optimal_coupling(p, q, 3, drafting)
    assert sum(coupling.chances.values()) == pytest.approx(1.0, abs=1e-12)
    assert np.all(coupling.accepted_by_token <= p + 1e-15)
    for drafts, flow in coupling.flows.items():
        assert set(flow) == set(drafts)
        assert 0.0 <= sum(flow.values()) <= coupling.chances[drafts] + 1e-15


def test_acceptance_is_one_exactly_when_p_covers_q_squared() -> None:
    """Two independent drafts are always accepted iff p(S) >= q(S)^2 for every S (Khisti et al.)."""
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(200):
        q = rng.dirichlet(np.ones(3))
        p = 0.7 * q + 0.3 * rng.dirichlet(np.ones(3))
        covered = all(p[list(s)].sum() >= q[list(s)].sum() ** 2 - 1e-13 for s in product([False, True], repeat=3))
        assert (OptimalTransport("iid").acceptance(p, q, 2) > 1.0 - 1e-12) == covered
        seen.add(covered)
    assert seen == {True, False}


def test_optimum_bounds_other_rules_on_a_large_vocabulary() -> None:
    rng = np.random.default_rng(6)
    p, q = rng.dirichlet(np.full(400, 0.1), size=2)
    for k in (1, 2, 3, 5):
        best = OptimalTransport("without_replacement").acceptance(p, q, k)
        assert Naive("without_replacement").acceptance(p, q, k) < best
        assert OptimalTransport("iid").acceptance(p, q, k) <= best + 1e-12
        if k <= 3:
            assert Recursive().acceptance(p, q, k) <= best + 1e-12


def test_too_large_a_program_is_refused() -> None:
    q = np.full(400, 1 / 400)
    with pytest.raises(CalibrationError, match=r"optimal_coupling: V\^k must stay below 50,000 .* got 400\^2"):
        OptimalTransport().law(q, q, [1, 2])


def test_drafts_that_are_not_greedy_are_refused() -> None:
    q = np.array([0.5, 0.3, 0.2])
    with pytest.raises(CalibrationError, match=r"GreedyDrafts.law: .* the top of q, \[0\].* got \[1, 2\]"):
        GreedyDrafts().law(q, q, [1, 2])
