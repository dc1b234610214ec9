"""Closed forms of drafting at a constant rate, against sums written out and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.size.facts import (
    best_lengths,
    break_even_rate,
    continuous_best_length,
    rate_of_length,
    tokens_per_round,
)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_tokens_of_a_round_are_the_sum_of_powers(rate: float, k: int) -> None:
    assert float(tokens_per_round(rate, k)) == pytest.approx(sum(rate**i for i in range(k + 1)), rel=1e-12)


def test_the_rate_of_a_length_is_the_rate_it_was_made_with() -> None:
    for rate in (0.05, 0.5, 0.93):
        assert rate_of_length(float(tokens_per_round(rate, 3)), 3) == pytest.approx(rate, abs=1e-9)
    with pytest.raises(ValueError, match=r"must lie in \[1, 4\], got 4.2"):
        rate_of_length(4.2, 3)


@pytest.mark.parametrize("rate", [0.4, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("ratio", [0.005, 0.02, 0.1, 0.3])
def test_lamberts_draft_length_lies_beside_the_best_whole_one(rate: float, ratio: float) -> None:
    lengths = np.arange(0, 400)
    speed = tokens_per_round(rate, lengths) / (lengths * ratio + 1)
    whole = int(speed.argmax())
    continuous = float(continuous_best_length(rate, ratio))
    assert abs(continuous - whole) < 1
    at = float(tokens_per_round(rate, continuous) / (continuous * ratio + 1))
    assert at >= speed.max() - 1e-12
    nearby = continuous + np.array([-1e-4, 1e-4])
    assert (tokens_per_round(rate, nearby) / (nearby * ratio + 1) <= at + 1e-12).all()


def test_lamberts_draft_length_is_nought_where_drafting_cannot_pay_and_finite_where_it_is_almost_free() -> None:
    assert float(continuous_best_length(0.1, 0.2)) == 0
    free = float(continuous_best_length(0.99, 1e-6))
    lengths = np.arange(1, 3000)
    assert abs(free - lengths[(tokens_per_round(0.99, lengths) / (lengths * 1e-6 + 1)).argmax()]) < 2


def test_best_lengths_agree_with_trying_every_length() -> None:
    seconds = np.array([[1.0, 1.1, 1.25, 1.5, 2.0], [1.0, 1.02, 1.04, 1.06, 1.08]])
    rates = np.array([[0.6, 0.6], [0.1, 0.9]])
    speed, length = best_lengths(rates, seconds)
    for draw in range(2):
        for drafter in range(2):
            a, s = rates[draw, drafter], seconds[drafter]
            tried = [sum(a**i for i in range(k + 1)) * s[0] / s[k] for k in range(1, 5)]
            assert speed[draw, drafter] == pytest.approx(max(tried))
            assert length[draw, drafter] == 1 + int(np.argmax(tried))


def test_a_drafter_breaks_even_at_the_rate_that_gives_it_the_speed_asked_for() -> None:
    dear = np.linspace(1.0, 2.6, 9, dtype=np.float64)
    needed = break_even_rate(2.0, dear)
    assert needed is not None
    assert best_lengths(np.array([needed]), dear[None])[0][0] == pytest.approx(2.0, rel=1e-8)
    assert break_even_rate(9.0, dear) is None
