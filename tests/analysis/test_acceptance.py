"""The definitions of acceptance against closed forms, brute force and each other."""

from __future__ import annotations

import numpy as np
import pytest
from builders import iid_traces
from drawn import bits, clustered, drawn_runs, given_runs, played, sampled
from scipy.optimize import minimize_scalar
from shared_data import shared_data

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.common.rounds import recording, replay_rounds
from analysis.speedup.acceptance import AcceptanceRow, DepthPoint, acceptance_rows, constant_rate_tokens, depth_points
from calibration.traces import TraceSet


def measure(traces: TraceSet, k: int, draws: int = 400) -> tuple[AcceptanceRow, list[DepthPoint]]:
    """Acceptance and depth curve of the first drafter over all domains."""
    recorded = recording(traces, traces.manifest.drafters[0].name)
    rounds = replay_rounds(recorded, k)
    bootstrap = ClusterBootstrap(recorded.domains, np.random.default_rng(0), draws=draws)
    (row,) = acceptance_rows(recorded, rounds, bootstrap, [None])
    return row, depth_points(recorded, rounds, bootstrap, [None])


def close(estimate: Estimate, truth: float, errors: float = 4) -> bool:
    """Whether the truth lies within so many standard errors, read off the interval."""
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return abs(estimate.value - truth) <= errors * (estimate.high - estimate.low) / 3.92


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_independent_acceptance_has_its_closed_forms(alpha: float, k: int) -> None:
    traces = iid_traces(alpha, np.random.default_rng(11), sequences=60, output_tokens=400)
    row, depth = measure(traces, k)
    powers = alpha ** np.arange(1, k + 1)
    assert close(row.position_rate, alpha)
    assert close(row.geometric_rate, alpha)
    assert close(row.accepted_per_drafted, powers.mean())
    assert close(row.tokens_per_round, 1 + powers.sum())
    assert close(row.formula_error, 0)
    for point in depth:
        if point.at_risk > 200:
            assert close(point.conditional, alpha)
            assert close(point.unconditional, powers[point.depth - 1])
    assert row.mean_overlap.value is None


def test_formula_is_the_geometric_sum() -> None:
    a, k = 0.7, 5
    assert constant_rate_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
    assert constant_rate_tokens(1.0, k) == k + 1
    assert constant_rate_tokens(0.0, k) == 1
    assert constant_rate_tokens(np.array([0.0, 0.5]), 1).tolist() == [1.0, 1.5]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_geometric_rate_maximises_the_likelihood(k: int) -> None:
    """The likelihood of every round, cut at draft length and end, maximised by search."""
    rng = np.random.default_rng(5)
    runs = [drawn_runs(rng, 30) for _ in range(8)]
    rounds = [r for row in runs for r in played(row, k)]

    def cost(a: float) -> float:
        total = 0.0
        for r in rounds:
            rejected = r["accepted"] < min(r["drafted"], r["left"])
            total += r["accepted"] * np.log(a) + (np.log(1 - a) if rejected else 0.0)
        return -total

    best = minimize_scalar(cost, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-9})
    row, _ = measure(given_runs(runs), k)
    assert row.geometric_rate.value == pytest.approx(best.x, abs=1e-5)


def test_rates_by_depth_equal_a_count_by_hand() -> None:
    k = 4
    rng = np.random.default_rng(9)
    runs = [drawn_runs(rng, 50) for _ in range(5)]
    proposals = [[int(rng.integers(n, n + 3)) for n in row] for row in runs]
    rounds = [r for row, given in zip(runs, proposals, strict=True) for r in played(row, k, given)]
    _, depth = measure(given_runs(runs, proposals=proposals), k)
    drafting = [r for r in rounds if r["left"] > k and r["drafted"] > 0]
    for point in depth:
        i = point.depth
        reached = [r for r in rounds if r["accepted"] >= i - 1 and r["drafted"] >= i and r["left"] >= i]
        assert point.at_risk == len(reached)
        assert point.conditional.value == pytest.approx(np.mean([r["accepted"] >= i for r in reached]), rel=1e-5)
        assert point.rounds == len(drafting)
        assert point.unconditional.value == pytest.approx(np.mean([r["accepted"] >= i for r in drafting]), rel=1e-5)


