"""Bandits find the better drafter, and the kernel regression is the one in the books."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import random_runs
from several import routed, several

from calibration.traces import TraceSet
from simulator import simulate
from simulator.drafter_routing.choice import (
    Bandit,
    KernelUcb,
    Newcomer,
    ThompsonSampling,
    Ucb1,
    default_eta,
    kernel_matrix,
)
from simulator.drafter_routing.prompts import domain_contexts

Means = tuple[float, float, float]
MEANS: Means = (20.0, 60.0, 40.0)


def play(bandit: Bandit, means: Callable[[int], Means], rounds: int, delay: int = 0) -> np.ndarray:
    """Give the regret of each round; rewards come `delay` rounds late, with noise of standard deviation 6."""
    rng = np.random.default_rng(11)
    pending: list[tuple[int, int, float]] = []
    regret = np.zeros(rounds)
    for number in range(rounds):
        sequence = int(rng.integers(4))
        arm = bandit.choose(Newcomer(number, sequence, 0, 10))
        expected = means(sequence)
        regret[number] = max(expected) - expected[arm]
        pending.append((arm, sequence, max(expected[arm] + 6 * rng.standard_normal(), 0.1)))
        if len(pending) > delay:
            bandit.learn(*pending.pop(0))
    return regret


def kernel_bandit(**given_: Any) -> KernelUcb:
    context_of, similarity = domain_contexts(["chat", "math", "chat", "code"])
    return KernelUcb(3, context_of, kernel_matrix(similarity, "poly"), 1.0, given_.get("eta", 0.5))


BANDITS: dict[str, Callable[[], Bandit]] = {
    "ucb": lambda: Ucb1(3, 2**0.5),
    "thompson": lambda: ThompsonSampling(3, seed=4),
    "pak_ucb": kernel_bandit,
}


@pytest.mark.parametrize("name", BANDITS)
@pytest.mark.parametrize("delay", [0, 30])
def test_regret_grows_ever_more_slowly(name: str, delay: int) -> None:
    bandit = BANDITS[name]()
    regret = play(bandit, lambda sequence: MEANS, 4000, delay).cumsum()
    assert int(np.argmax(bandit.played)) == 1
    # Sublinear: each doubling adds less per round, and the end is far below what chance would cost (20 a round).
    per_round = [regret[n - 1] / n for n in (500, 1000, 2000, 4000)]
    assert all(later < 0.75 * sooner for sooner, later in itertools.pairwise(per_round))
    assert per_round[-1] < 2.0


def test_ucb1_keeps_to_its_bound() -> None:
    """Auer et al. 2002, theorem 1: at most 8 sum ln n / gap + (1 + pi^2 / 3) sum gap, rewards in [0, 1]."""
    bandit = Ucb1(3, 2**0.5)
    regret = play(bandit, lambda sequence: MEANS, 4000).sum() / bandit.largest
    gaps = np.array([40.0, 20.0]) / bandit.largest
    bound = 8 * (math.log(4000) / gaps).sum() + (1 + math.pi**2 / 3) * gaps.sum()
    assert 0 < regret < bound


def test_a_bandit_that_sees_the_prompt_beats_one_that_does_not() -> None:
    """Two drafters, each best on its own kind of prompt: no single one is good everywhere."""

    def means(sequence: int) -> Means:
        return (60.0, 20.0, 20.0) if sequence in (0, 2) else (20.0, 60.0, 20.0)

    seeing, blind = kernel_bandit(), Ucb1(3, 2**0.5)
    with_sight, without = (play(bandit, means, 2000)[-1000:].mean() for bandit in (seeing, blind))
    assert with_sight < 2
    assert without > 15


def test_every_arm_is_tried_before_any_is_preferred() -> None:
    for name, needed in (("ucb", 1), ("thompson", 4), ("pak_ucb", 1)):
        bandit = BANDITS[name]()
        arms = [bandit.choose(Newcomer(i, 0, 0, 5)) for i in range(3 * needed)]
        assert sorted(arms) == sorted([0, 1, 2] * needed)
        # No reward yet: the next ones go round as well.
        assert {bandit.choose(Newcomer(i, 0, 0, 5)) for i in range(3)} == {0, 1, 2}


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 9)), max_size=25),
    st.sampled_from(["poly", "linear", "rbf"]),
    st.floats(0.1, 3),
    st.integers(0, 2**32),
)
def test_the_regression_is_kernel_ridge(
    rewards: list[tuple[int, float]], kernel: Any, ridge: float, seed: int
) -> None:
    """mu = k' (K + a I)^-1 y and sigma^2 = k(x, x) - k' (K + a I)^-1 k, with one row for each reward."""
    rng = np.random.default_rng(seed)
    vectors = rng.random((5, 3)) + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        if kernel == "poly":
            return float((x @ y + 1) ** 3)
        return float(x @ y) if kernel == "linear" else float(np.exp(-((x - y) ** 2).sum()))

    bandit = KernelUcb(1, list(range(5)), kernel_matrix(vectors @ vectors.T, kernel), ridge, 1.0)
    for context, reward in rewards:
        bandit.learn(0, context, reward)
    rows = [vectors[context] for context, _ in rewards]
    y = np.array([reward for _, reward in rewards])
    gram = np.array([[k(a, b) for b in rows] for a in rows]).reshape(len(rows), len(rows))
    inverse = np.linalg.inv(gram + ridge * np.eye(len(rows)))
    for context in range(5):
        x = vectors[context]
        row = np.array([k(x, other) for other in rows])
        mean, variance = row @ inverse @ y, k(x, x) - row @ inverse @ row
        mu, sigma = bandit.estimate(context)
        assert mu[0] == pytest.approx(mean, rel=1e-6, abs=1e-8)
        assert sigma[0] ** 2 == pytest.approx(variance, rel=1e-6, abs=1e-8)


def test_eta_is_the_one_of_the_theorem() -> None:
    assert default_eta(1000, 2, 0.05) == pytest.approx(math.sqrt(2 * math.log(80000)))


def test_a_thompson_draw_has_the_posterior_of_a_flat_prior() -> None:
    """Quartiles of drawn means against Student's t of the data, scipy's own."""
    from scipy.stats import kstest, t

    rewards = [3.0, 5.0, 4.0, 8.0, 6.5, 2.0]
    draws = []
    for number in range(1500):
        bandit = _Drawn(1, 7)
        for reward in rewards:
            bandit.learn(0, 0, reward)
        bandit.pick(Newcomer(number, 0, 0, 5))
        draws.append(bandit.drawn)
    n, squares = len(rewards), float(((np.array(rewards) - np.mean(rewards)) ** 2).sum())
    posterior = t(df=n - 3, loc=np.mean(rewards), scale=math.sqrt(squares / (n * (n - 3))))
    assert kstest(draws, posterior.cdf).pvalue > 0.01


class _Drawn(ThompsonSampling):
    """Shows what it drew."""

    drawn = 0.0

    def means(self, number: int) -> Any:
        drawn = super().means(number)
        self.drawn = float(drawn[0])
        return drawn


def two_kinds(alphas: dict[str, tuple[float, float]], number: int = 240, tokens: int = 40) -> TraceSet:
    """Sequences of two domains in turn; acceptance of each drafter by domain."""
    rng = np.random.default_rng(3)
    runs = {
        name: [random_runs(rng, tokens, alpha=pair[i % 2]) for i in range(number)] for name, pair in alphas.items()
    }
    return several(runs, domains=("chat", "math"))


@pytest.mark.parametrize("rule", [{"policy": "ucb", "exploration": 0.3}, {"policy": "thompson"}])
def test_in_an_engine_the_better_drafter_comes_to_draft(rule: dict[str, Any]) -> None:
    traces = two_kinds({"a": (0.2, 0.2), "b": (0.9, 0.9)})
    told = simulate(routed(rule, 4), traces).summary["drafter_routing"]
    assert told["drafters"]["b"]["accepted_tokens"] > 20 * told["drafters"]["a"]["accepted_tokens"]
    assert told["mean_tokens_per_second"][1] > 1.5 * told["mean_tokens_per_second"][0]
    assert told["rewards"][1] > 0.85 * 240


def test_in_an_engine_the_kernel_bandit_learns_which_drafter_for_which_domain() -> None:
    traces = two_kinds({"a": (0.9, 0.2), "b": (0.2, 0.9)})
    labels = {"policy": "by_domain", "table": {"chat": "a", "math": "b"}}
    rounds = {
        name: sum(simulate(routed(rule, 4), traces).requests["rounds"].to_pylist())
        for name, rule in (
            ("kernel", {"policy": "pak_ucb", "features": "domain", "eta": 0.3}),
            ("labels", labels),
            ("blind", {"policy": "ucb"}),
        )
    }
    assert rounds["labels"] <= rounds["kernel"] < 1.1 * rounds["labels"]
    assert rounds["blind"] > 1.5 * rounds["labels"]


def test_rewards_are_the_tokens_per_second_that_a_client_of_one_sees() -> None:
    """At batch 1 every second of decoding belongs to the request."""
    traces = two_kinds({"a": (0.7, 0.7), "b": (0.4, 0.4)}, number=12)
    result = simulate(routed({"policy": "thompson"}, 3, batch=1), traces)
    told = result.summary["drafter_routing"]
    rows = result.requests.to_pylist()
    rates = [(row["output_tokens"] - 1) / (row["finish_s"] - row["first_token_s"]) for row in rows]
    mean = sum(n * m for n, m in zip(told["rewards"], told["mean_tokens_per_second"], strict=True)) / 12
    assert mean == pytest.approx(np.mean(rates))
