"""A verification budget shared by all requests of a batch."""

from __future__ import annotations

from typing import Literal

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.rounds.forecast import draft_seconds, verify_seconds
from simulator.rounds.policy import Policy
from simulator.rounds.round import Played, Round
from simulator.stopping.confidence import AcceptanceSignals
from simulator.stopping.goodput import AcceptanceBySlot


class Budget(Policy):
    """Verifies the drafted tokens, of whatever request, that most probably survive.

    The j-th token of slot i survives with probability s_ij = a_i1 * .. * a_ij; the m largest s_ij are verified. They
    form a prefix of every draft, since s_ij falls with j. vLLM's adaptive verification: m maximises expected
    tokens per second, (B + sum of the m largest s_ij) / seconds, B one certain token per request; or m is a given
    number per request. The a_ij come from

    - ``confidence``: a logistic model of the drafted tokens' confidence and entropy (`simulator.playback.predictor`),
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
