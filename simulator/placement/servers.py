"""Many target servers: DSI."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.placement.dsi import servers_needed
from simulator.playback.replay import Replay
from simulator.rounds.round import Played, Round
from simulator.stopping import StoppingPolicy, ask

_ROUNDING = 1e-9
"""Of a step: less than this early, a token is known."""


class Timetable(NamedTuple):
    """When the j-th token of a stretch is known, in seconds since the stretch began.

    `plain_s`: a verifier step on committed tokens alone; `verify_s`: one on a block; `block_s`: from one block of
    `tokens` (shape: slots; 0 where a slot drafts nothing) to the next.
    """

    plain_s: float
    verify_s: float
    block_s: float
    tokens: Ints

    def when(self, j: Ints) -> Floats:
        """Give when the j-th token (from 1; 0: the beginning) is known, if everything before it was accepted.

        The least of: j plain steps; the block whose verification tells it; the block before that and plain steps.
        """
        k = np.maximum(self.tokens, 1)
        blocks, rest = (j - 1) // k, (j - 1) % k
        plain = j * self.plain_s
        after = blocks * self.block_s + self.verify_s + rest * self.plain_s
        within = (blocks + (rest > 0)) * self.block_s + self.verify_s
        drafted = np.minimum(within, np.where(blocks > 0, after, np.inf))
        best: Floats = np.where((self.tokens > 0) & (j > 0), np.minimum(plain, drafted), plain)
        return best

    def known(self, seconds: Floats) -> Ints:
        """Give how many tokens are known `seconds` after the beginning, if everything was accepted."""
        eps = _ROUNDING * max(self.plain_s, self.verify_s)
        plain = np.floor((seconds + eps) / self.plain_s)
        if self.block_s == 0:
            return np.where((self.tokens > 0) & (seconds + eps >= self.verify_s), 2**62, plain).astype(np.int64)
        blocks = np.floor((seconds + eps - self.verify_s) / self.block_s)
        rest = np.floor((seconds + eps - self.verify_s - blocks * self.block_s) / self.plain_s)
        drafted = np.where((self.tokens > 0) & (blocks > 0), blocks * self.tokens + 1 + rest, 0)
        return np.maximum(plain, drafted).astype(np.int64)


class ManyServers:
    """The drafter drafts on, block after block, while target servers verify the blocks before.

    DSI, Timor et al. 2024 (arXiv 2405.14105). In a stretch without rejection that begins at time 0, block i of k
    tokens is drafted at i k t_d, and a server that begins then knows the tokens up to i k + 1 one verifier step
    later. The first rejected token is replaced by that server's own and ends the stretch; the next one begins then.
    One server decodes plainly: from any known token the next one is known a plain step t_1 later. So the j-th token
    of a stretch is known at

        min(j t_1, ceil((j-1) / k) k t_d + t_v, floor((j-1) / k) k t_d + t_v + ((j-1) mod k) t_1)

    which for the same luck is never later than under `Serial` with the same k, nor than without drafting. This
    needs ceil(t_v / (k t_d)) servers for blocks. Where there are fewer, blocks wait for them and begin t_v / servers
    apart (the first ones would a little sooner); then nothing is promised against `Serial`. The published model
    (`simulator.placement.dsi`) charges more: the block of the rejected token, also where the server before it knows
    that token.

    A round lasts until every slot has its next token, at most t_1 while prices stand still; a slot keeps the time
    that it is ahead. For one slot the times are exact; in a batch tokens are seen at the end of the round in which
    they are known, which is never later than without drafting, and than under `Serial` by a plain step at most.
    Overhead is part of each server's step and not added again. A stretch keeps the draft length that the policy asked
    for at its beginning. Approximation: prices are those of this round's contexts and batch, also for blocks that
    were begun before. Acceptance is replayed as exactly as by `Overlapped`. KV memory of
    servers beyond the first is their own and not modelled.
    """

    def __init__(self, max_num_seqs: int, servers: int | None) -> None:
        self._servers = servers
        self._known = np.zeros(max_num_seqs, dtype=np.int64)
        """Tokens of a slot's stretch that are out."""
        self._ahead = np.zeros(max_num_seqs)
        """Seconds since the last of them was known. NOTE: not since the stretch began, so that a change of prices
        moves what is to come and not what has been."""
        self._tokens = np.zeros(max_num_seqs, dtype=np.int64)
        """Draft length of the stretch."""

    def opened(self, slots: Ints) -> None:
        """Let these begin a stretch."""
        self._ahead[slots] = 0.0
        self._known[slots] = 0

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        future = np.minimum(replay.run_length.take(round_.cursor), left)  # beyond the output a recording may go on
        slots, overhead_s = round_.slots, round_.prices.overhead_s
        known = self._known[slots]
        self._tokens[slots] = np.where(known == 0, ask(policy, round_, future), self._tokens[slots])
        table, servers = self._timetable(round_, self._tokens[slots])
        elapsed = table.when(known) + self._ahead[slots]
        length = max(float((table.when(known + 1) - elapsed).max()), 0.0)
        until = elapsed + length
        ends = known + future + 1
        now = np.minimum(np.maximum(table.known(until), known + 1), ends)
        over, new = now == ends, now - known
        self._known[slots] = np.where(over, 0, now)
        self._ahead[slots] = np.maximum(until - table.when(now), 0.0)

        emitted = np.minimum(new, left)
        compared = np.where(table.tokens > 0, emitted, 0)
        accepted = np.minimum(compared, future)
        blocks = length / table.block_s if table.block_s else 0.0
        extra = {"drafted_ahead": blocks * float(table.tokens.sum()), "servers": float(servers)}
        draft_s = length if table.tokens.any() else 0.0
        verified = round_.active + int(table.tokens.sum())
        # The engine adds the overhead that the timetable holds already.
        return Played(compared, accepted, emitted, draft_s, length, length - overhead_s, verified, extra)

    def _timetable(self, round_: Round, tokens: Ints) -> tuple[Timetable, int]:
        """Give the timetable of this round's prices, and how many servers verify blocks."""
        prices, active, context = round_.prices, round_.active, int(round_.context.sum())
        plain_s, outside = prices.verify_s(active, active, context)
        if prices.draft is None or not tokens.any():
            prices.extrapolated_iterations += outside
            return Timetable(plain_s + prices.overhead_s, plain_s + prices.overhead_s, 0.0, tokens), 1
        verify_s, beyond = prices.verify_s(active, active + int(tokens.sum()), context)
        block_s, draft_beyond = prices.draft.seconds(tokens, round_.context, verify_s)
        prices.extrapolated_iterations += outside or beyond or draft_beyond
        plain_s, verify_s = plain_s + prices.overhead_s, verify_s + prices.overhead_s
        servers = servers_needed(verify_s, block_s) if block_s else self._servers or 1
        if self._servers is not None and servers > self._servers:
            servers = self._servers
            block_s = verify_s / servers
        return Timetable(plain_s, verify_s, block_s, tokens), servers
