"""What verification costs at V = 150,000, against one numpy sort of V numbers. Run with --benchmark-enable."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from enumeration import random_pair

from calibration.verification import (
    GreedyDrafts,
    KSequential,
    Naive,
    OptimalTransport,
    Recursive,
    Thresholds,
    TokenLevel,
    Typical,
    estimate_acceptance,
)

VOCABULARY = 150_000
DRAFTS = 4
RULES = [
    Naive("top"),
    Naive("iid"),
    Naive("without_replacement"),
    Recursive("iid"),
    Recursive("without_replacement"),
    KSequential(),
    GreedyDrafts(),
    Typical(),
    Thresholds(0.9, 0.9),
]
EXACT = [
    (Naive("iid"), 4),
    (Naive("without_replacement"), 2),
    (Naive("without_replacement"), 4),
    (Recursive("iid"), 4),
    (Recursive("without_replacement"), 2),
    (KSequential(), 4),
    (GreedyDrafts(), 4),
    (OptimalTransport("iid"), 4),
    (OptimalTransport("without_replacement"), 2),
    (OptimalTransport("without_replacement"), 4),
]


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    return random_pair(np.random.default_rng(0), VOCABULARY)


def note_sorts(benchmark: Any, values: np.ndarray) -> None:
    """Put the cost beside that of sorting, the yardstick of O(V log V)."""
    if benchmark.stats is None:
        return
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.sort(values)
        times.append(time.perf_counter() - start)
    benchmark.extra_info["numpy sorts"] = round(benchmark.stats.stats.min / min(times), 2)
    print(f"\n{benchmark.name}: {benchmark.extra_info['numpy sorts']} sorts of {VOCABULARY:,}")


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_draw_and_verify(benchmark: Any, pair: tuple[np.ndarray, np.ndarray], rule: Any) -> None:
    p, q = pair
    rng = np.random.default_rng(1)
    verdict = benchmark(lambda: rule.verify(p, q, rule.draw(q, DRAFTS, rng), rng))
    assert 0 <= verdict.token < VOCABULARY
    note_sorts(benchmark, p)


def test_draw_and_verify_one_draft(benchmark: Any, pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    rng, rule = np.random.default_rng(1), TokenLevel()
    assert 0 <= benchmark(lambda: rule.verify(p, q, rule.draw(q, 1, rng), rng)).token < VOCABULARY
    note_sorts(benchmark, p)


@pytest.mark.parametrize(("rule", "k"), EXACT, ids=repr)
def test_exact_acceptance(benchmark: Any, pair: tuple[np.ndarray, np.ndarray], rule: Any, k: int) -> None:
    p, q = pair
    assert 0.0 < benchmark(rule.acceptance, p, q, k) < 1.0
    note_sorts(benchmark, p)


def test_estimate_of_recursive_rejection(benchmark: Any, pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    found = benchmark(lambda: estimate_acceptance(p, q, DRAFTS, 2, np.random.default_rng(2)))
    assert 0.0 < found.mean < 1.0
    note_sorts(benchmark, p)