def test_formula_promises_too_little_when_requests_differ() -> None:
    """Half the requests match everywhere, half nowhere: tokens per round is a harmonic mixture, not the formula."""
    tokens, k = 41, 3
    traces = given_runs([bits([True] * tokens)] * 4 + [bits([False] * tokens)] * 4)
    row, _ = measure(traces, k)
    # Perfect: rounds at 1, 5, ..., 37, all complete, of 4 tokens. Hopeless: rounds of 1 token at 1 .. 37.
    measured = (10 * 4 + 37) / (10 + 37)
    assert row.tokens_per_round.value == pytest.approx(measured, rel=1e-5)
    assert row.position_rate.value == 0.5
    assert row.formula_tokens.value == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert row.formula_error.value == pytest.approx(1.875 / measured - 1, rel=1e-4)


def test_formula_promises_too_much_when_hits_and_misses_come_in_stretches() -> None:
    """Four misses, four hits: most rounds start among misses, so half the positions matching yields little."""
    pattern = [False] * 4 + [True] * 4
    row, _ = measure(given_runs([bits(pattern * 40)] * 3), 2)
    # A period takes 5 rounds: one token at each of three misses, hit hit bonus, hit and the miss after it.
    assert row.tokens_per_round.value == pytest.approx(8 / 5, rel=0.01)
    assert row.position_rate.value == pytest.approx(0.5, abs=0.01)
    assert row.formula_error.value == pytest.approx(1.75 / 1.6 - 1, abs=0.02)


def test_intervals_widen_with_clustering() -> None:
    """Requests with rates of their own: the interval is wider than the one of as many independent tokens."""
    rng = np.random.default_rng(2)
    alike, _ = measure(iid_traces(4 / 7, rng, sequences=24, output_tokens=80), 4)
    differing, _ = measure(clustered(rng), 4)

    def width(estimate: Estimate) -> float:
        assert estimate.low is not None
        assert estimate.high is not None
        return estimate.high - estimate.low

    assert width(differing.position_rate) > 2 * width(alike.position_rate)


def test_sampled_traces_give_the_overlap_and_no_noise_of_draws() -> None:
    chances = [[0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0.1, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]]
    row, depth = measure(sampled(chances), 1)
    assert row.mean_overlap.value == pytest.approx(0.375)  # position 0 belongs to prefill
    assert row.position_rate.value == pytest.approx(0.375)
    assert depth[0].conditional.value == row.geometric_rate.value
    # A constant rate a at k = 1 leaves 1 / (1 + a) of the positions to start rounds, after a transient.
    assert 0.25 < (row.accepted_per_drafted.value or 0) < 0.375


def test_a_drafter_that_proposes_nothing_has_no_rates() -> None:
    row, depth = measure(given_runs([[0] * 12] * 3, proposals=[[0] * 12] * 3), 2)
    assert row.accepted_per_drafted == Estimate(None, None, None, 0)
    assert row.geometric_rate.value is None
    assert row.tokens_per_round.value == 1
    assert [p.conditional.value for p in depth] == [None, None]


def test_public_eagle_recordings_have_their_published_rates() -> None:
    """EAGLE on Llama-3.1-8B, gsm8k: .716 of all positions match; rounds restart in harder text and get less."""
    from calibration.importers.specdecode_bench import import_specdecode_bench

    file = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", "combined_gsm8k.jsonl")
    row, depth = measure(import_specdecode_bench([file]), 5)
    assert row.position_rate.value == pytest.approx(0.716, abs=0.005)
    assert depth[0].conditional.high is not None
    assert depth[0].conditional.high < 0.716
    assert row.formula_error.low is not None
    assert row.formula_error.low > 0.05  # the constant-rate formula promises too much
