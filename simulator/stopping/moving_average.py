"""SGLang's adaptive number of draft steps."""

from __future__ import annotations

import bisect
import math

import numpy as np

from calibration.common.arrays import Ints
from simulator.rounds.policy import Policy
from simulator.rounds.round import Played, Round
from simulator.scenario.stopping import MovingAverage, Tier


class Steps:
    """The steps of one tier of batch sizes, and the average of accepted tokens (bonus excluded) that moves them."""

    def __init__(self, tier: Tier, settings: MovingAverage) -> None:
        self._candidates = sorted(set(tier.candidate_steps))
        self._tier, self._settings = tier, settings
        middle = self._candidates[len(self._candidates) // 2]
        self.steps = settings.initial_steps if settings.initial_steps in self._candidates else middle
        self.average = float(self.steps - 1)
        self._rounds = 0

    def update(self, accepted: float) -> None:
        """Hear the mean of accepted tokens over a batch."""
        if self.steps > 0:
            weight = self._settings.ema_alpha
            self.average = (1 - weight) * self.average + weight * accepted
        self._rounds += 1
        since = self._rounds - self._settings.warmup_batches
        if since > 0 and since % self._settings.update_interval == 0:
            self.steps = self._choose()

    def _choose(self) -> int:
        candidates, now = self._candidates, self._candidates.index(self.steps)
        if self.steps == 0:
            target = candidates[min(1, len(candidates) - 1)]
            if target > 0 and self.average < 0:
                self.average = float(target - 1)
            return target
        index = now
        while index > 0 and self.average <= self._floor(candidates[index - 1]):
            index -= 1
        if index == now:
            while index < len(candidates) - 1:
                if self.average <= candidates[index] - 0.5 + self._tier.up_hysteresis:
                    break
                index += 1
        if self._tier.ceiling_coeff > 0 and index <= now:
            ceiling = max(1, math.ceil(self.average * self._tier.ceiling_coeff))
            while index > 0 and candidates[index] > ceiling:
                index -= 1
        return candidates[index]

    def _floor(self, lower: int) -> float:
        """Give the average down to which the next `lower` candidate is taken."""
        return (0.5 if lower == 0 else lower - 0.5) + self._tier.down_hysteresis


class AdaptiveSteps(Policy):
    """The same number of draft steps for the whole batch, moved by an average of what was accepted.

    SGLang, `adaptive_spec_params.py` (strategy ``ema``): each tier of batch sizes has its own average and steps, and
    a batch belongs to the tier with the largest key that it reaches. Per engine, not per request. As exact as the
    replay of `Fixed`. Padding of the batch size to captured graphs before it is looked up is left out.
    """

    def __init__(self, settings: MovingAverage) -> None:
        self._sizes = sorted(int(key) for key in settings.tiers)
        self._tiers = [Steps(settings.tiers[str(size)], settings) for size in self._sizes]
        self.longest_draft = max(max(tier.candidate_steps) for tier in settings.tiers.values())

    def _tier(self, active: int) -> Steps:
        return self._tiers[max(0, bisect.bisect_right(self._sizes, active) - 1)]

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the tier's steps for every slot."""
        return np.full(round_.active, self._tier(round_.active).steps, dtype=np.int64)

    def observe(self, round_: Round, played: Played) -> None:
        """Tell the tier how many tokens were accepted, on average."""
        self._tier(round_.active).update(float(played.accepted.mean()))
