"""Rules that read how sure the drafter is, token by token: confidence threshold, AdaEDL, SpecDec++.

They draft the token at which they stop: its distribution is known, so keeping it costs no draft step.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.rounds.protocols import Played, Policy, Round, Signals, first_stop


class AcceptanceSignals(Signals, Protocol):
    """Signals that also predict acceptance."""

    def acceptance(self, cursor: Ints, steps: int) -> Floats:
        """Give the predicted probability that the token of each step is accepted if those before it were."""
        ...


class ConfidenceThreshold(Policy):
    """Stops after the first token whose largest probability is below a threshold.

    transformers' `assistant_confidence_threshold` (`ConfidenceCriteria`), without its re-fit of the threshold to past
    rounds; also Kangaroo's rule. For a drafter that takes its likeliest token, as greedy drafts do; one that samples
    is judged there by the probability of the token drawn, here by the largest. As exact as the signals.
    """

    needs_signals = True

    def __init__(self, threshold: float, max_draft_tokens: int) -> None:
        self.longest_draft = max_draft_tokens
        self._threshold, self._longest = threshold, max_draft_tokens

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the step of the first doubt."""
        assert round_.signals is not None
        return first_stop(round_.signals.confidence(round_.cursor, self._longest) < self._threshold)


class AdaEDL(Policy):
    """Stops after the first token with 1 - sqrt(gamma * H) < lambda, H the drafter's entropy in nats.

    Agrawal et al. 2024 (arXiv 2410.18351): the left side approximates a lower bound on the probability of acceptance.
    lambda follows the acceptance rate of the request,

        r <- b1 * r + (1 - b1) * accepted / drafted,    lambda' = lambda + eps if r < alpha else lambda - eps,
        lambda <- b2 * lambda + (1 - b2) * lambda',

    the update of Draft & Verify (Zhang et al. 2023), whose code, as here, leaves lambda alone where it would fall
    after a draft of full length, and starts from r = 0. As exact as the signals.
    """

    needs_signals = True

    def __init__(
        self,
        threshold: float,
        gamma: float,
        target_acceptance: float,
        step: float,
        decays: tuple[float, float],
        max_draft_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self.longest_draft = max_draft_tokens
        self._longest, self._start, self._gamma = max_draft_tokens, threshold, gamma
        self._target, self._step, self._decays = target_acceptance, step, decays
        self._threshold = np.full(max_num_seqs, threshold)
        self._rate = np.zeros(max_num_seqs)

    def opened(self, slots: Ints) -> None:
        """Start these anew."""
        self._threshold[slots] = self._start
        self._rate[slots] = 0.0

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the step at which the bound falls below the threshold."""
        assert round_.signals is not None
        bound = 1 - np.sqrt(self._gamma * round_.signals.entropy(round_.cursor, self._longest))
        return first_stop(bound < self._threshold[round_.slots, None])

    def observe(self, round_: Round, played: Played) -> None:
        """Move the thresholds of the slots that drafted."""
        drew = played.drafted > 0
        slots, drafted, accepted = round_.slots[drew], played.drafted[drew], played.accepted[drew]
        rate = self._decays[0] * self._rate[slots] + (1 - self._decays[0]) * (accepted / drafted)
        step = np.where(rate < self._target, self._step, np.where(drafted == self._longest, 0.0, -self._step))
        self._rate[slots] = rate
        self._threshold[slots] += (1 - self._decays[1]) * step


class SpecDecPP(Policy):
    """Stops after the first token with 1 - prod of predicted acceptances > threshold, within bounds.

    SpecDec++ (Huang et al. 2024, arXiv 2405.19715). Its head reads the drafter's hidden states, which no trace holds;
    here acceptance is predicted from confidence and entropy by a logistic model (`simulator.playback.signals`): an
    approximation of the head, not of the rule. The released code stops one token later, because it learns of a token
    only with the step that drafts the next. As exact as the signals.
    """

    needs_signals = True

    def __init__(self, threshold: float, min_draft_tokens: int, max_draft_tokens: int) -> None:
        self.longest_draft = max_draft_tokens
        self._threshold, self._least, self._longest = threshold, min_draft_tokens, max_draft_tokens

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the step at which a rejection has become too likely."""
        signals: AcceptanceSignals = round_.signals  # type: ignore[assignment]
        rejected = 1 - np.cumprod(signals.acceptance(round_.cursor, self._longest), axis=1)
        return np.maximum(first_stop(rejected > self._threshold), self._least)
