"""The classifier of prompts: calibration by hand, expected value instead of the likeliest label, nothing leaked."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from analysis.common.bootstrap import ClusterBootstrap
from analysis.routing.classifier import (
    Guesses,
    cheapest,
    fit_temperature,
    guess,
    possible_folds,
    quality,
    reliability,
)


def given(probability: list[list[float]], labels: list[int], fold: list[int]) -> Guesses:
    belief = np.array(probability)
    classes = tuple("xyz"[: belief.shape[1]])
    return Guesses(classes, np.array(labels), belief, belief, np.array(fold), (1.0,))


def test_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (4000, 3))
    weights = np.exp(logits)
    labels = np.array([rng.choice(3, p=row / row.sum()) for row in weights])
    assert fit_temperature(5 * logits, labels) == pytest.approx(5, rel=0.1)
    assert fit_temperature(logits / 4, labels) == pytest.approx(0.25, rel=0.1)


def test_the_drafter_is_chosen_by_expected_cost_not_by_the_likeliest_domain() -> None:
    # Training (fold 1): drafter 0 takes 1 s a token on x and 10 on y, drafter 1 takes 2 on both. At P(x) = 0.6 the
    # likeliest domain says drafter 0, the expectation 0.6 * 1 + 0.4 * 10 = 4.6 > 2 says drafter 1.
    seconds = np.array([[0.0, 0.0], [0.0, 0.0], [10.0, 20.0], [100.0, 20.0]])
    tokens = np.array([10.0, 10.0, 10.0, 10.0])
    guesses = given([[0.6, 0.4], [0.95, 0.05], [1, 0], [0, 1]], [0, 0, 0, 1], [0, 0, 1, 1])
    assert cheapest(guesses, seconds, tokens)[:2].tolist() == [1, 0]
    assert cheapest(guesses, seconds, tokens, certain=True)[:2].tolist() == [0, 0]


def test_scores_by_hand() -> None:
    guesses = given([[0.8, 0.2], [0.4, 0.6], [0.5, 0.5], [0.3, 0.7]], [0, 0, 1, 1], [0, 1, 0, 1])
    found = quality(guesses, ClusterBootstrap(["x"] * 4, np.random.default_rng(0), draws=50))
    assert found.accuracy.value == 0.5  # of a tie, the first
    brier = (2 * 0.2**2 + 2 * 0.6**2 + 2 * 0.5**2 + 2 * 0.3**2) / 4
    assert found.brier.value == pytest.approx(brier)
    assert found.log_loss.value == pytest.approx(-np.log([0.8, 0.4, 0.5, 0.7]).mean(), rel=1e-5)
    assert found.log_loss_shares == pytest.approx(np.log(2), rel=1e-5)
    # Bins of one prompt each: |0.5 - 0|, |0.6 - 0|, |0.7 - 1|, |0.8 - 1|.
    assert found.ece == pytest.approx((0.5 + 0.6 + 0.3 + 0.2) / 4)


def test_reliability_bins_hold_equally_many() -> None:
    confidence, hit = np.linspace(0.5, 0.95, 10), np.array([0, 1] * 5, dtype=float)
    bins = reliability(confidence, hit)
    assert [b.right.requests for b in bins] == [2] * 5
    assert [b.right.value for b in bins] == [0.5] * 5
    assert bins[0].confidence == pytest.approx(0.525)
    # Clopper and Pearson 1934 for one of two: 0.0126 to 0.9874.
    assert (bins[0].right.low, bins[0].right.high) == (
        pytest.approx(0.0126, abs=1e-4),
        pytest.approx(0.9874, abs=1e-4),
    )


def test_labels_that_say_nothing_are_not_found() -> None:
    """Out of fold: with words unrelated to the domain, accuracy is chance, and calibration owns up to it."""
    rng = np.random.default_rng(4)
    counts = csr_matrix(rng.poisson(0.3, (120, 80)).astype(float))
    domains = ["x", "y", "z"] * 40
    guesses = guess(counts, domains, np.arange(120), 4, 0)
    hit = (guesses.probability.argmax(axis=1) == guesses.labels).mean()
    assert hit == pytest.approx(1 / 3, abs=0.13)
    assert guesses.probability.max(axis=1).mean() < 0.5
    assert guesses.uncalibrated.sum(axis=1) == pytest.approx(np.ones(120))


def test_equal_prompts_stay_together() -> None:
    """Each prompt twice, labels at random but equal within a pair: a leak would make this look learnable."""
    rng = np.random.default_rng(6)
    once = rng.poisson(0.3, (60, 80)).astype(float)
    labels = np.repeat(rng.permutation(["x", "y"] * 30), 2)
    groups = np.repeat(np.arange(60), 2)
    guesses = guess(csr_matrix(np.repeat(once, 2, axis=0)), labels.tolist(), groups, 5, 0)
    assert len({tuple(guesses.fold[groups == g].tolist()) for g in range(60)}) <= 5
    assert all(len(set(guesses.fold[groups == g].tolist())) == 1 for g in range(60))
    assert (guesses.probability.argmax(axis=1) == guesses.labels).mean() < 0.7


def test_folds_leave_every_domain_in_training() -> None:
    labels, groups = np.array([0, 0, 0, 1, 1]), np.arange(5)
    assert possible_folds(labels, groups, 5) == 2
    assert possible_folds(labels, np.array([0, 1, 2, 3, 3]), 5) == 1  # the two prompts of domain 1 are equal
    assert possible_folds(np.zeros(5, dtype=int), groups, 5) == 0
