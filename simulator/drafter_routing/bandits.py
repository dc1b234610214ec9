"""Bandits: which drafter, learned from the tokens per second of the requests that have ended.

A bandit that forgets: UCB over a sliding window, for traffic whose mix changes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.choice import Newcomer
from simulator.workload.lengths import stream


class Bandit:
    """Arms = drafters. Until every arm has `needed` rewards, the arm that was played least; then `pick`."""

    needed = 1

    def __init__(self, arms: int) -> None:
        self.played: Ints = np.zeros(arms, dtype=np.int64)
        """Requests routed to each arm, ended or not."""
        self.rewards: Ints = np.zeros(arms, dtype=np.int64)
        self.mean, self.squares = np.zeros(arms), np.zeros(arms)
        """Mean reward of each arm, and the sum of squared deviations from it (Welford 1962)."""
        self.largest = 0.0

    def choose(self, newcomer: Newcomer) -> int:
        """Give the arm to play."""
        unknown = int(self.rewards.min()) < self.needed
        arm = int(np.argmin(self.played)) if unknown else self.pick(newcomer)
        self.played[arm] += 1
        return arm

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm that promises most."""
        raise NotImplementedError

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Add a reward."""
        self.rewards[drafter] += 1
        off = tokens_per_second - self.mean[drafter]
        self.mean[drafter] += off / self.rewards[drafter]
        self.squares[drafter] += off * (tokens_per_second - self.mean[drafter])
        self.largest = max(self.largest, tokens_per_second)

    def describe(self) -> dict[str, Any]:
        """Give what it has learned."""
        return {"mean_tokens_per_second": self.mean.tolist(), "rewards": self.rewards.tolist()}


class Ucb1(Bandit):
    """See `Ucb`."""

    def __init__(self, arms: int, exploration: float) -> None:
        super().__init__(arms)
        self._exploration = exploration

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest upper bound."""
        bonus = self._exploration * np.sqrt(math.log(int(self.played.sum())) / self.played)
        return int(np.argmax(self.mean / self.largest + bonus))


class ThompsonSampling(Bandit):
    """See `Thompson`."""

    needed = 4

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms)
        self._seed = seed

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest mean drawn."""
        return int(np.argmax(self.means(newcomer.number)))

    def means(self, number: int) -> Floats:
        """Draw the mean of every arm for request `number`."""
        rng = stream(self._seed, "thompson", number)
        freedom = self.rewards - 3
        scale = np.sqrt(self.squares / (self.rewards * freedom))
        return np.asarray(self.mean + scale * rng.standard_t(freedom))


class KernelUcb(Bandit):
    """See `PakUcb`. `context_of[sequence]` indexes `gram`, the kernel of all contexts that there are.

    As the contexts are known and finite, mean and covariance of the regression are kept at all of them: adding a
    reward y at context j, with c = C[:, j] / (C[j, j] + a), gives m + c (y - m[j]) and C - c C[j, :]: the numbers of
    the closed form, in O(contexts^2) a reward.
    """

    def __init__(self, arms: int, context_of: Sequence[int], gram: Floats, ridge: float, eta: float) -> None:
        super().__init__(arms)
        self._context_of, self._ridge, self._eta = context_of, ridge, eta
        self._means = np.zeros((arms, len(gram)))
        self._covariances = np.repeat(gram[None], arms, axis=0)

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest upper bound at this prompt."""
        mean, deviation = self.estimate(self._context_of[newcomer.sequence])
        return int(np.argmax(mean / self.largest + self._eta * deviation))

    def estimate(self, context: int) -> tuple[Floats, Floats]:
        """Give (mu, sigma) of every arm; mu in tokens per second."""
        variance = np.maximum(self._covariances[:, context, context], 0.0)
        return self._means[:, context], np.sqrt(variance)

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Add a reward."""
        super().learn(drafter, sequence, tokens_per_second)
        context = self._context_of[sequence]
        mean, covariance = self._means[drafter], self._covariances[drafter]
        column = covariance[:, context] / (covariance[context, context] + self._ridge)
        mean += column * (tokens_per_second - mean[context])
        covariance -= np.outer(column, covariance[context])


def kernel_matrix(similarity: Floats, kernel: Literal["poly", "linear", "rbf"]) -> Floats:
    """Give the kernel of vectors of length 1 from their inner products; see `PakUcb`."""
    match kernel:
        case "poly":
            return np.asarray((similarity + 1) ** 3)
        case "linear":
            return similarity
        case "rbf":
            return np.asarray(np.exp(-2 * (1 - similarity)))


def default_eta(horizon: int, arms: int, delta: float) -> float:
    """Give sqrt(2 ln(2 T G / delta))."""
    return math.sqrt(2 * math.log(2 * horizon * arms / delta))


class SlidingUcb(Ucb1):
    """SW-UCB (Garivier and Moulines 2011): UCB1 that knows only the last `window` requests.

    Plays are counted over the last `window` requests routed, means (and the largest reward) over the last `window`
    rewards heard; the bound of an arm is mean + c sqrt(ln min(n, window) / n_g). An arm without a reward there counts
    as unknown, so every arm is tried at least about once in a window: the price of noticing a change.
    """

    def __init__(self, arms: int, exploration: float, window: int) -> None:
        super().__init__(arms, exploration)
        self._routed: deque[int] = deque(maxlen=window)
        self._heard: deque[tuple[int, float]] = deque(maxlen=window)

    def choose(self, newcomer: Newcomer) -> int:
        """Give the arm to play."""
        arm = super().choose(newcomer)
        if len(self._routed) == self._routed.maxlen:
            self.played[self._routed[0]] -= 1
        self._routed.append(arm)
        return arm

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest upper bound; its plays may have left the window before its reward came."""
        played = np.maximum(self.played, 1)
        bonus = self._exploration * np.sqrt(math.log(int(played.sum())) / played)
        return int(np.argmax(self.mean / self.largest + bonus))

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Add a reward, and forget the one that leaves the window."""
        self._heard.append((drafter, tokens_per_second))
        arm: Ints = np.array([arm for arm, _ in self._heard], dtype=np.int64)
        reward: Floats = np.array([reward for _, reward in self._heard])
        arms = len(self.mean)
        self.rewards[:] = np.bincount(arm, minlength=arms)
        self.mean[:] = np.bincount(arm, weights=reward, minlength=arms) / np.maximum(self.rewards, 1)
        self.squares[:] = np.bincount(arm, weights=(reward - self.mean[arm]) ** 2, minlength=arms)
        self.largest = float(reward.max())
