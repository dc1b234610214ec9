"""Intervals: they cover on clustered data where naive ones do not, they pair, and they know when to be silent."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.common.bootstrap import Candidates, ClusterBootstrap, Estimate, least, most, number


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., :1] / sums[..., 1:2]


def clustered_sums(rng: np.random.Generator, requests: int, trials: int = 50) -> np.ndarray:
    """Accepted and drafted tokens of requests whose own rates follow Beta(2, 2), mean one half."""
    rates = rng.beta(2, 2, requests)
    return np.stack([rng.binomial(trials, rates), np.full(requests, trials)], axis=1).astype(float)


@pytest.mark.parametrize("requests", [12, 40])
def test_interval_covers_and_naive_one_does_not(requests: int) -> None:
    rng = np.random.default_rng(7)
    hits = naive = 0
    repeats = 400
    for _ in range(repeats):
        sums = clustered_sums(rng, requests)
        (found,) = ClusterBootstrap(["chat"] * requests, rng, draws=500).estimates(ratio, sums)
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.5 <= found.high
        spread = 1.96 * np.sqrt(found.value * (1 - found.value) / sums[:, 1].sum())
        naive += abs(found.value - 0.5) <= spread
    # 3 binomial standard errors of 400 repeats at 95% are 0.033; few clusters cost another point or two.
    assert 0.90 <= hits / repeats <= 0.99
    assert naive / repeats < 0.65


def test_expanded_interval_has_the_width_of_students() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=8)
    sums = np.stack([values, np.ones(8)], axis=1)
    (found,) = ClusterBootstrap(["chat"] * 8, rng, draws=20_000).estimates(ratio, sums)
    assert found.low is not None
    assert found.high is not None
    student = 2 * 2.365 * values.std(ddof=1) / np.sqrt(8)
    assert found.high - found.low == pytest.approx(student, rel=0.1)


def test_pooled_domains_keep_their_mix() -> None:
    """Two domains without spread inside: the pooled ratio cannot move, whatever is drawn."""
    domains = ["a"] * 5 + ["b"] * 5
    sums = np.array([[1.0, 10.0]] * 5 + [[9.0, 10.0]] * 5)
    bootstrap = ClusterBootstrap(domains, np.random.default_rng(0), draws=200)
    assert bootstrap.estimates(ratio, sums) == (Estimate(0.5, 0.5, 0.5, 10),)
    assert bootstrap.estimates(ratio, sums, "b") == (Estimate(0.9, 0.9, 0.9, 5),)


def test_resampled_requests_are_shared_by_all_statistics() -> None:
    rng = np.random.default_rng(1)
    sums = clustered_sums(rng, 20)
    bootstrap = ClusterBootstrap(["chat"] * 20, rng, draws=300)
    both = np.concatenate([sums, sums], axis=1)
    (same,) = bootstrap.estimates(lambda s: ratio(s) / ratio(s[..., 2:]), both)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_one_request_or_nothing_drafted_has_no_interval() -> None:
    bootstrap = ClusterBootstrap(["a", "b", "b"], np.random.default_rng(0), draws=200)
    sums = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert bootstrap.estimates(ratio, sums, "a") == (Estimate(0.5, None, None, 1),)
    assert bootstrap.estimates(ratio, sums, "b") == (Estimate(None, None, None, 0),)


def test_same_seed_same_interval() -> None:
    sums = clustered_sums(np.random.default_rng(2), 30)
    found = [
        ClusterBootstrap(["chat"] * 30, np.random.default_rng(seed), draws=200).estimates(ratio, sums)
        for seed in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]


def test_number_keeps_six_digits_and_says_missing() -> None:
    assert number(1 / 3) == 0.333333
    assert number(float("nan")) is None
    assert number(None) is None
    assert Estimate(1.234, 1.1, None, 3).text == "1.23"
    assert Estimate(1.234, 1.1, 1.3, 3).text == "1.23 [1.10, 1.30]"
    assert Estimate(None, None, None, 0).text == "-"


def test_a_rate_of_zero_or_one_gets_the_exact_bound() -> None:
    """The bootstrap sees no spread in 0 of m; the binomial law says what m requests cannot rule out."""
    never = Estimate(0.0, 0.0, 0.0, 40).bounded(12)
    assert never.high == pytest.approx(1 - 0.025 ** (1 / 12), rel=1e-5)
    assert (never.value, never.low, never.requests) == (0.0, 0.0, 12)
    always = Estimate(1.0, 1.0, 1.0, 40).bounded(12)
    assert always.low == pytest.approx(0.025 ** (1 / 12), rel=1e-4)
    assert Estimate(0.4, 0.3, 0.5, 40).bounded(12) == Estimate(0.4, 0.3, 0.5, 12)
    assert Estimate(None, None, None, 0).bounded(0) == Estimate(None, None, None, 0)


def means(sums: np.ndarray) -> np.ndarray:
    return sums[..., :-1] / sums[..., -1:]


def drawn_candidates(rng: np.random.Generator, true: np.ndarray, requests: int) -> Candidates:
    """Paired speed-ups of several candidates: each request has a noise of its own that all candidates share."""
    shared = rng.normal(0, 0.2, (requests, 1))
    own = rng.normal(0, 0.3, (requests, len(true)))
    sums = np.column_stack([true * np.exp(shared + own - (0.2**2 + 0.3**2) / 2), np.ones(requests)])
    return ClusterBootstrap(["chat"] * requests, rng, draws=400).candidates(means, sums)


@pytest.mark.parametrize(("requests", "least"), [(4, 0.92), (6, 0.92), (24, 0.92)])
def test_few_clusters_are_covered_as_many_are(requests: int, least: float) -> None:
    rng = np.random.default_rng(11)
    repeats, hits = 600, 0
    for _ in range(repeats):
        sums = np.stack([rng.normal(10, 2, requests), np.ones(requests)], axis=1)
        (found,) = ClusterBootstrap(["chat"] * requests, rng, draws=400).estimates(ratio, sums)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 10 <= found.high
    assert hits / repeats >= least  # 95% less 3 binomial standard errors


def test_two_clusters_have_no_interval() -> None:
    sums = np.array([[1.0, 2.0], [2.0, 2.0]])
    bootstrap = ClusterBootstrap(["a", "a"], np.random.default_rng(0), draws=200)
    assert bootstrap.estimates(ratio, sums) == (Estimate(0.75, None, None, 2),)
    assert bootstrap.candidates(ratio, sums).simultaneous() == [(None, None)]


def test_rates_of_few_requests_stay_within_one() -> None:
    sums = np.array([[10.0, 10.0], [10.0, 10.0], [7.0, 10.0], [10.0, 10.0]])
    (found,) = ClusterBootstrap(["a"] * 4, np.random.default_rng(0), draws=500).estimates(ratio, sums)
    assert found.high is not None
    assert found.high > 1
    assert found.bounded(4).high == 1.0


def test_one_candidate_gets_students_interval() -> None:
    rng = np.random.default_rng(3)
    values = np.exp(rng.normal(0, 0.01, size=12))  # so small a spread that logarithms are linear
    sums = np.stack([values, np.ones(12)], axis=1)
    ((low, high),) = ClusterBootstrap(["chat"] * 12, rng, draws=20_000).candidates(ratio, sums).simultaneous()
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(2 * 2.201 * values.std(ddof=1) / np.sqrt(12), rel=0.05)  # t(11), 97.5%


@pytest.mark.parametrize("count", [2, 12, 36])
def test_the_best_of_many_that_do_not_pay_is_rarely_said_to_pay(count: int) -> None:
    """The winner of `count` candidates without an effect: simultaneous bounds err as they say."""
    rng = np.random.default_rng(5)
    repeats, wrong, naive = 300, 0, 0
    for _ in range(repeats):
        family = drawn_candidates(rng, np.ones(count), 48)
        best = int(np.argmax(family.values))
        low = family.simultaneous()[best][0]
        assert low is not None
        wrong += low > 1
        naive += np.quantile(family.replicates[:, best], 0.025) > 1
    assert wrong / repeats <= 0.05  # nominal 2.5% on this side; 3 standard errors more
    assert count < 10 or naive / repeats > 0.1


def test_the_set_of_the_best_holds_the_best_one_and_leaves_out_the_worse() -> None:
    rng = np.random.default_rng(6)
    true = np.array([1.0, 1.3, 1.3, 1.28, 0.7])
    repeats, missed, kept = 300, 0, 0
    for _ in range(repeats):
        inside = drawn_candidates(rng, true, 48).best_set()
        missed += not (inside[1] and inside[2])
        kept += bool(inside[4])
    assert missed / repeats <= 0.05 + 0.04  # 95%, two that are best at once; 3 binomial standard errors
    assert kept == 0
    small = drawn_candidates(rng, true, 48).best_set(largest=False)
    assert small.tolist() == [False, False, False, False, True]


def test_candidates_join_into_one_wider_family() -> None:
    rng = np.random.default_rng(8)
    sums = np.column_stack([np.exp(rng.normal(0, 0.3, (30, 6))), np.ones(30)])
    bootstrap = ClusterBootstrap(["a", "b"] * 15, rng, draws=500)
    one = bootstrap.candidates(lambda s: means(s)[..., :1], sums)
    rest = bootstrap.candidates(lambda s: means(s)[..., 1:], sums, "a")
    family = Candidates.join([one, rest])
    assert family.clusters.tolist() == [30] + [15] * 5
    ((alone_low, alone_high),) = one.simultaneous()
    low, high = family.simultaneous()[0]
    assert None not in (alone_low, alone_high, low, high)
    assert low < alone_low < alone_high < high


def test_candidates_that_are_undefined_are_left_out() -> None:
    sums = np.column_stack([np.array([1.0, 2.0, 3.0, 2.0]), np.zeros(4), np.full(4, 2.0)])
    bootstrap = ClusterBootstrap(["a"] * 4, np.random.default_rng(0), draws=200)
    family = bootstrap.candidates(lambda s: np.stack([s[..., 0] / s[..., 2], s[..., 1] / s[..., 1]], axis=-1), sums)
    assert family.simultaneous()[1] == (None, None)
    assert family.best_set().tolist() == [True, False]


def test_requests_that_took_no_part_are_no_clusters() -> None:
    """Two requests of twenty were recorded: no interval; three: Student's with two degrees of freedom."""
    sums = np.zeros((20, 2))
    sums[:2] = [[1.0, 2.0], [3.0, 2.0]]
    bootstrap = ClusterBootstrap(["a", "b"] * 10, np.random.default_rng(0), draws=300)
    assert bootstrap.estimates(ratio, sums) == (Estimate(1.0, None, None, 2),)
    assert bootstrap.candidates(ratio, sums).simultaneous() == [(None, None)]
    sums[4] = [2.5, 2.0]
    family = bootstrap.candidates(ratio, sums)
    assert (family.clusters.tolist(), family.strata.tolist()) == ([3], [2])


