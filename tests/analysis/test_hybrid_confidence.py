"""Stopping policies that read confidence, against the best fixed length and the length oracle."""

from __future__ import annotations

import numpy as np
import pytest
from builders import felt_traces

from analysis.bootstrap import Estimate
from analysis.hybrid.confidence import WANTED, confidence_cell, judge_confidence, step_prices
from analysis.hybrid.findings import Cell, PolicyResult
from analysis.hybrid.gap import gap_statistic


def test_a_cell_orders_best_fixed_policy_and_oracle() -> None:
    traces, _ = felt_traces(np.random.default_rng(0), sequences=10, output_tokens=100)
    cell = confidence_cell(
        "made up", traces, "drafter", 1, policies={"learned": {"policy": "learned"}}, fixed=(0, 1, 2, 3)
    )
    best, oracle, own = (e.value or 0 for e in (cell.best, cell.oracle, cell.policy("learned").speedup))
    assert 1 < best < own < oracle
    assert cell.policy("learned").gap_share.value == pytest.approx((own - best) / (oracle - best), rel=1e-4)
    assert cell.best_tokens in (1, 2, 3)
    assert cell.requests == 10


def test_gap_shares_are_those_of_the_sums() -> None:
    found = gap_statistic(np.array([10.0, 20.0, 40.0, 30.0, 10.0]))
    assert found.tolist() == pytest.approx([2, 4, 3, 0.5, 0.5, 1, -0.5, -0.5])


def test_the_target_is_judged_by_the_point_estimate() -> None:
    def cell(share: float) -> Cell:
        one = Estimate(1.0, 0.9, 1.1, 5)
        result = PolicyResult("learned", one, one, Estimate(share, 0.0, 1.0, 5))
        return Cell("made up", 1, "per step", 5, 50, "drafter", 3, one, one, (result,))

    assert [r.met for r in judge_confidence([cell(WANTED), cell(WANTED - 0.01)])] == [True, False]


def test_a_step_costs_what_it_is_said_to() -> None:
    assert step_prices("drafter", 1e-3).drafters["drafter"].model_dump()["base_s"] == 1e-3
    assert step_prices("drafter").drafters["drafter"].model_dump()["charged"] == "per_step"
