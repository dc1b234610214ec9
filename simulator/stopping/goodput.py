"""Draft lengths that promise the most tokens per second, from acceptance so far and the engine's profile."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.rounds.protocols import Played, Policy, Round, even_seconds

_PRIOR_TOKENS = 5.0
"""Weight of the start value of an acceptance rate, in compared tokens."""


def expected_tokens(acceptance: Floats, longest: int) -> Floats:
    """Give the expected tokens of a round, bonus included, for draft lengths 0 .. `longest` (last axis).

    (1 - a^(k+1)) / (1 - a) = 1 + a + .. + a^k, for acceptance rates `acceptance`; Leviathan et al. 2023.
    """
    powers = np.power(np.asarray(acceptance)[..., None], np.arange(longest + 1))
    return np.asarray(np.cumsum(powers, axis=-1))


def compared(played: Played) -> Ints:
    """Give how many tokens of each slot met the verifier: the accepted ones and the first rejected one."""
    return np.minimum(played.accepted + 1, played.drafted)


class AcceptanceBySlot:
    """For each slot an acceptance rate: accepted over compared tokens, older rounds fading by `decay` each.

    The start value counts as five compared tokens, always: rounds without a draft bring the rate back to it, so that
    a request which stopped drafting tries again.
    """

    def __init__(self, start: float, decay: float, max_num_seqs: int) -> None:
        self._start, self._decay = start, decay
        self._accepted = np.full(max_num_seqs, start * _PRIOR_TOKENS)
        self._compared = np.full(max_num_seqs, _PRIOR_TOKENS)

    def forget(self, slots: Ints) -> None:
        """Start these anew."""
        self._accepted[slots] = self._start * _PRIOR_TOKENS
        self._compared[slots] = _PRIOR_TOKENS

    def rates(self, slots: Ints) -> Floats:
        """Give the acceptance rates of `slots`."""
        return np.asarray(self._accepted[slots] / self._compared[slots], dtype=np.float64)

    def observe(self, slots: Ints, played: Played) -> None:
        """Add a round."""
        start = (1 - self._decay) * _PRIOR_TOKENS
        self._accepted[slots] = self._decay * self._accepted[slots] + start * self._start + played.accepted
        self._compared[slots] = self._decay * self._compared[slots] + start + compared(played)


class Goodput(Policy):
    """One length for the batch: argmax over k of B * (1 - a^(k+1)) / (1 - a) / seconds of the step at k.

    SmartSpec (Liu et al. 2024, arXiv 2406.14066; TurboSpec is its later name): a is a moving average of accepted over
    compared tokens of the whole engine, seconds come from a profile of the engine (here: its prices). As exact as the
    replay of `Fixed`; the average's decay and start value are ours. k = 0 teaches nothing about acceptance; see
    `probe_rounds` of the scenario.
    """

    def __init__(self, max_draft_tokens: int, start_acceptance: float, decay: float, probe_rounds: int) -> None:
        self.longest_draft = max_draft_tokens
        self._longest, self._decay, self._probe = max_draft_tokens, decay, probe_rounds
        self._accepted, self._compared = start_acceptance * _PRIOR_TOKENS, _PRIOR_TOKENS
        self._silent = 0

    @property
    def acceptance(self) -> float:
        """The current acceptance rate."""
        return self._accepted / self._compared

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the best k for every slot."""
        tokens = expected_tokens(np.asarray(self.acceptance), self._longest)
        best = int(np.argmax(tokens / even_seconds(round_, self._longest)))
        self._silent = 0 if best else self._silent + 1
        if self._probe and self._silent > self._probe:
            best, self._silent = 1, 0
        return np.full(round_.active, best, dtype=np.int64)

    def observe(self, round_: Round, played: Played) -> None:
        """Add the round to the average, if anything was drafted."""
        seen = int(compared(played).sum())
        if seen:
            self._accepted = self._decay * self._accepted + int(played.accepted.sum())
            self._compared = self._decay * self._compared + seen


class PerRequest(Policy):
    """For each request its own length: argmax over k of (1 - a_i^(k+1)) / (1 - a_i) / seconds of a step at k.

    a_i is a moving average of its own accepted over compared tokens (`AcceptanceBySlot`). The step is priced
    as if all slots drafted k. Our own rule, the per-request form of `Goodput`. As exact as the replay of `Fixed`.
    """

    def __init__(self, max_draft_tokens: int, start_acceptance: float, decay: float, max_num_seqs: int) -> None:
        self.longest_draft = max_draft_tokens
        self._longest = max_draft_tokens
        self._acceptance = AcceptanceBySlot(start_acceptance, decay, max_num_seqs)

    def opened(self, slots: Ints) -> None:
        """Start these anew."""
        self._acceptance.forget(slots)

    def draft_tokens(self, round_: Round) -> Ints:
        """Give each slot's best k."""
        tokens = expected_tokens(self._acceptance.rates(round_.slots), self._longest)
        return np.asarray(np.argmax(tokens / even_seconds(round_, self._longest), axis=1), dtype=np.int64)

    def observe(self, round_: Round, played: Played) -> None:
        """Add the round to each slot's average."""
        self._acceptance.observe(round_.slots, played)
