"""The scheduler of one replica: who is prefilled, who decodes, who waits and who is preempted.

Its rules are those of vLLM's schedulers (``vllm/v1/core/sched/scheduler.py``, and V0's without chunked prefill).

Batching: in which order waiting requests are admitted, by name from ``[batching]``.

An order gives every request a rank when it arrives at a replica; the smallest rank goes first, equal ones in order of
submission. Preempted requests go before all others, as in vLLM. The head of the queue blocks it: nobody overtakes
because a smaller request would fit. An order sees what a server knows of a request when it arrives.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import ScenarioError
from calibration.common.plugins import make_plugin, need
from simulator.playback.replay import SequenceTable
from simulator.rounds.protocols import Counters
from simulator.scenario.fleet import (
    Batching,
    EarliestDeadline,
    FirstCome,
    OracleShortest,
    PluginOrder,
    PriorityClasses,
    ShortestPredicted,
)
from simulator.serving.kv import BLOCKS, CONTEXT, BlockPool, DecodeTable, Job
from simulator.workload import Request

Order = Callable[[Request], float]
"""Gives the rank of a request; it depends on nothing but the request, so that a queue can be kept sorted."""


def make_order(settings: Batching | None, sequences: SequenceTable) -> Order:
    """Give the order that a scenario names; first come, first served where it names none."""
    match settings:
        case ShortestPredicted():
            predicted = domain_means(sequences)
            return lambda request: predicted[request.sequence]
        case OracleShortest():
            return lambda request: float(request.output_tokens)
        case EarliestDeadline(default_s=default_s):
            last = default_s if default_s is not None else math.inf
            return lambda request: min(request.deadline_s, request.arrival_s + last)
        case PriorityClasses(ageing_s=ageing_s):
            if ageing_s is None:
                return lambda request: float(request.priority)
            # Class - waited / ageing_s, compared between two requests, does not depend on the moment.
            return lambda request: request.arrival_s + ageing_s * request.priority
        case PluginOrder():
            return _from_outside(settings)
        case FirstCome() | None:
            return lambda request: request.arrival_s
    assert_never(settings)


def _from_outside(settings: PluginOrder) -> Order:
    """Give the order that an entry point (settings) -> callable(request) -> number makes."""
    place = "batching.policy"
    order = make_plugin(settings, place, ScenarioError)
    need(order, ("__call__",), "a callable that takes a request", settings.name, place, ScenarioError)

    def checked(request: Request) -> float:
        key = order(request)
        if isinstance(key, bool) or not isinstance(key, int | float | np.number) or math.isnan(float(key)):
            raise ScenarioError(
                f"{place}: plugin '{settings.name}' must give a number for every request, the smallest first, "
                f"got {key!r}"
            )
        return float(key)

    return checked


def domain_means(sequences: SequenceTable) -> list[float]:
    """Give, for every sequence, the mean recorded output of its domain in tokens."""
    domains, of = np.unique(np.array(sequences.domains), return_inverse=True)
    lengths = np.array(sequences.output_tokens, dtype=np.float64)
    means = np.bincount(of, weights=lengths, minlength=len(domains)) / np.bincount(of, minlength=len(domains))
    return [float(mean) for mean in means[of]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a replica may do; see `EngineKeys`. None: no limit.

    `lookahead_tokens`: the longest draft, for which KV slots are kept free; None for a policy that only knows just
    before the round. `num_blocks` KV blocks of `block_size` tokens; `block_swap_s`: seconds to copy one to or from
    the host, None where preempted requests are computed anew.
    """

    max_num_seqs: int
    max_num_batched_tokens: int | None = None
    chunked_prefill: bool = False
    long_prefill_tokens: int | None = None
    lookahead_tokens: int | None = 0
    num_blocks: int | None = None
    block_size: int = 16
    prefix_caching: bool = False
    block_swap_s: float | None = None


class Chunk(NamedTuple):
    """`tokens` of a job's context that a step computes; `cached` tokens before them are in memory."""

    job: Job
    tokens: int
    cached: int


@dataclass(slots=True)
class Plan:
    """What the next step computes, beside or instead of a decode round."""

    chunks: list[Chunk] = field(default_factory=list)
    swap_s: float = 0.0
    decode: bool = True


