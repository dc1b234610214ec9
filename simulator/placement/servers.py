"""Many target servers: DSI.

The published model of distributed speculative inference (DSI), for one request.

Timor et al. 2024 (arXiv 2405.14105). Unit of cost: one verifier step. A drafter step costs c; each drafted token is
accepted independently with probability a; drafts have k tokens, shortened at the end of the output.

- SI (serial): every round costs its drafting and one verifier step, and gives the accepted tokens and one more.
- DSI, with enough target servers: drafting goes on while blocks are verified, until a token is rejected. Such a
  stretch of n accepted tokens and one correction costs min(drafting of all its blocks, the rejected one included,
  + 1, n + 1): what lies behind "+ 1" is the verification of the last block, and n + 1 is plain decoding.

`si_costs` and `dsi_costs` draw runs of this model, `expected_si_cost` and `expected_dsi_cost` give their exact
means. In the mean DSI never loses to SI or to plain decoding; on one and the same random numbers a stretch that ends
exactly with a block may, as the rejected block's drafting is charged. `simulator.placement.servers` does not charge
that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CostError
from simulator.playback.replay import Replay
from simulator.rounds.protocols import Played, Round
from simulator.stopping import StoppingPolicy, ask

_TAIL = 1e-17
"""Probability of the stretches that the asymptote leaves out."""


@dataclass(frozen=True)
class PublishedModel:
    """c, a, k and the number of output tokens; `CostError` where they are none."""

    draft_step: float
    acceptance: float
    draft_tokens: int
    output_tokens: int = 1000

    def __post_init__(self) -> None:
        """Refuse what the model does not know."""
        for name, holds, rule in (
            ("draft_step", self.draft_step > 0, "must be above 0"),
            ("acceptance", 0 <= self.acceptance <= 1, "must be in [0, 1]"),
            ("draft_tokens", self.draft_tokens >= 1, "must be at least 1"),
            ("output_tokens", self.output_tokens >= 1, "must be at least 1"),
        ):
            if not holds:
                raise CostError(f"{name}: {rule}, got {getattr(self, name)}")

    @property
    def servers(self) -> int:
        """Target servers that DSI needs: ceil(verifier step / drafting of a block)."""
        return servers_needed(1.0, self.draft_tokens * self.draft_step)


def servers_needed(verify_s: float, block_s: float) -> int:
    """Give how many target servers verify blocks as fast as they are drafted: ceil(verify_s / block_s)."""
    # NOTE: 1 / (10 * .1) is 1.0000000000000002 or so in other orders: less than 1e-9 too many is none.
    return max(1, math.ceil(verify_s / block_s - 1e-9))


def _accepted(model: PublishedModel, number: int, rng: Generator) -> Ints:
    """Draw how many tokens are accepted before the first rejection."""
    if model.acceptance == 1:
        return np.full(number, model.output_tokens)
    return rng.geometric(1 - model.acceptance, number) - 1


def si_costs(model: PublishedModel, runs: int, rng: Generator) -> Floats:
    """Draw the costs of `runs` outputs under serial speculation, in verifier steps."""
    cost, left = np.zeros(runs), np.full(runs, model.output_tokens)
    while left.any():
        drafted = np.minimum(model.draft_tokens, left - 1)
        accepted = np.minimum(_accepted(model, runs, rng), drafted)
        cost += np.where(left > 0, drafted * model.draft_step + 1, 0)
        left = np.maximum(left - accepted - 1, 0)
    return cost


def dsi_costs(model: PublishedModel, runs: int, rng: Generator) -> Floats:
    """Draw the costs of `runs` outputs under DSI with enough servers, in verifier steps."""
    cost, left = np.zeros(runs), np.full(runs, model.output_tokens)
    while left.any():
        accepted = np.maximum(np.minimum(_accepted(model, runs, rng), left - 1), 0)
        cost += np.where(left > 0, _stretch(model, accepted, left), 0)
        left = np.maximum(left - accepted - 1, 0)
    return cost


def _stretch(model: PublishedModel, accepted: Ints, left: Ints | int) -> Floats:
    """Give what a stretch of `accepted` tokens and one more costs DSI, where `left` tokens are to come."""
    drafted = np.minimum(model.draft_tokens * (accepted // model.draft_tokens + 1), np.asarray(left) - 1)
    return np.asarray(np.minimum(model.draft_step * drafted + 1, accepted + 1.0), dtype=np.float64)


def expected_si_cost(model: PublishedModel) -> float:
    """Give the exact mean: f(t) = min(k, t - 1) c + 1 + sum_i P(i accepted) f(t - i - 1), f(0) = 0."""
    cost = np.zeros(model.output_tokens + 1)
    for left in range(1, model.output_tokens + 1):
        drafted = min(model.draft_tokens, left - 1)
        cost[left] = drafted * model.draft_step + 1 + _stopped(model, drafted) @ _rest(cost, left, drafted)
    return float(cost[-1])


def expected_dsi_cost(model: PublishedModel) -> float:
    """Give the exact mean: g(t) = sum_n P(n accepted) (stretch of n + g(t - n - 1)), n <= t - 1, g(0) = 0."""
    cost = np.zeros(model.output_tokens + 1)
    for left in range(1, model.output_tokens + 1):
        stretch = _stretch(model, np.arange(left), left)
        cost[left] = _stopped(model, left - 1) @ (stretch + _rest(cost, left, left - 1))
    return float(cost[-1])


def _stopped(model: PublishedModel, drafted: int) -> Floats:
    """Give the probabilities that 0, 1, .. `drafted` of so many tokens are accepted."""
    chance = np.asarray(model.acceptance ** np.arange(drafted + 1) * (1 - model.acceptance), dtype=np.float64)
    chance[drafted] = model.acceptance**drafted
    return chance


def _rest(cost: Floats, left: int, drafted: int) -> NDArray[np.float64]:
    """Give the cost of what is left after 0, 1, .. `drafted` accepted tokens and one more."""
    return cost[left - 1 - np.arange(drafted + 1)]


def dsi_cost_per_token(model: PublishedModel) -> float:
    """Give the limit for long outputs: (1-a) sum_n (1-a) a^n min(1 + k c (floor(n/k) + 1), n + 1), a < 1.

    With k = 1 and c <= 1/2: (1-a) + c a + c a (1-a). With a = 1 drafting alone is left: min(c, 1).
    """
    a, k, c = model.acceptance, model.draft_tokens, model.draft_step
    if a == 1:
        return min(c, 1.0)
    length = 1 if a == 0 else math.ceil(math.log(_TAIL * (1 - a)) / math.log(a))
    n = np.arange(max(length, k + 1))
    stretch = np.minimum(1 + k * c * (n // k + 1), n + 1)
    return float((1 - a) * np.sum((1 - a) * a**n * stretch))


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

    which for the same random numbers is never later than under `Serial` with the same k, nor than without drafting.
    This needs ceil(t_v / (k t_d)) servers for blocks. Where there are fewer, blocks wait for them and begin t_v /
    servers apart (the first ones would a little sooner); then nothing is promised against `Serial`. The published
    model (`simulator.placement.servers`) charges more: the block of the rejected token, also where the server before
    it knows that token.

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
        return Played(
            drafted=compared,
            accepted=accepted,
            emitted=emitted,
            draft_s=draft_s,
            verify_s=length,
            seconds=length - overhead_s,
            verified_tokens=verified,
            extra=extra,
        )

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
