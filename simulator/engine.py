"""The simulated engine: continuous batching with one SimPy event per engine iteration.

An iteration is either a prefill of the requests just admitted (all their prompt tokens in one verifier step; it has
priority and emits each one's first token) or a decode round of every active slot: draft, verify, accept.

Live slots are a prefix of the arrays, so that the work of a round is a dozen numpy calls on slices, whatever the
batch. What can be derived afterwards from the log of rounds (rounds per request, time per request, gaps between
emissions) is not tracked here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import simpy

from simulator.costs import Prices
from simulator.log import RunLog
from simulator.replay import IntArray, Replay
from simulator.stopping import Round, StoppingPolicy
from simulator.workload import Request, Source

_CURSOR, _LEFT, _CONTEXT, _DRAFTED, _ACCEPTED = range(5)
"""Rows of the slot table: place in the replay arrays; output tokens to come; prompt and committed tokens; totals."""


class Engine:
    """One replica. Slots fill in order of arrival and stay in that order."""

    def __init__(
        self,
        env: simpy.Environment,
        source: Source,
        prices: Prices,
        max_num_seqs: int,
        *,
        replay: Replay | None = None,
        policy: StoppingPolicy | None = None,
        ended: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.log = RunLog()
        self._env, self._source, self._prices = env, source, prices
        self._slots = max_num_seqs
        self._replay, self._policy, self._ended = replay, policy, ended
        self._live: list[Request] = []
        self._table = np.zeros((5, max_num_seqs), dtype=np.int64)
        self._total_context = 0

    def run(self) -> Generator[simpy.Event, None, None]:
        """Serve until the source is done; the process of this replica."""
        env, source = self._env, self._source
        while not source.done:
            new = source.admit(env.now, self._slots - len(self._live))
            if new:
                yield from self._prefill(new)
            elif self._live:
                yield from self._decode()
            else:
                yield env.timeout(source.next_arrival_s - env.now)

    def _prefill(self, new: list[Request]) -> Generator[simpy.Event, None, None]:
        env, log, overhead_s = self._env, self.log, self._prices.overhead_s
        start, waiting = env.now, self._source.waiting(env.now)
        prompt_tokens = sum(request.prompt_tokens for request in new)
        verify_s = self._prices.prefill_s(len(new), prompt_tokens)
        duration = verify_s + overhead_s
        yield env.timeout(duration)
        log.iterations.add(1, start, duration, len(new), waiting, 0, 0, len(new), 0, 0.0, verify_s)
        for request in new:
            request.start_s, request.first_token_s = start, env.now
            request.first_round, request.prefill_share_s = log.rounds, duration / len(new)
            self._occupy(request)
        if any(request.output_tokens == 1 for request in new):
            self._retire()

    def _occupy(self, request: Request) -> None:
        """Give `request`, whose first token is out, the next slot."""
        slot = len(self._live)
        if self._replay is not None:
            request.replay_start = self._replay.open(request.sequence, request.id)
        context = request.prompt_tokens + 1
        self._table[:, slot] = (request.replay_start + 1, request.output_tokens - 1, context, 0, 0)
        self._total_context += context
        self._live.append(request)

    def _decode(self) -> Generator[simpy.Event, None, None]:
        env, active, context = self._env, len(self._live), self._total_context
        cursor, left, contexts, drafted_sum, accepted_sum = self._table[:, :active]
        start, waiting = env.now, self._source.waiting(env.now)
        drafted = accepted = None
        emitted: IntArray | int = 1
        tokens = (0, 0, active)
        if self._policy is not None:
            drafted, accepted = self._speculate(cursor, left)
            advance = emitted = np.minimum(accepted + 1, left)
            tokens = (int(drafted.sum()), int(accepted.sum()), int(advance.sum()))
        draft_s, verify_s = self._prices.decode_s(drafted, contexts, context)
        duration = draft_s + verify_s + self._prices.overhead_s
        yield env.timeout(duration)
        cursor += emitted
        left -= emitted
        contexts += emitted
        self._total_context += tokens[2]
        if drafted is not None and accepted is not None:
            drafted_sum += drafted
            accepted_sum += accepted
            self.log.acceptance(drafted, accepted)
        self.log.rounds += 1
        self.log.iterations.add(0, start, duration, active, waiting, *tokens, context, draft_s, verify_s)
        if np.count_nonzero(left) < active:
            self._retire()

    def _speculate(self, cursor: IntArray, left: IntArray) -> tuple[IntArray, IntArray]:
        """Give the tokens (drafted, accepted) of every active slot."""
        assert self._replay is not None
        assert self._policy is not None
        # Never beyond the output: a truncated replay has run lengths that go on.
        runs = np.minimum(self._replay.run_length.take(cursor), left)
        drafted = self._policy.draft_tokens(Round(len(cursor), runs))
        if self._replay.proposal_length is not None:
            drafted = np.minimum(drafted, self._replay.proposal_length.take(cursor))
        return drafted, np.minimum(runs, drafted)

    def _retire(self) -> None:
        """Log the requests that have ended and move the others together."""
        active, now = len(self._live), self._env.now
        table = self._table
        left = table[_LEFT, :active]
        counted = 0
        for slot in np.flatnonzero(left == 0).tolist():
            request = self._live[slot]
            self._note(request, int(table[_DRAFTED, slot]), int(table[_ACCEPTED, slot]))
            self._total_context -= int(table[_CONTEXT, slot])
            counted += request.counted
            if self._replay is not None:
                self._replay.close(request.replay_start)
            self._source.end(request, now)
        keep = np.flatnonzero(left)
        table[:, : len(keep)] = table[:, keep]
        self._live = [self._live[slot] for slot in keep.tolist()]
        self._ended(counted)

    def _note(self, request: Request, drafted: int, accepted: int) -> None:
        r = request
        times = (r.arrival_s, r.start_s, r.first_token_s, self._env.now)
        rounds = (r.first_round, self.log.rounds)
        lengths = (r.prompt_tokens, r.output_tokens)
        self.log.requests.add(
            r.id, r.sequence, r.counted, *times, *lengths, *rounds, drafted, accepted, r.prefill_share_s
        )