class Scheduler:
    """Requests of one replica and their KV memory.

    `waiting` is a heap by (not preempted, rank, id); `prefilling` and then `decoding` jobs are the running ones.
    `contents(job, blocks)` gives the keys of the first `blocks` blocks of its context. `entered` hears of a job that
    is swapped in to decode on, `left` of every one that stops decoding.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        contents: Callable[[Job, int], list[int]] = lambda job, blocks: [],
        entered: Callable[[Job], None] = lambda job: None,
        left: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.limits = limits
        self.decoding = DecodeTable(limits.max_num_seqs)
        self.prefilling: list[Job] = []
        self.counters = Counters()
        self._contents, self._entered, self._left = contents, entered, left
        self._waiting: list[tuple[bool, float, int, Job]] = []
        self._paged = limits.num_blocks is not None or limits.prefix_caching
        self.pool = self._empty_pool()

    def _empty_pool(self) -> BlockPool:
        return BlockPool(self.limits.num_blocks, caching=self.limits.prefix_caching)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Let `job` wait; `ScenarioError` where this replica can never serve it."""
        self._check(job)
        heapq.heappush(self._waiting, (True, job.rank, job.request.id, job))

    def _check(self, job: Job) -> None:
        limits, request = self.limits, job.request
        longest = request.prompt_tokens + (request.output_tokens - 1 if limits.num_blocks is not None else 0)
        budget = limits.max_num_batched_tokens
        if budget is not None and not limits.chunked_prefill and longest > budget:
            raise ScenarioError(
                f"engine.max_num_batched_tokens: must be at least {longest}, the longest prefill of request "
                f"{request.id}, unless enable_chunked_prefill is true, got {budget}"
            )
        if limits.num_blocks is not None:
            need = self._blocks(request.prompt_tokens + request.output_tokens + (limits.lookahead_tokens or 0))
            if need > limits.num_blocks:
                raise ScenarioError(
                    f"engine: KV memory: must hold at least {need} blocks of {limits.block_size} tokens for request "
                    f"{request.id} ({request.prompt_tokens} + {request.output_tokens} tokens and the slots ahead), "
                    f"got {limits.num_blocks}"
                )

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    # --- planning a step

    def plan(self, future: Callable[[], Ints]) -> Plan:
        """Decide what the next step computes and take the KV blocks that it needs.

        `future` gives the tokens that each one in `decoding` will draft; asked only where `lookahead_tokens` is None.
        """
        if not (self._waiting or self.prefilling or self._paged):
            return _DECODE_ONLY
        plan = Plan()
        # Chunked: decodes come first, then prefills that have begun, then new ones, all within one token budget.
        # Not chunked: whoever can be admitted is prefilled whole, and decodes wait for that step.
        if self.limits.chunked_prefill:
            preempted = self._reserve(plan, future)
            budget = self._budget()
            budget, stopped = self._continue(plan, budget)
            # Memory that ran out is not given to newcomers in the very step that took it from somebody.
            if not (preempted or stopped):
                self._admit(plan, budget)
            return plan
        self._admit(plan, self.limits.max_num_batched_tokens)
        plan.decode = not plan.chunks
        if plan.decode:
            self._reserve(plan, future)
        return plan

    def _budget(self) -> int:
        """Tokens that decoding leaves to prefill."""
        assert self.limits.max_num_batched_tokens is not None
        # Every decode may verify its longest draft and one token more, whatever its policy asks for this time.
        per_request = 1 + (self.limits.lookahead_tokens or 0)
        return self.limits.max_num_batched_tokens - per_request * len(self.decoding)

    def _admit(self, plan: Plan, budget: int | None) -> None:
        """Admit from the head of the queue while there are slots, tokens and blocks."""
        running = len(self.decoding) + len(self.prefilling)
        while self._waiting and running < self.limits.max_num_seqs and (budget is None or budget > 0):
            job = self._waiting[0][3]  # strictly in order: one that does not fit holds up all behind it, as in vLLM
            if job.swapped:
                if not self._swap_in(plan, job):
                    return
            else:
                chunk = self._start(job, budget)
                if chunk is None:
                    return
                plan.chunks.append(chunk)
                budget = None if budget is None else budget - chunk.tokens
            heapq.heappop(self._waiting)
            running += 1

    def _start(self, job: Job, budget: int | None) -> Chunk | None:
        """Give the first chunk of `job` with its blocks taken, or None where it does not fit."""
        limits, pool, context = self.limits, self.pool, job.context
        cached, keys = 0, job.keys
        if limits.prefix_caching:
            keys = self._name(job, context)
            # At least one token is computed, as nothing else gives the next one.
            cached = pool.known(keys[: (context - 1) // limits.block_size])
        # What came with the request is lost with its memory.
        carried = 0 if job.preemptions or job.requeues else job.request.carried_tokens
        done = max(cached * limits.block_size, carried)
        tokens = self._chunk(context - done, budget)
        if tokens == 0:
            return None
        if self._paged:
            new = self._blocks(done + tokens + self._ahead(done + tokens == context)) - cached
            # Cached blocks that nobody holds count as free until they are leased: both cannot have them.
            if new + pool.idle(keys[:cached]) > pool.free:
                return None
            pool.lease(keys[:cached])
            pool.take(new)
            job.blocks, job.shared = cached + new, cached
            self._publish(job, done + tokens)
        self._count_start(job, context, cached * limits.block_size)
        job.computed = done
        self.prefilling.append(job)
        return Chunk(job, tokens, done)

    def _name(self, job: Job, tokens: int) -> list[int]:
        """Give the keys of the full blocks of the first `tokens` tokens of `job`, from now on its keys."""
        size = self.limits.block_size
        if job.key_tokens != size or len(job.keys) != tokens // size:
            job.keys, job.key_tokens = self._contents(job, tokens // size), size
        return job.keys

    def cached_tokens(self, job: Job) -> int:
        """Give how many tokens of the beginning of `job` are in the prefix cache."""
        return self.limits.block_size * self.pool.known(self._name(job, job.context))

    def _chunk(self, tokens: int, budget: int | None) -> int:
        """Give how many of `tokens` may be computed now; all or none without chunked prefill."""
        if budget is None or not self.limits.chunked_prefill:
            return tokens if budget is None or tokens <= budget else 0
        return min(tokens, budget, self.limits.long_prefill_tokens or tokens)

    def _ahead(self, whole: bool) -> int:
        """Slots kept for the first draft, once the whole context is computed."""
        return (self.limits.lookahead_tokens or 0) if whole else 0

    def _publish(self, job: Job, computed: int) -> None:
        """Let others find the full blocks of `job` up to `computed` tokens."""
        full = min(computed // self.limits.block_size, len(job.keys))
        if full > job.shared:
            self.pool.publish(job.keys[job.shared : full])
            job.shared = full

    def _count_start(self, job: Job, context: int, cached: int) -> None:
        counters = self.counters
        if job.lost:
            counters.recomputed_tokens += max(0, job.lost - cached)
            job.lost = 0
        elif self.limits.prefix_caching and not (job.preemptions or job.requeues):
            counters.prefix_queries += context
            counters.prefix_hits += cached
            job.cached_tokens = cached

    def _continue(self, plan: Plan, budget: int) -> tuple[int, bool]:
        """Go on with prefills that have begun; give the budget left and whether blocks ran out."""
        for job in list(self.prefilling):
            if job not in self.prefilling:  # an earlier one of this loop took its memory
                return budget, True
            tokens = self._chunk(job.context - job.computed, max(budget, 0))
            if tokens == 0:
                continue
            whole = job.computed + tokens == job.context
            need = self._blocks(job.computed + tokens + self._ahead(whole)) - job.blocks
            # The last admitted gives way first; that may be this one itself.
            while self._paged and need > self.pool.free and job in self.prefilling:
                self._preempt(plan, self.prefilling.pop())
            if job not in self.prefilling:
                return budget, True
            if self._paged and need > 0:
                self.pool.take(need)
                job.blocks += need
            self._publish(job, job.computed + tokens)
            plan.chunks.append(Chunk(job, tokens, job.computed))
            budget -= tokens
        return budget, False

    # --- memory of those that decode

    def _reserve(self, plan: Plan, future: Callable[[], Ints]) -> bool:
        """Take blocks for this round's committed and drafted tokens; give whether somebody was preempted.

        The last admitted loses its place first, those still prefilling before those that decode.
        """
        if not self._paged or len(self.decoding) == 0:
            return False
        ahead = self.limits.lookahead_tokens
        preempted = False
        while True:
            live = self.decoding.live
            tokens = live[CONTEXT] + (ahead if ahead is not None else future())
            # Blocks once taken are kept: a shorter draft in the next round gives none back.
            need = np.maximum((tokens + (self.limits.block_size - 1)) // self.limits.block_size, live[BLOCKS])
            more = int(need.sum()) - int(live[BLOCKS].sum())
            if more <= self.pool.free:
                break
            preempted = True
            self._preempt(plan, self.prefilling.pop() if self.prefilling else self._drop_last())
        if more:
            self.pool.take(more)
            live[BLOCKS] = need
        return preempted

    def _drop_last(self) -> Job:
        job = self.decoding.drop_last()
        job.computed = job.context - 1  # the last emitted token has not been through the model yet
        self._left(job)
        return job

    def _preempt(self, plan: Plan, job: Job) -> None:
        """Take the blocks of a running `job`, which left its place, and let it wait before all others."""
        job.preemptions += 1
        self.counters.preemptions += 1
        # Only what decodes is worth copying out; a prefill that is cut short begins again.
        if self.limits.block_swap_s is not None and job.computed >= job.context - 1 and job.emitted:
            job.swapped = True
            plan.swap_s += self._copy(job)
            self.counters.swapped_tokens += job.computed
        else:
            if self.limits.prefix_caching:
                self._name(job, job.computed)
                self._publish(job, job.computed)
            job.lost = max(job.lost, job.computed)
        self._free(job)
        heapq.heappush(
            self._waiting, (False, job.rank, job.request.id, job)
        )  # False sorts before True: first in line

    def _copy(self, job: Job) -> float:
        assert self.limits.block_swap_s is not None
        return self.limits.block_swap_s * self._blocks(job.context - 1)

    def _swap_in(self, plan: Plan, job: Job) -> bool:
        """Bring a swapped `job` back if its blocks fit; it decodes in the next round."""
        new = self._blocks(job.context + (self.limits.lookahead_tokens or 0))
        if new > self.pool.free:
            return False
        self.pool.take(new)
        job.blocks, job.shared, job.swapped = new, 0, False
        plan.swap_s += self._copy(job)
        self.decoding.enter(job)
        self._entered(job)
        return True

    def _free(self, job: Job) -> None:
        if self._paged:
            self.pool.release(job.keys[: job.shared], job.blocks - job.shared)
        job.blocks = job.shared = job.computed = 0

    # --- what happened

    def computed(self, chunk: Chunk) -> bool:
        """Note that a chunk was computed; give whether the whole context now is, so that a token comes out.

        Such a job is to enter `decoding` next.
        """
        job = chunk.job
        job.computed = chunk.cached + chunk.tokens
        if job.computed < job.context:
            return False
        self.prefilling.remove(job)
        return True

    def end(self, columns: list[int]) -> list[Job]:
        """Take the jobs at these columns of the decode table out for good."""
        jobs = self.decoding.leave(columns)
        for job in jobs:
            self._free(job)
            self._left(job)
        return jobs

    def drain(self) -> list[Job]:
        """Give up everything, memory and its content included: running jobs first, then waiting ones in order."""
        decoding = self.decoding.leave(list(range(len(self.decoding))))
        for job in decoding:
            job.computed = job.context - 1
            self._left(job)
        jobs = decoding + self.prefilling + [entry[3] for entry in sorted(self._waiting, key=lambda e: e[:3])]
        for job in jobs:
            if job.swapped:
                job.computed = job.context - 1
            job.lost = max(job.lost, job.computed)
            job.swapped, job.blocks, job.shared, job.computed = False, 0, 0, 0
        self.prefilling.clear()
        self._waiting.clear()
        self.pool = self._empty_pool()
        return jobs


_DECODE_ONLY = Plan()
"""NOTE: shared, never changed: without waiting requests or paged memory a plan costs nothing."""
