"""Stopping policies that read confidence, against the best fixed length and the length oracle."""

from __future__ import annotations

import numpy as np
import pytest
from builders import felt_traces

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from studies.hybrid.confidence import WANTED, confidence_cell, step_prices
from studies.hybrid.gap import NEVER_BELOW, Question, alike, gap_statistic, judged, margins


def test_a_cell_orders_best_fixed_policy_and_oracle() -> None:
    traces, _ = felt_traces(np.random.default_rng(0), sequences=10, output_tokens=100)
    cell, (asked,) = confidence_cell(
        "made up", traces, "drafter", 1, policies={"learned": {"policy": "learned"}}, fixed=(0, 1, 2, 3)
    )
    best, oracle, own = (e.value or 0 for e in (cell.best, cell.oracle, cell.policy("learned").speedup))
    assert 1 < best < own < oracle
    assert cell.policy("learned").gap_share.value == pytest.approx((own - best) / (oracle - best), rel=1e-4)
    assert cell.best_tokens in (1, 2, 3)
    assert cell.requests == 10
    assert f"drafter {cell.best_tokens}" in cell.best_alike
    assert (asked.policy, asked.wanted, asked.reached) == ("learned", WANTED, cell.policy("learned").gap_share)
    (result,) = judged([asked])
    assert result.margin.value == pytest.approx(own - best - WANTED * (oracle - best), rel=1e-4)


def test_gap_shares_are_those_of_the_sums() -> None:
    found = gap_statistic(np.array([10.0, 20.0, 40.0, 30.0, 10.0]))
    assert found.tolist() == pytest.approx([2, 4, 3, 0.5, 0.5, 1, -0.5, -0.5])


def drawn_questions(
    rng: np.random.Generator, policies: int, beyond: float, target: str, wanted: float, requests: int = 60
) -> list[Question]:
    """Policies that truly lie `beyond` the target, eight fixed drafts of one speed, an oracle; noisy rates."""
    base = np.exp(rng.normal(0, 0.2, requests))
    scale = base * np.exp(rng.normal(0, 0.1, requests))
    noisy = [scale * (1.5 + rng.normal(0, 0.3, requests)) for _ in range(8)]
    oracle = scale * (2.5 + rng.normal(0, 0.1, requests))
    asked = 1.5 * (1 + wanted) if target == NEVER_BELOW else 1.5 + wanted
    bootstrap = ClusterBootstrap(["all"] * requests, rng, draws=300)
    reached = Estimate(0.0, None, None, requests)
    return [
        Question(
            target,
            "made up",
            1,
            "x",
            str(i),
            wanted,
            reached,
            margins(bootstrap, base, own, oracle, noisy, target, wanted),
        )
        for i in range(policies)
        for own in [scale * (asked + beyond + rng.normal(0, 0.3, requests))]
    ]


@pytest.mark.parametrize(("target", "wanted"), [("share", 0.4), (NEVER_BELOW, -0.01)])
def test_a_target_just_reached_by_many_is_rarely_said_to_be_met_or_missed(target: str, wanted: float) -> None:
    """All of ten policies lie exactly on the target: at most 5% of studies say that one meets it."""
    rng, repeats = np.random.default_rng(21), 200
    wrong = either = 0
    for _ in range(repeats):
        questions = drawn_questions(rng, 10, 0.0, target, wanted)
        verdicts = {result.verdict for result in judged(questions)}
        wrong += "met" in verdicts
        either += verdicts != {"open"}
    assert wrong / repeats <= 0.05
    assert either / repeats <= 0.05 + 0.046  # nominal 5%; 3 binomial standard errors


def test_a_target_well_reached_is_met_and_one_far_off_is_missed() -> None:
    """Power: 0.3 of a speed-up beyond the target, seven standard errors, is seen for every policy in 9 of 10."""
    rng, repeats = np.random.default_rng(22), 40
    met = sum(
        all(r.verdict == "met" for r in judged(drawn_questions(rng, 3, 0.3, "share", 0.4))) for _ in range(repeats)
    )
    assert met / repeats >= 0.9
    far = judged(drawn_questions(rng, 3, -0.5, "share", 0.4))
    assert [r.verdict for r in far] == ["missed"] * 3
    assert judged([]) == ()


def test_fixed_drafts_that_may_be_the_best_are_named() -> None:
    rng = np.random.default_rng(23)
    bootstrap = ClusterBootstrap(["all"] * 60, rng, draws=300)
    rates = [level + rng.normal(0, 0.1, 60) for level in (1.0, 2.0, 2.0, 1.5)]
    assert set(alike(bootstrap, ["a", "b", "c", "d"], rates)) >= {"b", "c"}
    assert not set(alike(bootstrap, ["a", "b", "c", "d"], rates)) & {"a", "d"}


def test_a_step_costs_what_it_is_said_to() -> None:
    assert step_prices("drafter", 1e-3).drafters["drafter"].model_dump()["base_s"] == 1e-3
    assert step_prices("drafter").drafters["drafter"].model_dump()["charged"] == "per_step"
