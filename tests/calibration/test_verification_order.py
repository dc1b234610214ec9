"""The order in which the rules accept, on random instances."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.verification import GreedyDrafts, KSequential, Naive, OptimalTransport, Recursive

SLACK = 1e-12


def instances(number: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    rng = np.random.default_rng(11)
    return [
        (rng.dirichlet(np.full(size, 0.7)), rng.dirichlet(np.full(size, 0.7)), int(rng.integers(2, 4)))
        for size in rng.integers(2, 6, size=number)
    ]


@pytest.fixture(scope="module")
def acceptances() -> dict[str, np.ndarray]:
    rules = {
        "naive iid": Naive("iid"),
        "naive wor": Naive("without_replacement"),
        "recursive iid": Recursive("iid"),
        "recursive wor": Recursive("without_replacement"),
        "k-seq": KSequential(),
        "optimal iid": OptimalTransport("iid"),
        "optimal wor": OptimalTransport("without_replacement"),
        "greedy drafts": GreedyDrafts(),
    }
    cases = instances(800)
    return {name: np.array([rule.acceptance(*case) for case in cases]) for name, rule in rules.items()}


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("naive iid", "recursive iid"),
        ("naive wor", "recursive wor"),
        ("naive iid", "naive wor"),
        ("recursive iid", "k-seq"),
        ("k-seq", "optimal iid"),
        ("recursive iid", "recursive wor"),
        ("optimal iid", "optimal wor"),
        ("recursive wor", "optimal wor"),
    ],
)
def test_order(acceptances: dict[str, np.ndarray], less: str, more: str) -> None:
    gap = acceptances[more] - acceptances[less]
    assert gap.min() >= -SLACK
    assert gap.max() > 0.01  # not the same rule twice


def test_k_sequential_guarantee_and_tightness(acceptances: dict[str, np.ndarray]) -> None:
    ratio = acceptances["k-seq"] / acceptances["optimal iid"]
    assert 1.0 - 1.0 / np.e <= ratio.min() < 0.95


def test_greedy_drafts_win_sometimes_and_lose_sometimes(acceptances: dict[str, np.ndarray]) -> None:
    for other in ("optimal iid", "optimal wor"):
        below = np.mean(acceptances["greedy drafts"] < acceptances[other] - SLACK)
        assert 0.02 < below < 0.98


def test_more_drafts_never_accept_less() -> None:
    rules = [Naive("iid"), Naive("top"), Recursive("iid"), Recursive(), KSequential(), OptimalTransport("iid")]
    for p, q, _ in instances(60):
        for rule in rules:
            rising = [rule.acceptance(p, q, k) for k in (1, 2, 3, 4)]
            assert np.all(np.diff(rising) >= -SLACK), rule
