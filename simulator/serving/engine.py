"""The simulated engine: continuous batching with one SimPy event per engine iteration.

An iteration computes what the scheduler planned: prompt chunks of some requests, a decode round (draft, verify,
accept) of all that decode, or, with chunked prefill, both in one step. What can be derived afterwards from the log of
rounds (rounds per request, time per request, gaps between emissions) is not tracked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Protocol

import numpy as np
import simpy

from calibration.common.arrays import Ints
from simulator.placement import Placement, Serial
from simulator.playback.replay import Replay
from simulator.pricing.costs import Prices
from simulator.rounds.protocols import DECODE, MIXED, PREFILL, Played, Round, RunLog, Signals
from simulator.serving.kv import ACCEPTED, CONTEXT, CURSOR, DRAFTED, LEFT, POSITION, SLOT, Job
from simulator.serving.scheduler import Chunk, Limits, Plan, Scheduler
from simulator.stopping import StoppingPolicy


class Inbox(Protocol):
    """Where an engine gets its requests from, and whom it tells what became of them."""

    @property
    def done(self) -> bool:
        """Whether the run is over."""
        ...

    def deliver(self, now: float) -> None:
        """Submit what has arrived to the engines that are to serve it."""
        ...

    def wait(self, engine: Engine) -> simpy.Event:
        """Give the event that ends the idle time of `engine`."""
        ...

    def ended(self, jobs: list[Job], now: float) -> None:
        """Hear that these have ended."""
        ...

    def requeue(self, jobs: list[Job]) -> None:
        """Take back what a failed engine had."""
        ...


class Engine:
    """One replica: its process plans a step, lets its time pass, and notes what came of it.

    `outages`: (fails at, is back at), in seconds. A step under way is lost and takes no part in the log; all requests
    go back to the inbox, with the tokens that they have emitted and without their KV memory.
    """

    def __init__(
        self,
        env: simpy.Environment,
        inbox: Inbox,
        prices: Prices,
        limits: Limits,
        *,
        name: str = "0",
        replay: Replay | None = None,
        policy: StoppingPolicy | None = None,
        placement: Placement | None = None,
        signals: Signals | None = None,
        contents: Callable[[Job, int], list[int]] = lambda job, blocks: [],
        outages: tuple[tuple[float, float], ...] = (),
    ) -> None:
        self.name, self.prices, self.log = name, prices, RunLog()
        self.scheduler = Scheduler(limits, contents=contents, entered=self._resumed, left=self._left)
        self.up, self.requests, self.tokens = True, 0, 0
        """Whether it serves; outstanding requests, and their tokens of prompt and output so far."""
        self.awakening: simpy.Event | None = None
        self._env, self._inbox = env, inbox
        self._replay, self._policy, self._signals = replay, policy, signals
        self._placement: Placement = placement if placement is not None else Serial()
        self._round_end = 0.0
        self.process = env.process(self._run())
        for fails_s, back_s in outages:
            env.process(self._outage(fails_s, back_s))

    # --- what a router sees and does

    def submit(self, job: Job) -> None:
        """Take `job` over; `ScenarioError` where this replica can never serve it."""
        self.scheduler.submit(job)
        self.requests += 1
        self.tokens += job.context
        if self.awakening is not None:
            self.awakening.succeed()
            self.awakening = None

    def cached_tokens(self, job: Job) -> int:
        """Give how many tokens of the beginning of `job` are in the prefix cache."""
        return self.scheduler.cached_tokens(job)

    # --- its process

    def _run(self) -> Generator[simpy.Event, None, None]:
        while not self._inbox.done:
            try:
                if self.up:
                    yield from self._step()
                else:
                    yield self._inbox.wait(self)
            except simpy.Interrupt:
                self._give_up()

    def _step(self) -> Generator[simpy.Event, None, None]:
        self._inbox.deliver(self._env.now)  # whoever has come by now may be in this iteration
        plan = self.scheduler.plan(self._future)
        if plan.chunks or (plan.decode and len(self.scheduler.decoding)):
            yield from self._iterate(plan)
        else:
            yield self._inbox.wait(self)

    def _iterate(self, plan: Plan) -> Generator[simpy.Event, None, None]:
        env, scheduler, log, prices = self._env, self.scheduler, self.log, self.prices
        start, waiting, chunks = env.now, scheduler.waiting, plan.chunks
        live = scheduler.decoding.live if plan.decode else scheduler.decoding.table[:, :0]
        active = live.shape[1]
        prefill_tokens = sum(chunk.tokens for chunk in chunks)
        cached = sum(chunk.cached for chunk in chunks)
        # Everything that the iteration does is worked out before its time passes, from what was known when it began;
        # who comes or ends during it changes the next one.
        draft_s = verify_s = seconds = prefill_s = 0.0
        context = 0
        round_ = played = None
        if active:
            context = int(live[CONTEXT].sum())
            if self._policy is not None and self._replay is not None:
                round_ = self._round(live, prefill_tokens)
                played = self._placement.play(round_, live[LEFT], self._policy, self._replay)
                draft_s, verify_s, seconds = played.draft_s, played.verify_s, played.seconds
            else:
                draft_s, verify_s = prices.decode_s(None, live[CONTEXT], context)
                seconds = draft_s + verify_s
        tokens = active if played is None else played.verified_tokens or active
        # Prefill chunks beside decodes share their forward pass, and so pay its fixed part once.
        if chunks and active:
            prefill_s = prices.added_prefill_s(len(chunks), prefill_tokens, cached, tokens)
        elif chunks:
            prefill_s = prices.prefill_s(len(chunks), prefill_tokens, cached)
        # An engine whose steps were observed may take longer for another number of tokens than in the step before.
        change_s = prices.changed_s(tokens + prefill_tokens)
        if active:
            seconds, verify_s = seconds + change_s, verify_s + change_s
        else:
            prefill_s += change_s
        duration = seconds + prefill_s + prices.overhead_s + plan.swap_s
        blocks = scheduler.pool.used  # those that the iteration holds, not what is left of them after it
        yield env.timeout(duration)

        self._inbox.deliver(env.now)  # before anything changes: routed by what was known at the arrival
        drafted, accepted, emitted = self._emit(live, round_, played) if active else (0, 0, 0)
        # Every request in the step counts an equal share of its time as its own, whatever it did there.
        share_s = duration / (active + len(chunks))
        emitted += self._prefilled(chunks, start, share_s)
        kind = DECODE if not chunks else MIXED if active else PREFILL
        log.iterations.add(
            kind=kind,
            start_s=start,
            duration_s=duration,
            active=active + len(chunks),
            waiting=waiting,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            emitted_tokens=emitted,
            context_tokens=context + cached,
            draft_s=draft_s,
            verify_s=verify_s + prefill_s,
            prefill_s=prefill_s,
            prefill_tokens=prefill_tokens,
            swap_s=plan.swap_s,
            kv_blocks=blocks,
        )
        self.tokens += emitted
        left = scheduler.decoding.live[LEFT]
        # NOTE: counting zeros is cheaper than finding them, and most iterations end no request.
        if np.count_nonzero(left) < len(left):
            self._retire(np.flatnonzero(left == 0).tolist())

    def _future(self) -> Ints:
        """Give the tokens that each request will verify under a policy that knows no longest draft: an oracle."""
        assert self._replay is not None
        live = self.scheduler.decoding.live
        runs: Ints = np.minimum(self._replay.run_length.take(live[CURSOR]), live[LEFT])
        shapes = self._replay.shapes
        return runs if shapes is None else shapes.verified(self._replay.positions(live[CURSOR]), runs)

    def _round(self, live: Ints, prefill_tokens: int) -> Round:
        """Give what is known before a decode round; the arrays are views, whatever comes next changes them."""
        return Round(
            active=live.shape[1],
            slots=live[SLOT],
            position=live[POSITION],
            context=live[CONTEXT],
            cursor=live[CURSOR],
            now_s=self._env.now,
            prices=self.prices,
            signals=self._signals,
            batch_tokens=prefill_tokens,
        )

    def _emit(self, live: Ints, round_: Round | None, played: Played | None) -> tuple[int, int, int]:
        """Let every request that decodes move on; give tokens (drafted, accepted, emitted)."""
        tokens = (0, 0, live.shape[1])
        emitted: Ints | int = 1
        if self._policy is not None and round_ is not None and played is not None:
            self._policy.observe(round_, played)  # before the rows below move on: its arrays are views of them
            drafted, accepted, emitted = played.drafted, played.accepted, played.emitted
            tokens = (int(drafted.sum()), int(accepted.sum()), int(emitted.sum()))
            live[DRAFTED] += drafted
            live[ACCEPTED] += accepted
            self.log.acceptance(drafted, accepted)
            self.log.beside(played, tokens[0])
        # Cursor, position and context are neighbouring rows, and all three move by what was emitted.
        live[CURSOR : CONTEXT + 1] += emitted
        live[LEFT] -= emitted
        self.log.rounds += 1
        self._round_end = self._env.now
        return tokens

    def _prefilled(self, chunks: list[Chunk], start_s: float, share_s: float) -> int:
        """Note computed chunks; give how many requests thereby emitted a token and decode from now on."""
        first = len(self.scheduler.decoding)
        for chunk in chunks:
            job = chunk.job
            if math.isnan(job.start_s):
                job.start_s = start_s
            job.prefill_share_s += share_s
            if self.scheduler.computed(chunk):
                self._enter(job)
        entered = len(self.scheduler.decoding) - first
        if entered:
            self._opened(slice(first, first + entered))
        return entered

    def _enter(self, job: Job) -> None:
        """Let `job`, whose prefill gave it a token, decode."""
        now = self._env.now
        job.previous_s, job.began_s, job.first_round = job.began_s, now, self.log.rounds
        if math.isnan(job.first_token_s):
            job.first_token_s = now
        if self._replay is not None and job.replay_start < 0:
            request = job.request
            job.replay_start = self._replay.open(request.sequence, request.id, request.output_tokens)
        job.emitted += 1  # prefill gives the first token; after a preemption, the one that comes next
        self.scheduler.decoding.enter(job)

    def _resumed(self, job: Job) -> None:
        """Note that `job`, the last one in the table, decodes on after it was swapped out."""
        job.previous_s, job.first_round = math.nan, self.log.rounds
        last = len(self.scheduler.decoding)
        self._opened(slice(last - 1, last))

    def _opened(self, columns: slice) -> None:
        if self._policy is not None:
            slots = self.scheduler.decoding.table[SLOT, columns]
            self._policy.opened(slots)
            self._placement.opened(slots)

    def _left(self, job: Job) -> None:
        """Note a stretch of rounds that has ended."""
        request, rounds = job.request, self.log.rounds
        self.log.spans.add(
            request_id=request.id,
            counted=request.counted,
            first_round=job.first_round,
            last_round=rounds,
            previous_s=job.previous_s,
            began_s=job.began_s,
        )
        if rounds > job.first_round:
            job.began_s = self._round_end

    def _retire(self, columns: list[int]) -> None:
        """Log the requests that have ended."""
        jobs = self.scheduler.end(columns)
        now = self._env.now
        for job in jobs:
            self._close(job)
            r = job.request
            self.log.requests.add(
                request_id=r.id,
                sequence=r.sequence,
                counted=r.counted,
                arrival_s=r.arrival_s,
                start_s=job.start_s,
                first_token_s=job.first_token_s,
                finish_s=now,
                prompt_tokens=r.prompt_tokens,
                output_tokens=r.output_tokens,
                drafted_tokens=job.drafted,
                accepted_tokens=job.accepted,
                prefill_share_s=job.prefill_share_s,
                preemptions=job.preemptions,
                requeues=job.requeues,
                cached_tokens=job.cached_tokens,
            )
            self.requests -= 1
            self.tokens -= job.context
        self._inbox.ended(jobs, now)

    def _close(self, job: Job) -> None:
        if self._replay is not None and job.replay_start >= 0:
            self._replay.close(job.replay_start)
            job.replay_start = -1

    # --- failure

    def _outage(self, fails_s: float, back_s: float) -> Generator[simpy.Event, None, None]:
        yield self._env.timeout(fails_s)
        if not self.process.is_alive:
            return
        self.process.interrupt()
        yield self._env.timeout(back_s - fails_s)
        self.up = True
        self._inbox.requeue([])

    def _give_up(self) -> None:
        """Fail: hand everything back."""
        self.up, self.requests, self.tokens = False, 0, 0
        self.awakening = None
        jobs = self.scheduler.drain()
        for job in jobs:
            self._close(job)
            job.requeues += 1
        self._inbox.requeue(jobs)
