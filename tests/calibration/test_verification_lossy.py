"""Lossy rules: the stated output is the enumerated one, and the loss has the sign and size that the rule implies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enumeration import every_draft, instances, outcome, random_pair, total_variation
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.common.errors import CalibrationError
from calibration.verification import Judge, Lenient, Naive, Thresholds, TokenLevel, Typical

Instance = tuple[np.ndarray, np.ndarray, int]


def check(rule: Any, p: np.ndarray, q: np.ndarray, k: int, drafts: list[tuple[tuple[int, ...], float]]) -> float:
    """The stated output, acceptance and total variation against those summed over all drafts; gives the latter."""
    emitted, accepted = outcome(lambda x: rule.law(p, q, x), drafts)
    assert not rule.lossless
    np.testing.assert_allclose(rule.output(p, q, k), emitted, atol=1e-12)
    assert emitted.sum() == pytest.approx(1.0, abs=1e-12)
    assert rule.acceptance(p, q, k) == pytest.approx(accepted, abs=1e-12)
    loss = total_variation(emitted, p)
    assert rule.total_variation(p, q, k) == pytest.approx(loss, abs=1e-12)
    return loss


@settings(max_examples=120)
@given(instance=instances(), drafting=st.sampled_from(["iid", "top"]), epsilon=st.sampled_from([0.09, 0.3]))
def test_typical_acceptance(instance: Instance, drafting: Any, epsilon: float) -> None:
    p, q, k = instance
    rule = Typical(epsilon, epsilon**0.5, drafting)
    check(rule, p, q, k, every_draft(rule, q, k))


def test_typical_takes_the_most_probable_passing_draft() -> None:
    p = np.array([0.5, 0.3, 0.19, 0.01])
    assert Typical().law(p, None, [3, 1, 0]).accepted.tolist() == [0.0, 0.0, 1.0]
    assert Typical().law(p, None, [3]).acceptance == 0.0
    flat = np.full(100, 0.01)  # entropy ln 100: the bar is 0.3 / 100, so that everything is typical
    assert Typical().law(flat, None, [42]).acceptance == 1.0


@settings(max_examples=120)
@given(instance=instances(most_drafts=1), lenience=st.floats(0.05, 1.0))
def test_lenience_never_emits_more_than_p_over_lenience(instance: Instance, lenience: float) -> None:
    p, q, _ = instance
    rule = Lenient(lenience)
    check(rule, p, q, 1, every_draft(TokenLevel(), q, 1))
    assert np.all(rule.output(p, q) <= p / lenience + 1e-12)
    assert rule.acceptance(p, q) == pytest.approx(float(np.minimum(q, p / lenience).sum()), abs=1e-12)


@settings(max_examples=120)
@given(instance=instances(most_drafts=1), seed=st.integers(0, 1000))
def test_judge(instance: Instance, seed: int) -> None:
    p, q, _ = instance
    judged = np.random.default_rng(seed).random(len(p))
    rule = Judge(judged)
    loss = check(rule, p, q, 1, every_draft(TokenLevel(), q, 1))
    overshoot = np.clip(q - p, 0, None)[judged > 0.5].sum()  # what the judge lets through beyond p
    assert loss == pytest.approx(float(overshoot), abs=1e-12)
    assert rule.acceptance(p, q) == pytest.approx(TokenLevel().acceptance(p, q) + float(overshoot), abs=1e-12)


@settings(max_examples=120)
@given(instance=instances(), single=st.floats(0.05, 1.0), both=st.floats(0.05, 1.0))
def test_thresholds_against_their_loop(instance: Instance, single: float, both: float) -> None:
    p, q, k = instance
    rule = Thresholds(single, both)
    drafts = every_draft(Naive("top"), q, k)
    check(rule, p, q, k, drafts)
    (tokens, _), edges = drafts[0], np.linspace(0, 1, 20001)
    coins = (edges[1:] + edges[:-1]) / 2
    chosen, mass = np.full(coins.size, -1), 0.0
    for i, token in enumerate(tokens):
        mass += p[token]
        chosen[(chosen < 0) & ((coins <= mass / both) | (p[token] >= single))] = i
    frequencies = [float(np.mean(chosen == i)) for i in range(len(tokens))]
    assert rule.law(p, None, tokens).accepted == pytest.approx(frequencies, abs=1e-4)


@settings(max_examples=60)
@given(instance=instances())
def test_lossy_rules_at_their_strictest_are_lossless(instance: Instance) -> None:
    p, q, k = instance
    assert Thresholds(1.0, 1.0).total_variation(p, q, k) < 1e-12
    assert Lenient(1.0).total_variation(p, q, 1) < 1e-12
    assert Judge(np.zeros(len(p))).total_variation(p, q, 1) < 1e-12
    assert Judge(np.ones(len(p))).output(p, q) == pytest.approx(q, abs=1e-12)


def test_loss_grows_with_what_is_forgiven() -> None:
    p, q = random_pair(np.random.default_rng(3), 300, spread=1.5)
    losses = [Lenient(value).total_variation(p, q, 1) for value in (1.0, 0.8, 0.5, 0.2, 0.05)]
    assert losses[0] < 1e-12
    assert np.all(np.diff(losses) > 0.001)
    losses = [Thresholds(1.0, value).total_variation(p, q, 4) for value in (1.0, 0.95, 0.9, 0.8)]
    assert np.all(np.diff(losses) > 0.001)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Lenient(0.0), r"Lenient: lenience must lie in \(0, 1\], got 0.0"),
        (lambda: Typical(epsilon=2.0), r"Typical: epsilon must lie in \(0, 1\], got 2.0"),
        (lambda: Typical(delta=-1.0), "Typical: delta must be > 0, got -1.0"),
        (lambda: Thresholds(threshold_acc=0.0), r"Thresholds: threshold_acc must lie in \(0, 1\], got 0.0"),
        (lambda: Judge([0.5]).law([0.5, 0.5], [0.5, 0.5], [0]), r"Judge: judged must .* 2 tokens, got shape \(1,\)"),
        (lambda: Judge([0.5, 1.5]).acceptance([0.5, 0.5], [0.5, 0.5]), "Judge: judged must .* from 0.5 to 1.5"),
    ],
)
def test_thresholds_without_a_meaning_are_refused(build: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        build()