def test_differences_are_judged_on_their_own_scale() -> None:
    """Means of normal differences, some below 0: covered together, and one alone gets Student's interval."""
    rng = np.random.default_rng(12)
    true, repeats, missed = np.array([-2.0, 0.0, 0.3, 5.0]), 300, 0
    for _ in range(repeats):
        sums = np.column_stack([true + rng.normal(0, 1, (30, 4)), np.ones(30)])
        bootstrap = ClusterBootstrap(["chat"] * 30, rng, draws=400)
        family = bootstrap.candidates(means, sums, scale="identity")
        bounds = family.simultaneous()
        missed += any(not low <= t <= high for t, (low, high) in zip(true, bounds, strict=True))
        assert family.best_set()[3]
        assert not family.best_set()[:3].any()
    assert missed / repeats <= 0.05 + 0.04
    alone = bootstrap.candidates(lambda s: means(s)[..., :1], sums, scale="identity").simultaneous()
    assert alone[0][1] - alone[0][0] == pytest.approx(2 * 2.045 * sums[:, 0].std(ddof=1) / 30**0.5, rel=0.1)
    assert Candidates.join([family, family]).scale == "identity"


def test_groups_are_choices_of_their_own_that_hold_together() -> None:
    rng = np.random.default_rng(13)
    true, groups = np.array([1.0, 1.0, 2.0, 3.5]), ["a", "a", "b", "b"]
    repeats, missed = 300, 0
    for _ in range(repeats):
        inside = drawn_candidates(rng, true, 48).best_set(groups=groups)
        assert not inside[2]
        missed += not (inside[0] and inside[1] and inside[3])
    assert missed / repeats <= 0.05 + 0.04
    assert drawn_candidates(rng, true, 48).best_set().tolist() == [False, False, False, True]


def test_against_the_best_of_several_is_the_least_of_the_comparisons() -> None:
    assert least([(1.0, 1.4), (0.9, 1.6)]) == (0.9, 1.4)
    assert most([(1.0, 1.4), (0.9, 1.6)]) == (1.0, 1.6)
    assert least([(1.0, 1.4), (None, None)]) == (None, None)
