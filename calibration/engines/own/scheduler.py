"""Who is prefilled and who decodes: the rules of the simulated engine (`simulator.serving.scheduler`).

Requests wait in the order of submission, and the first one blocks those behind it. Without chunked prefill, waiting
prompts are computed in a step of their own, as many as have a slot and fit together into `max_num_batched_tokens`;
decoding stands still meanwhile. With it, every request that decodes does so in every step, at the price of 1 + the
longest draft tokens each; what is left of the budget goes to prompts that were begun, then to waiting ones. A prompt
whose last token was computed gives the first token of its request, which decodes from the next step on.

KV memory holds `max_num_seqs` requests of the longest kind, so that nobody is preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from calibration.common.errors import CalibrationError


@dataclass(frozen=True)
class Limits:
    """What the engine may do in one step, in vLLM's words; None: no limit.

    `lookahead_tokens`: the longest draft. `max_model_len`: the most tokens of a request, prompt and output together.
    """

    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = False
    long_prefill_token_threshold: int | None = None
    lookahead_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be."""
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "long_prefill_token_threshold"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CalibrationError(f"engine: {name}: must be at least 1, got {value}")
        budget = self.max_num_batched_tokens
        if self.enable_chunked_prefill and budget is None:
            raise CalibrationError("engine: max_num_batched_tokens: must be given where enable_chunked_prefill is")
        if self.long_prefill_token_threshold is not None and not self.enable_chunked_prefill:
            raise CalibrationError("engine: long_prefill_token_threshold: needs enable_chunked_prefill")
        if budget is not None and budget < self.max_num_seqs:
            rule = f"must be at least max_num_seqs = {self.max_num_seqs}"
            raise CalibrationError(f"engine: max_num_batched_tokens: {rule}, got {budget}")


@dataclass(eq=False)
class Served:
    """A request in the engine: its `text` is the prompt and what it received so far; `left` tokens are to come."""

    request_id: int
    prompt_tokens: int
    left: int
    text: list[int]
    computed: int = 0
    """Prompt tokens in the caches."""


class Chunk(NamedTuple):
    """`tokens` prompt tokens of `request` that a step computes, after `cached` ones."""

    request: Served
    tokens: int
    cached: int

    @property
    def whole(self) -> bool:
        """Whether the prompt is complete with it."""
        return self.cached + self.tokens == self.request.prompt_tokens

    @property
    def token_ids(self) -> Sequence[int]:
        """What is computed."""
        return self.request.text[self.cached : self.cached + self.tokens]


@dataclass
class Scheduler:
    """The requests of the engine: `waiting`, then `prefilling`, then `decoding`."""

    limits: Limits
    waiting: deque[Served] = field(default_factory=deque)
    prefilling: list[Served] = field(default_factory=list)
    decoding: list[Served] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether anybody is here."""
        return bool(self.waiting or self.prefilling or self.decoding)

    def submit(self, request: Served) -> None:
        """Let `request` wait; `CalibrationError` where it can never be served."""
        limits, where = self.limits, f"engine: request {request.request_id}"
        if not request.text or request.left < 1:
            got = f"{len(request.text)} and {request.left}"
            raise CalibrationError(f"{where}: must have a prompt token and be given one to write, got {got}")
        longest = len(request.text) + request.left
        if longest > limits.max_model_len:
            rule = f"prompt and output must have at most max_model_len = {limits.max_model_len} tokens"
            raise CalibrationError(f"{where}: {rule}, got {longest}")
        budget = limits.max_num_batched_tokens
        if budget is not None and not limits.enable_chunked_prefill and len(request.text) > budget:
            rule = f"its prompt must have at most max_num_batched_tokens = {budget} tokens"
            raise CalibrationError(f"{where}: {rule} without enable_chunked_prefill, got {len(request.text)}")
        self.waiting.append(request)

    def plan(self) -> tuple[list[Chunk], bool]:
        """Decide what the next step computes: prompt chunks, and whether those that decode take part."""
        budget = self.limits.max_num_batched_tokens
        if not self.limits.enable_chunked_prefill:
            chunks = self._admit(budget)
            return chunks, not chunks
        assert budget is not None
        budget -= (1 + self.limits.lookahead_tokens) * len(self.decoding)
        chunks = []
        for request in self.prefilling:
            tokens = self._part(request.prompt_tokens - request.computed, max(budget, 0))
            if tokens:
                chunks.append(Chunk(request, tokens, request.computed))
                budget -= tokens
        return chunks + self._admit(budget), True

    def _admit(self, budget: int | None) -> list[Chunk]:
        """Begin with waiting requests while there are slots and tokens."""
        chunks = []
        running = len(self.decoding) + len(self.prefilling)
        while self.waiting and running < self.limits.max_num_seqs and (budget is None or budget > 0):
            tokens = self._part(self.waiting[0].prompt_tokens, budget)
            if not tokens:
                break
            request = self.waiting.popleft()
            self.prefilling.append(request)
            chunks.append(Chunk(request, tokens, 0))
            budget = None if budget is None else budget - tokens
            running += 1
        return chunks

    def _part(self, tokens: int, budget: int | None) -> int:
        """Give how many of `tokens` may be computed now; all or none without chunked prefill."""
        if budget is None or not self.limits.enable_chunked_prefill:
            return tokens if budget is None or tokens <= budget else 0
        return min(tokens, budget, self.limits.long_prefill_token_threshold or tokens)

    def computed(self, chunk: Chunk) -> None:
        """Note a computed chunk; a request whose prompt is complete decodes from now on."""
        chunk.request.computed += chunk.tokens
        if chunk.whole:
            self.prefilling.remove(chunk.request)
            self.decoding.append(chunk.request)

    def retire(self) -> list[Served]:
        """Take out and give the requests that have received everything."""
        gone = [request for request in self.decoding if not request.left]
        if gone:
            self.decoding = [request for request in self.decoding if request.left]
        return gone
