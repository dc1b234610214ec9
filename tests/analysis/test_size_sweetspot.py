"""The sweet spot on curves whose maximum, flat region and end of gains are known."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.common.bootstrap import ClusterBootstrap
from analysis.size.facts import best_lengths
from analysis.size.findings import parameters_text, share_text
from analysis.size.sweetspot import find_spots, judge_sizes, likely_best, shares_of

Contest = tuple[np.ndarray, np.ndarray, None]
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


def drawn_contests(rng: np.random.Generator, speedups: np.ndarray, requests: int, batches: int = 3) -> list[Contest]:
    """Seconds of requests on curves of several batch sizes, whose true speed-ups (sizes, lengths) are all alike."""
    plain = np.exp(rng.normal(0, 0.4, requests))
    noise = rng.normal(1, 0.15, (*speedups.shape, requests))
    wobble = [rng.normal(1, 0.05, noise.shape) for _ in range(batches)]
    return [(plain, plain * noise * each / speedups[..., None], None) for each in wobble]


def test_where_no_size_pays_at_most_one_study_in_twenty_says_so() -> None:
    """Six sizes by six lengths on three curves, all as fast as no speculation."""
    rng, repeats = np.random.default_rng(51), 500
    pays = naive = left_out = 0
    for _ in range(repeats):
        contests = drawn_contests(rng, np.full((6, 6), 1.0), 72)
        bootstrap = ClusterBootstrap(["a", "b"] * 36, rng, draws=300)
        judged = judge_sizes(bootstrap, contests)
        pays += any(one.bounds[0] > 1 for one in judged)
        left_out += any(not one.may_be_best.all() for one in judged)
        plain, seconds, _ = contests[0]
        best = seconds.sum(axis=2).argmin()
        sums = np.column_stack([plain, seconds.reshape(36, -1)[best]])
        (alone,) = bootstrap.estimates(lambda s: s[..., :1] / s[..., 1:], sums)
        naive += alone.low > 1
    assert pays / repeats <= 0.05
    assert naive / repeats > 0.2  # the interval of a fixed choice, given to the winner
    assert left_out / repeats <= 0.05 + 0.06


def test_a_size_that_pays_is_found_and_named() -> None:
    """Power: one size of 1.12 times no speculation, six standard errors, is seen in 8 of 10 studies."""
    rng, repeats, found = np.random.default_rng(52), 30, 0
    true = np.full((6, 6), 0.9)
    true[2, 3] = 1.12
    for _ in range(repeats):
        judged = judge_sizes(ClusterBootstrap(["a"] * 72, rng, draws=300), drawn_contests(rng, true, 72))
        found += all(one.bounds[0] > 1 for one in judged)
        assert all(one.may_be_best[2] for one in judged)
        assert all(one.may_be_best.sum() <= 2 for one in judged)
    assert found / repeats >= 0.8
    assert judge_sizes(ClusterBootstrap(["a"] * 4, rng, draws=100), []) == []


def test_the_likely_best_make_up_the_level_in_their_own_order() -> None:
    assert likely_best({"a": 0.3, "b": 0.02, "c": 0.68}) == ("a", "c")
    assert likely_best({"a": 0.3, "b": 0.12, "c": 0.58}) == ("a", "b", "c")
    assert likely_best({"a": 0.0, "b": 1.0}) == ("b",)
