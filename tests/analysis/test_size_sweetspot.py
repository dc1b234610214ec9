"""The sweet spot on curves whose maximum, flat region and end of gains are known."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.size.formula import best_lengths
from analysis.size.sweetspot import find_spots, shares_of
from analysis.size.words import parameters_text, share_text

SIZES = np.array([0.01, 0.02, 0.04, 0.08, 0.16])
STEPS = np.arange(9)


def test_with_one_acceptance_for_all_the_smallest_is_best() -> None:
    seconds = 1 + STEPS * SIZES[:, None]
    speed, _ = best_lengths(np.full(5, 0.7), seconds)
    spots = find_spots(SIZES, speed)
    assert spots.best == pytest.approx(SIZES[0])
    assert spots.low == pytest.approx(SIZES[0])
    assert spots.gain_end == pytest.approx(SIZES[0])
    assert not spots.gaining


def test_with_one_latency_for_all_the_largest_is_best() -> None:
    seconds = np.tile(1 + 0.1 * STEPS, (5, 1))
    speed, _ = best_lengths(np.array([0.5, 0.6, 0.7, 0.8, 0.9]), seconds)
    spots = find_spots(SIZES, speed, gain=0.01)
    assert spots.best == pytest.approx(SIZES[-1])
    assert spots.high == pytest.approx(SIZES[-1])
    assert spots.gain_end == pytest.approx(SIZES[-1])
    assert spots.gaining


def test_the_flat_region_of_a_tent_ends_where_its_sides_cross_the_level() -> None:
    """2 at 4%, falling by 0.1 a doubling on either side: 2% below 2 is 0.4 doublings away."""
    tent = 2 - 0.1 * np.abs(np.log2(SIZES / 0.04))
    spots = find_spots(SIZES, tent, within=0.02)
    assert spots.best == pytest.approx(0.04)
    assert spots.low == pytest.approx(0.04 * 2**-0.4)
    assert spots.high == pytest.approx(0.04 * 2**0.4)
    assert find_spots(SIZES, tent, within=0.2).low == pytest.approx(SIZES[0])


def test_the_flat_region_stops_at_the_dip_between_two_humps() -> None:
    humps = np.array([2.0, 1.0, 1.99, 2.0, 1.0])
    spots = find_spots(SIZES, humps[::-1] + np.array([0, 0.001, 0, 0, 0]))
    assert spots.best == pytest.approx(0.02)
    assert 0.02 < spots.high < 0.08
    assert 0.01 < spots.low < 0.02


def test_gains_end_where_the_last_step_worth_its_doubling_ends() -> None:
    curve = np.array([1.0, 1.1, 1.21, 1.215, 1.22])
    spots = find_spots(SIZES, curve, gain=0.05)
    assert spots.gain_end == pytest.approx(0.04)
    assert not spots.gaining
    assert find_spots(SIZES, curve, gain=0.001).gaining


def test_many_curves_at_once_are_each_curve_alone() -> None:
    curves = np.random.default_rng(3).uniform(1, 1.1, (40, 5))
    together = find_spots(SIZES, curves)
    for i, curve in enumerate(curves):
        alone = find_spots(SIZES, curve)
        assert [float(v[i]) for v in together[:4]] == pytest.approx([float(v) for v in alone[:4]])


def test_shares_count_winners_and_near_winners() -> None:
    best, near = shares_of(np.array([[1.0, 2.0], [1.99, 2.0], [3.0, 1.0], [1.0, 2.0]]), ["a", "b"], 0.02)
    assert best == {"a": 0.25, "b": 0.75}
    assert near == {"a": 0.5, "b": 0.75}


def test_numbers_are_told_to_two_digits() -> None:
    assert [parameters_text(n) for n in (None, 51.8e6, 996e6, 1.25e9, 7.1e10)] == ["-", "52M", "1B", "1.2B", "71B"]
    assert [share_text(s) for s in (None, 0.000701, 0.0669, 0.2)] == ["-", "0.07%", "6.7%", "20%"]
