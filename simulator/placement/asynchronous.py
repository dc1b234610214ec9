"""Asynchronous placement with rollback: AMUSD."""

from __future__ import annotations

import math

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import CostError
from simulator.placement.overlapped import compare
from simulator.playback.replay import Replay
from simulator.pricing.costs import DraftPerStep, Prices
from simulator.rounds.protocols import Played, Round
from simulator.stopping import StoppingPolicy, ask

_ROUNDING = 1e-9
"""Of a draft step: less than this missing, it is complete."""


class Asynchronous:
    """Drafter and verifier run on devices of their own and never wait for each other.

    AMUSD, McDanel 2024 (arXiv 2410.17375). The verifier's passes follow each other; each one verifies what lies
    drafted at its start, or decodes one token where nothing does. Meanwhile the drafter drafts on, token by token
    across passes, at most as many in one pass as the policy's draft length. A mismatch rolls it back: what it drafted
    since is void, and so is the step that it is in.

    A round is one pass and takes verify_s; overhead counts as time to draft in. Where a pass takes exactly gamma
    draft steps this is PEARL; elsewhere nobody waits for the end of a step.

    Approximation: all slots share passes and lock-step draft steps, which are priced as at the start of the pass
    (AMUSD serves one request); a drafter that the verifier has overtaken goes on from the verifier's token (in
    AMUSD's code it computes that token itself first). Acceptance is replayed as exactly as by `Overlapped`.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._pending = np.zeros(max_num_seqs, dtype=np.int64)
        self._rolled = np.ones(max_num_seqs, dtype=bool)
        """Whether the step that the drafter is in is void for this slot."""
        self._phase = 0.0
        """How much of the present draft step is done."""

    def opened(self, slots: Ints) -> None:
        """Let these start with nothing drafted."""
        self._pending[slots] = 0
        self._rolled[slots] = True

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        future = np.minimum(replay.run_length.take(round_.cursor), left)  # beyond the output a recording may go on
        prices, slots, active = round_.prices, round_.slots, round_.active
        most, pending = ask(policy, round_, future), self._pending[slots]
        context = int(round_.context.sum())
        tokens = active + int(pending.sum())
        verify_s, outside = prices.verify_s(active, tokens, context)
        step_s, beyond = _step_seconds(prices, active, context + tokens - active)
        prices.extrapolated_iterations += outside or beyond

        void = self._rolled[slots] & (self._phase > 0)
        steps = self._advance(verify_s + prices.overhead_s, step_s, int((most + void).max()))
        drafted = np.minimum(np.maximum(steps - void, 0), most)
        end = compare(pending, drafted, future, left)
        self._pending[slots], self._rolled[slots] = end.pending, ~end.on
        draft_s = steps * step_s
        extra = {"drafted_ahead": float(drafted.sum())}
        return Played(end.compared, end.accepted, end.emitted, draft_s, verify_s, verify_s, tokens, extra)

    def _advance(self, seconds: float, step_s: float, most: int) -> int:
        """Let the drafter run, `most` steps at most; give how many steps it ends."""
        progress = self._phase + seconds / step_s if step_s else math.inf
        if progress + _ROUNDING >= most:
            self._phase = 0.0
            return most
        steps = math.floor(progress + _ROUNDING)
        self._phase = progress - steps if progress - steps > _ROUNDING else 0.0
        return steps


def _step_seconds(prices: Prices, batch: int, context: int) -> tuple[float, bool]:
    """Give (seconds, whether outside of the measured range) of one draft step of the whole batch."""
    draft = prices.draft
    if not isinstance(draft, DraftPerStep):
        raise CostError(
            "costs.drafter: must be charged per_step for placement.kind = 'asynchronous', whose drafter goes token "
            f"by token, got {'no drafter' if draft is None else draft.charged}"
        )
    return float(draft.step.step_seconds(batch, batch, context)), draft.step.outside(batch, batch, context)
