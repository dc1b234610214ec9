"""Arrival processes against their exact laws (Kolmogorov-Smirnov with fixed seeds), and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulator import Scenario
from simulator.playback.replay import select_sequences
from simulator.workload import OpenSource, Request, make_source
from simulator.workload.arrivals import Limits, PiecewiseRate, gamma, piecewise, poisson

SEQUENCES = select_sequences(iid_traces(0.5, np.random.default_rng(0), sequences=5, output_tokens=8))


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaps_of(times: np.ndarray) -> np.ndarray:
    return np.diff(times, prepend=0.0)


def source(seed: int = 0, **load: object) -> OpenSource:
    made = make_source(Scenario.model_validate({"seed": seed, "workload": load}), SEQUENCES)
    assert isinstance(made, OpenSource)
    return made


def all_requests(made: OpenSource) -> list[Request]:
    return made.admit(math.inf, made.counted)


def times_of(seed: int = 0, **load: object) -> np.ndarray:
    return np.array([request.arrival_s for request in all_requests(source(seed, **load))])


def test_poisson_gaps_are_exponential() -> None:
    gaps = gaps_of(poisson(4.0, Limits(20_000), rng()))
    assert stats.kstest(gaps, stats.expon(scale=0.25).cdf).pvalue > 0.01
    # Independent of each other: no correlation at lag 1 (standard error 1 / sqrt(n)).
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 3.5 / math.sqrt(20_000)


def test_poisson_counts_in_a_time_are_poisson() -> None:
    counts = np.array([len(poisson(3.0, Limits(until_s=10.0), rng(seed))) for seed in range(3000)])
    assert counts.mean() == pytest.approx(30, abs=3.5 * math.sqrt(30 / 3000))
    assert counts.var() == pytest.approx(30, rel=3.5 * math.sqrt(2 / 3000))


@pytest.mark.parametrize("cv", [0.2, 0.7, 1.0, 3.0])
def test_gamma_gaps_have_their_mean_their_cv_and_their_law(cv: float) -> None:
    n = 20_000
    gaps = gaps_of(gamma(5.0, cv, Limits(n), rng(3)))
    assert gaps.mean() == pytest.approx(0.2, rel=3.5 * cv / math.sqrt(n))
    # Relative standard error of the variance of a gamma: sqrt((2 + 6 cv^2) / n).
    assert gaps.var() == pytest.approx((0.2 * cv) ** 2, rel=3.5 * math.sqrt((2 + 6 * cv**2) / n))
    # Kolmogorov-Smirnov at 1 %, above the grain that sums of gaps have as numbers.
    grid = np.geomspace(1e-8, gaps.max(), 2000)
    empirical = np.searchsorted(np.sort(gaps), grid, side="right") / n
    law = stats.gamma(1 / cv**2, scale=0.2 * cv**2)
    assert np.abs(empirical - law.cdf(grid)).max() < 1.63 / math.sqrt(n)


def test_gamma_with_cv_one_is_poisson() -> None:
    gaps = gaps_of(gamma(4.0, 1.0, Limits(20_000), rng(5)))
    assert stats.kstest(gaps, stats.expon(scale=0.25).cdf).pvalue > 0.01


RATES = [(0.0, 2.0), (10.0, 0.0), (15.0, 8.0), (20.0, 1.0)]


def by_hand(time: float, repeat: float | None = None) -> float:
    """Integral of RATES by adding up thin slices of time."""
    edges = np.linspace(0, time, 200_001)
    middles = (edges[:-1] + edges[1:]) / 2
    if repeat is not None:
        middles = middles % repeat
    rate = np.select([middles < 10, middles < 15, middles < 20], [2.0, 0.0, 8.0], 1.0)
    return float(rate.sum() * time / 200_000)


@pytest.mark.parametrize("time", [0.0, 3.0, 10.0, 12.0, 15.0, 17.5, 20.0, 24.9, 61.0])
@pytest.mark.parametrize("repeat", [None, 25.0])
def test_the_mass_of_a_piecewise_rate_is_its_integral(time: float, repeat: float | None) -> None:
    assert PiecewiseRate(RATES, repeat).mass(time) == pytest.approx(by_hand(time, repeat), abs=2e-3)


@given(st.lists(st.floats(0, 500), min_size=1, max_size=20), st.sampled_from([None, 25.0]))
def test_when_inverts_mass_and_gives_no_time_without_a_rate(masses: list[float], repeat: float | None) -> None:
    rate = PiecewiseRate(RATES, repeat)
    times = rate.when(np.array(masses))
    assert [rate.mass(time) for time in times] == pytest.approx(masses, rel=1e-9, abs=1e-6)
    phase = times if repeat is None else times % repeat
    assert not ((phase > 10 + 1e-9) & (phase < 15 - 1e-9)).any()


@pytest.mark.parametrize("repeat", [None, 25.0])
def test_time_rescaling_gives_back_the_unit_poisson_process(repeat: float | None) -> None:
    rate = PiecewiseRate(RATES, repeat)
    times = piecewise(rate, Limits(10_000), rng(7))
    unit = np.array([rate.mass(time) for time in times.tolist()])
    assert stats.kstest(gaps_of(unit), stats.expon.cdf).pvalue > 0.01


def test_piecewise_counts_follow_the_rates() -> None:
    rate = PiecewiseRate(RATES)
    runs = [piecewise(rate, Limits(until_s=30.0), rng(seed)) for seed in range(800)]
    for low, high, expected in ((0, 10, 20), (10, 15, 0), (15, 20, 40), (20, 30, 10)):
        counts = np.array([np.count_nonzero((times >= low) & (times < high)) for times in runs])
        assert counts.mean() == pytest.approx(expected, abs=3.5 * math.sqrt(expected / 800) + 1e-12)


@pytest.mark.parametrize(
    "load",
    [
        {"kind": "poisson", "rate_rps": 3.0},
        {"kind": "gamma", "rate_rps": 3.0, "cv": 2.0},
        {"kind": "piecewise", "rates": [[0, 5], [20, 1]], "repeat_s": 40},
    ],
)
def test_limits_cut_and_a_multiplier_compresses_time(load: dict[str, object]) -> None:
    whole = times_of(requests=400, **load)
    assert len(whole) == 400
    assert (np.diff(whole) >= 0).all()
    short = times_of(duration_s=50.0, **load)
    assert short.tolist() == whole[whole < 50].tolist()
    assert times_of(duration_s=50.0, requests=10, **load).tolist() == whole[:10].tolist()
    fast = times_of(requests=400, rate_multiplier=4.0, **load)
    assert fast == pytest.approx(whole / 4, rel=1e-12)
    assert times_of(duration_s=12.5, rate_multiplier=4.0, **load) == pytest.approx(short / 4, rel=1e-12)
    # Without a limit: every sequence once.
    assert len(times_of(**load)) == len(SEQUENCES)
    assert times_of(seed=1, requests=400, **load).tolist() != whole.tolist()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**62),
    requests=st.integers(1, 60),
    cv=st.floats(0.05, 5),
    slots=st.lists(st.integers(1, 9), min_size=1, max_size=8),
)
def test_arrivals_are_sorted_and_every_request_comes_once(
    seed: int, requests: int, cv: float, slots: list[int]
) -> None:
    made = source(seed, kind="gamma", rate_rps=2.0, cv=cv, requests=requests)
    taken: list[Request] = []
    now, turn = 0.0, 0
    while len(taken) < requests:
        assert not made.done
        now = max(now, made.next_arrival_s)
        assert made.waiting(now) >= 1
        new = made.admit(now, slots[turn % len(slots)])
        assert 1 <= len(new) <= slots[turn % len(slots)]
        assert all(request.arrival_s <= now for request in new)
        taken += new
        turn += 1
    assert made.admit(math.inf, 10) == []
    assert [request.id for request in taken] == list(range(requests))
    arrivals = [request.arrival_s for request in taken]
    assert arrivals == sorted(arrivals)
    for request in taken:
        made.end(request, now)
    assert made.done
    assert made.next_arrival_s == math.inf


def test_nothing_that_arrives_in_time_is_an_error() -> None:
    from calibration.common.errors import ScenarioError

    with pytest.raises(ScenarioError, match=r"at least one request before duration_s = 1e-06, got none"):
        source(kind="poisson", rate_rps=1.0, duration_s=1e-6)
