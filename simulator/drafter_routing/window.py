"""A bandit that forgets: UCB over a sliding window, for traffic whose mix changes."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.bandits import Ucb1
from simulator.drafter_routing.choice import Newcomer


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
