"""Overlapped placement: PEARL's pre-verify and post-verify.

Remote placement: the drafter on another device, behind a link.

The window of unverified tokens that a drafter is ahead by, where it drafts while the verifier verifies.

Thinning: the replay of a drafter whose tokens are lost with some probability, compared with the one recorded.

Asynchronous placement with rollback: AMUSD.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Ints
from calibration.common.errors import CostError
from simulator.playback.replay import Replay, Stretches, runs_of
from simulator.pricing.costs import DraftPerStep, Prices
from simulator.rounds.protocols import Played, Round, Serial
from simulator.stopping import StoppingPolicy, ask

_TOKEN_ID_BYTES = 4


class Remote:
    """Draft there, verify here, in turn: a round takes draft_s + verify_s + round trip + bytes / bandwidth.

    Edge-cloud speculative decoding; with independent acceptance, draft length g and a fast link, the speed-up over
    none is E[tokens] t_t / (g t_d + t_v + RTT). Drafted tokens cross to the verifier, emitted ones back. Rounds in
    which no slot drafts do not use the link. Everything else as `Serial`, trees included. The link's time is part of
    `seconds` and stands in ``extra["link_s"]``.

    Approximation: drafts of a batch travel together, after the last one is complete; the prompt's way to the drafter
    is not charged (it overlaps with the verifier's prefill).
    """

    def __init__(self, round_trip_s: float, bytes_per_s: float | None, bytes_per_drafted_token: float) -> None:
        self._serial = Serial()
        self._round_trip_s, self._bytes_per_s = round_trip_s, bytes_per_s
        self._bytes = bytes_per_drafted_token

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        played = self._serial.play(round_, left, policy, replay)
        drafted = played.verified_tokens - round_.active
        if drafted == 0:
            return played
        link_s = self._round_trip_s
        if self._bytes_per_s is not None:
            link_s += (self._bytes * drafted + _TOKEN_ID_BYTES * int(played.emitted.sum())) / self._bytes_per_s
        return replace(played, seconds=played.seconds + link_s, extra={**played.extra, "link_s": link_s})


class Compared(NamedTuple):
    """What the end of an overlapped round tells; arrays have shape (active,).

    `compared` drafted tokens met the verifier's choice, `accepted` of them agreed; `pending` tokens are drafted and
    unverified from now on; `on` says which drafts go on.
    """

    compared: Ints
    accepted: Ints
    emitted: Ints
    pending: Ints
    on: NDArray[np.bool_]


def compare(pending: Ints, drafted: Ints, run: Ints, left: Ints) -> Compared:
    """Verify `pending` tokens while `drafted` ones were added behind them.

    The verifier reads the last committed token and the pending ones, and so knows the token behind each of them. That
    behind the last is the first of `drafted`, if there is one: it is compared as well. All agreed: the draft goes on,
    and its other new tokens are pending. Else the first that disagreed is replaced and the rest is void. `run`: how
    many drafted tokens agree from the committed position on, for a draft that goes on as for a new one: exact for
    drafters that see tokens alone.
    """
    fresh = drafted > 0
    compared = pending + fresh
    accepted = np.minimum(run, compared)
    on = fresh & (accepted == compared)
    emitted = np.minimum(np.minimum(run, pending) + 1, left)
    return Compared(compared, accepted, emitted, np.where(on, drafted - 1, 0), on)


class Overlapped:
    """While the verifier verifies, the drafter drafts the next gamma tokens on a device of its own.

    PEARL, Liu et al. 2024 (arXiv 2408.11850), as its code has it. A request is in one of two modes:

    - pre-verify: nothing is pending. The verifier's step gives one token; if the first drafted token is it, the other
      gamma - 1 are pending and the request goes to post-verify, else all are void.
    - post-verify: the pending tokens and the first new one are verified (gamma of them). All accepted: it stays.
      Else the first wrong one is replaced and it goes back to pre-verify. No bonus token.

    A round takes max(drafting, verification). With independent acceptance a:

        pi_post = a / (a + 1 - a^gamma);  tokens per round = 1 - pi_post + pi_post (1 - a^gamma) / (1 - a)

    Exact replay of greedy traces and exact in distribution of sampled ones, for drafters that see tokens alone. With
    gamma = 1 it emits one token a round. Drafted tokens that were never compared with the verifier's are in
    ``extra["drafted_ahead"]`` only. KV memory: the verifier holds at most gamma - 1 pending tokens, within what the
    draft length reserves. Prefill chunks of the same step come on top.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._pending = np.zeros(max_num_seqs, dtype=np.int64)

    def opened(self, slots: Ints) -> None:
        """Let these start in pre-verify."""
        self._pending[slots] = 0

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        future = np.minimum(replay.run_length.take(round_.cursor), left)  # beyond the output a recording may go on
        prices, slots = round_.prices, round_.slots
        drafted, pending = ask(policy, round_, future), self._pending[slots]
        tokens = round_.active + int(pending.sum())
        verify_s, outside = prices.verify_s(round_.active, tokens, int(round_.context.sum()))
        draft_s, beyond = 0.0, False
        if prices.draft is not None:
            draft_s, beyond = prices.draft.seconds(drafted, round_.context + pending, verify_s)
        prices.extrapolated_iterations += outside or beyond
        end = compare(pending, drafted, future, left)
        self._pending[slots] = end.pending
        extra = {"drafted_ahead": float(drafted.sum())}
        seconds = max(draft_s, verify_s)
        return Played(
            drafted=end.compared,
            accepted=end.accepted,
            emitted=end.emitted,
            draft_s=draft_s,
            verify_s=verify_s,
            seconds=seconds,
            verified_tokens=tokens,
            extra=extra,
        )


THINNING = 7001
"""Stream of the luck of thinning, next to the seed and the request."""


class ThinnedRuns:
    """Accepts every token that `whole` accepts with probability 1 - `drop`, independently.

    Acceptance a becomes a (1 - drop). One number is drawn for each output token of a request; it depends on seed and
    request alone, so that all policies share their random numbers. Runs of neighbouring positions agree on it: a lost
    token ends every run that reaches it. An approximation of a drafter that was not recorded.

    `lengths`: output tokens of each recorded sequence.
    """

    def __init__(self, whole: Replay, lengths: tuple[int, ...], drop: float, seed: int) -> None:
        self.whole = whole
        self.shapes = whole.shapes
        self._lengths, self._drop, self._seed = lengths, drop, seed
        self._room = Stretches(0)
        self._start: dict[int, int] = {}
        self._cursor = np.zeros(0, dtype=np.int64)
        self.run_length = np.zeros(0, dtype=np.int64)
        self.proposal_length = None if whole.proposal_length is None else np.zeros(0, dtype=np.int64)

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Draw what `request` loses into a stretch of its own."""
        length = output_tokens or self._lengths[sequence]
        first = self.whole.open(sequence, request, output_tokens)
        start = self._room.take(length)
        self._start[start] = first
        kept = np.random.default_rng([self._seed, THINNING, request]).random(length) >= self._drop
        here, there = slice(start, start + length), slice(first, first + length)
        self.run_length, self._cursor = self._room.fit(self.run_length), self._room.fit(self._cursor)
        self.run_length[here] = np.minimum(self.whole.run_length[there], runs_of(kept))
        self._cursor[here] = np.arange(first, first + length)
        if self.proposal_length is not None and self.whole.proposal_length is not None:
            self.proposal_length = self._room.fit(self.proposal_length)
            self.proposal_length[here] = self.whole.proposal_length[there]
        return start

    def close(self, start: int) -> None:
        """Take the stretch back."""
        self.whole.close(self._start.pop(start))
        self._room.give(start)

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`."""
        return self.whole.positions(self._cursor[cursors])


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
        return Played(
            drafted=end.compared,
            accepted=end.accepted,
            emitted=end.emitted,
            draft_s=draft_s,
            verify_s=verify_s,
            seconds=verify_s,
            verified_tokens=tokens,
            extra=extra,
        )

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
