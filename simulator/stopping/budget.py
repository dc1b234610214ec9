"""A verification budget shared by all requests of a batch.

SGLang's adaptive number of draft steps.
"""

from __future__ import annotations

import bisect
import math
from typing import Literal

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.rounds.protocols import Played, Policy, Round, draft_seconds, verify_seconds
from simulator.scenario.stopping import MovingAverage, Tier
from simulator.stopping.confidence import AcceptanceSignals
from simulator.stopping.goodput import AcceptanceBySlot


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


class Budget(Policy):
    """Verifies the drafted tokens, of whatever request, that most probably survive.

    The j-th token of slot i survives with probability s_ij = a_i1 * .. * a_ij; the m largest s_ij are verified. They
    form a prefix of every draft, since s_ij falls with j. vLLM's adaptive verification: m maximises expected
    tokens per second, (B + sum of the m largest s_ij) / seconds, B one certain token per request; or m is a given
    number per request. The a_ij come from

    - ``confidence``: a logistic model of the drafted tokens' confidence and entropy (`simulator.playback.signals`),
      which vLLM fits while serving and which here is fitted beforehand; all requests draft their longest draft
      first, and what is not verified of it is wasted. As exact as the signals.
    - ``acceptance``: a_ij = a_i, a moving average of the request's accepted over compared tokens, known before
      drafting, so that nothing is drafted but what is verified. The depth is chosen together with m; drafting is
      priced as if every slot went to that depth. Not what vLLM does. As exact as the replay of `Fixed`.
    """

    def __init__(
        self,
        estimate: Literal["acceptance", "confidence"],
        max_draft_tokens: int,
        start_acceptance: float,
        decay: float,
        tokens_per_request: float | None,
        max_num_seqs: int,
    ) -> None:
        self.longest_draft = max_draft_tokens
        self.needs_signals = estimate == "confidence"
        self.drafts_ahead = max_draft_tokens if self.needs_signals else None
        self._longest, self._given = max_draft_tokens, tokens_per_request
        self._acceptance = AcceptanceBySlot(start_acceptance, decay, max_num_seqs)

    def opened(self, slots: Ints) -> None:
        """Start these anew."""
        self._acceptance.forget(slots)

    def observe(self, round_: Round, played: Played) -> None:
        """Add the round to each slot's average."""
        self._acceptance.observe(round_.slots, played)

    def survival(self, round_: Round) -> Floats:
        """Give s_ij, shape (active, longest draft)."""
        if self.needs_signals:
            signals: AcceptanceSignals = round_.signals  # type: ignore[assignment]
            return np.asarray(np.cumprod(signals.acceptance(round_.cursor, self._longest), axis=1), dtype=np.float64)
        rates = self._acceptance.rates(round_.slots)
        return np.asarray(np.power(rates[:, None], np.arange(1, self._longest + 1)), dtype=np.float64)

    def draft_tokens(self, round_: Round) -> Ints:
        """Give how many tokens of each slot are among the m best."""
        survival = self.survival(round_)
        # Depth by depth, and stable: of equal ones the shallower come first, so that a prefix is taken.
        order = np.argsort(-survival.T.ravel(), kind="stable")
        if self._given is not None:
            chosen = order[: int(self._given * round_.active)]
        else:
            chosen = self._best(round_, survival, order)
        return np.bincount(chosen % round_.active, minlength=round_.active)

    def _best(self, round_: Round, survival: Floats, order: Ints) -> Ints:
        """Give the first m of `order`, for the m (and depth) that promises most tokens per second."""
        active, longest = round_.active, self._longest
        verify_s = verify_seconds(round_, np.arange(len(order) + 1))
        full = np.full(active, longest, dtype=np.int64)
        # A drafter that takes a share of the verification takes it of the largest one: an upper bound.
        draft_s = draft_seconds(round_.prices, round_.context, full, verify_s[::active] - round_.prices.overhead_s)
        depth = order // active + 1
        best, best_rate = order[:0], active / (verify_s[0] + (draft_s[longest] if self.drafts_ahead else draft_s[0]))
        for deepest in (longest,) if self.drafts_ahead else range(1, longest + 1):
            within = order[depth <= deepest]
            tokens = active + np.cumsum(survival.T.ravel()[within])
            rates = tokens / (verify_s[1 : len(within) + 1] + draft_s[deepest])
            number = int(np.argmax(rates))
            if rates[number] > best_rate:
                best, best_rate = within[: number + 1], rates[number]
        return best
