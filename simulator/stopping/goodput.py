"""Draft lengths that promise the most tokens per second, from acceptance so far and the engine's profile.

Draft lengths by a learned forecast of what the next token would gain, from the draft and the request's past.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from simulator.rounds.protocols import Played, Policy, Round, Signals, draft_seconds, even_seconds, verify_seconds

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


_AHEAD = 3
"""Tokens that a step looks ahead: a drafter with a fixed price a round pays only with several."""
_START, _DECAY, _PRIOR_ROUNDS = 0.6, 0.95, 5.0
"""Acceptance that the rate starts from, the weight of older rounds in it, and that of the start, in rounds."""


class Outlook(Signals, Protocol):
    """Signals that also forecast how far a draft survives."""

    def outlook(self, cursor: Ints, steps: int) -> tuple[Floats, Floats]:
        """Give P(at least j + 1 accepted | steps 1 .. j seen), j < `steps`, and acceptance of late (slots,)."""
        ...


class Learned(Policy):
    """Drafts on while what the next tokens are forecast to gain pays for their time at the rate of late.

    Before step j + 1 it forecasts q_j = P(at least j + 1 tokens accepted); a is its request's acceptance of late. The
    next h tokens bring q_j (1 + a + .. + a^(h-1)); a token is worth 1 / R seconds, R the tokens per second of late
    under this very rule: what else could be made of the time (the marginal value theorem: Charnov 1976). A slot is
    willing to draft h tokens more where they are worth more than they cost it, drafting and verification; the willing
    draft on, for the best h of 1 to 3, where what they gain together pays for what a step costs whoever drafts in it.
    Weighed against prices like the goodput rule of SmartSpec (Liu et al. 2024, arXiv 2406.14066), token by token. Our
    own rule.

    What it reads, all of it known to an engine at that moment: confidence and entropy of the steps drafted; the
    request's acceptance so far; whether the text's end occurred before, and how the drafter fared there (see
    `simulator.stopping.learned_signals`). The forecasts are logistic, each sequence's fitted to other sequences
    (`simulator.stopping.learned_signals`). As exact as the signals; all that is drafted is verified.
    """

    needs_signals = True

    def __init__(self, max_draft_tokens: int) -> None:
        self.longest_draft = max_draft_tokens
        self._longest = max_draft_tokens
        self._rounds = self._tokens = self._drafted = 0.0

    def observe(self, round_: Round, played: Played) -> None:
        """Add the round to the tokens (bonus included) and draft lengths of late."""
        self._rounds = _DECAY * self._rounds + round_.active
        self._tokens = _DECAY * self._tokens + float(played.emitted.sum())
        self._drafted = _DECAY * self._drafted + float(played.drafted.sum())

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the lengths at which the rule stops."""
        signals: Outlook = round_.signals  # type: ignore[assignment]
        gains, lately = signals.outlook(round_.cursor, self._longest)
        onward = np.cumsum(lately[:, None] ** np.arange(_AHEAD), axis=1)
        start_s, fixed_s, own_s = shares(round_, self._longest)
        token_s = self._token_seconds(round_, start_s + np.cumsum([0.0, *(own_s + fixed_s / round_.active)]))
        length = np.zeros(round_.active, dtype=np.int64)
        drafting = np.ones(round_.active, dtype=bool)
        for step in range(self._longest):
            worth_s = gains[:, step, None] * onward * token_s
            drafting = worth_it(drafting, worth_s, own_s[step : step + _AHEAD], fixed_s[step : step + _AHEAD])
            if not drafting.any():
                break
            length += drafting
        return length

    def _token_seconds(self, round_: Round, taken_s: Floats) -> float:
        """Give a slot's seconds a token of late, at today's prices; `taken_s`: its share of a round by draft length.

        It starts from the best one length for all at the acceptance that nothing is known of.
        """
        tokens = expected_tokens(np.asarray(_START), self._longest)
        best = int(np.argmax(tokens / even_seconds(round_, self._longest)))
        rounds = self._rounds + _PRIOR_ROUNDS
        drafted = (self._drafted + _PRIOR_ROUNDS * best) / rounds
        emitted = (self._tokens + _PRIOR_ROUNDS * float(tokens[best])) / rounds
        return float(np.interp(drafted, np.arange(len(taken_s)), taken_s)) / emitted


def worth_it(drafting: NDArray[np.bool_], worth_s: Floats, own_s: Floats, fixed_s: Floats) -> NDArray[np.bool_]:
    """Give who drafts on: the slots whose next h tokens are worth more than their own seconds, for the best h.

    `worth_s` (slots, steps ahead): what the tokens up to each step ahead are worth; `own_s`, `fixed_s` (steps ahead):
    seconds of each step for a slot, and for all. Nobody, where what they gain does not pay for what is fixed.
    """
    best, most = np.zeros_like(drafting), 0.0
    for ahead in range(1, len(own_s) + 1):
        surplus_s = worth_s[:, ahead - 1] - own_s[:ahead].sum()
        willing = drafting & (surplus_s > 0)
        total_s = float(surplus_s[willing].sum() - fixed_s[:ahead].sum())
        if total_s > most:
            best, most = willing, total_s
    return best


def shares(round_: Round, longest: int) -> tuple[float, Floats, Floats]:
    """Give a slot's seconds of a round without a draft, and of each step the seconds that are fixed and a slot's own.

    Prices are taken as straight lines between one slot that drafts and all of them: exact for linear costs.
    """
    active = round_.active
    every = np.full(active, longest, dtype=np.int64)
    verify_s = verify_seconds(round_, np.arange(longest + 1) * active)
    beside_s = verify_s - round_.prices.overhead_s
    draft_s = np.diff(draft_seconds(round_.prices, round_.context, every, beside_s))
    alone_s = np.diff(draft_seconds(round_.prices, round_.context[:1], every[:1], beside_s))
    slope_s = (draft_s - alone_s) / (active - 1) if active > 1 else np.zeros(longest)
    slope_s = np.clip(slope_s, 0.0, draft_s / active)
    own_s = slope_s + np.diff(verify_s) / active
    return float(verify_s[0] / active), draft_s - slope_s * active, own_s
