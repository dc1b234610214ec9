"""Overlapped placement: PEARL's pre-verify and post-verify."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Ints
from simulator.placement.window import compare
from simulator.playback.replay import Replay
from simulator.rounds.round import Played, Round
from simulator.stopping import StoppingPolicy, ask


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
        return Played(end.compared, end.accepted, end.emitted, draft_s, verify_s, seconds, tokens, extra)
