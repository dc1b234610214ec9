"""Drafters within the engine: models with KV caches, and proposers of given tokens.

*Models* (early exit, layer skip, distilled, standalone) draft in lock step: each step feeds every request one token,
the first step whatever its cache lacks of the text: one token, or two after a round in which all was accepted, as the
last draft itself is not fed. Prompts are read in the step of their prefill, which costs a draft step with all their
tokens. A drafter whose layers are the verifier's first ones (an early exit) reads and writes the verifier's own
cache: it has no prefill, and lacks one token always. What it computed for the drafts is not used again, the verifier
computes all its layers for all of them.

*Proposers* (prompt lookup and others that give chains) take one row of `DraftStep` a round: a new token a sequence,
whatever they propose. Reading the prompt is part of its prefill step.

How many tokens are drafted: one number, or one for each range of batch sizes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from calibration.common.errors import CalibrationError
from calibration.drafters.given import GivenDrafter
from calibration.drafters.lanes import ModelDrafter
from calibration.engines.drive import DraftStep
from calibration.engines.own.cache import KvCache, PaddedCache
from calibration.engines.own.decoder import Decoder, Span
from calibration.engines.own.scheduler import Chunk, Served
from calibration.models.drafter import Drafter
from calibration.proposers.protocol import Proposer


class Stopwatch:
    """Seconds since it was started or last read: CPU seconds of this thread, and wall seconds; one on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cpu_s, self._wall_s = self._now()

    def _now(self) -> tuple[float, float]:
        if self._device is None:
            return time.thread_time(), time.perf_counter()
        torch.cuda.synchronize(self._device)
        now_s = time.perf_counter()
        return now_s, now_s

    def read(self) -> tuple[float, float]:
        """Give (CPU, wall) seconds."""
        cpu_s, wall_s = self._now()
        passed = cpu_s - self._cpu_s, wall_s - self._wall_s
        self._cpu_s, self._wall_s = cpu_s, wall_s
        return passed


class Drafting(Protocol):
    """What the engine asks of a drafter; requests are those of the scheduler."""

    def prefill(self, chunks: Sequence[Chunk]) -> list[DraftStep]:
        """Read prompts, or parts of them."""
        ...

    def draft(self, requests: Sequence[Served], tokens: int) -> tuple[list[Sequence[int]], list[DraftStep]]:
        """Give up to `tokens` drafted tokens behind the text of each request, and what each step took."""
        ...

    def settle(self, request: Served, agreed: int) -> None:
        """Hear that the drafts behind `request` are no longer right after its first `agreed` tokens."""
        ...

    def close(self, request: Served) -> None:
        """Forget a request."""
        ...


class ModelDrafting:
    """A causal LM that drafts. `cache` is its own, or the verifier's where `shared`."""

    def __init__(self, decoder: Decoder, cache: KvCache, *, shared: bool) -> None:
        self._decoder, self._cache, self._shared = decoder, cache, shared

    def prefill(self, chunks: Sequence[Chunk]) -> list[DraftStep]:
        """Read prompts into a cache of its own."""
        if self._shared:
            return []
        for chunk in chunks:
            if not chunk.cached:
                self._cache.open(chunk.request.request_id)
        spans = [Span(chunk.request.request_id, chunk.token_ids, 0) for chunk in chunks]
        return [self._step(prompt_groups(spans, self._cache))[1]]

    def draft(self, requests: Sequence[Served], tokens: int) -> tuple[list[Sequence[int]], list[DraftStep]]:
        """Draft `tokens` tokens per request in lock step."""
        feed: list[Sequence[int]] = [r.text[self._cache.length(r.request_id) :] for r in requests]
        drafts: list[list[int]] = [[] for _ in requests]
        steps = []
        for _ in range(tokens):
            spans = [Span(r.request_id, new, 1) for r, new in zip(requests, feed, strict=True)]
            feed, step = self._step([spans])
            steps.append(step)
            for draft, new in zip(drafts, feed, strict=True):
                draft.extend(new)
        if self._shared:  # the verifier reads these tokens itself
            for request in requests:
                self._cache.truncate(request.request_id, len(request.text) - 1)
        return list(drafts), steps

    def _step(self, groups: Sequence[Sequence[Span]]) -> tuple[list[Sequence[int]], DraftStep]:
        spans = [span for group in groups for span in group]
        context = sum(self._cache.length(span.sequence) for span in spans)
        watch = Stopwatch(self._decoder.device)
        chosen = self._decoder.choose(groups, self._cache)
        new = sum(len(span.tokens) for span in spans)
        return list(chosen), DraftStep(self._decoder.name, len(spans), new, context, *watch.read())

    def settle(self, request: Served, agreed: int) -> None:
        """Forget the drafts that were rejected; a shared cache is the verifier's business."""
        if not self._shared and self._cache.length(request.request_id) > agreed:
            self._cache.truncate(request.request_id, agreed)

    def close(self, request: Served) -> None:
        """Forget a request."""
        if not self._shared:
            self._cache.close(request.request_id)


class ProposerDrafting:
    """One proposer of chains per request."""

    def __init__(self, drafter: GivenDrafter) -> None:
        self._drafter = drafter
        self._rows: dict[int, tuple[Proposer, int]] = {}

    def prefill(self, chunks: Sequence[Chunk]) -> list[DraftStep]:
        """Read prompts that are complete."""
        for chunk in chunks:
            if chunk.whole:
                proposer = self._drafter.make()
                proposer.extend(chunk.request.text[: chunk.request.prompt_tokens])
                self._rows[chunk.request.request_id] = proposer, chunk.request.prompt_tokens
        return []

    def draft(self, requests: Sequence[Served], tokens: int) -> tuple[list[Sequence[int]], list[DraftStep]]:
        """Read what was committed since, and propose up to `tokens` tokens; nothing where nothing is known."""
        watch = Stopwatch(torch.device("cpu"))
        drafts = []
        for request in requests:
            proposer, seen = self._rows[request.request_id]
            proposer.extend(request.text[seen:])
            self._rows[request.request_id] = proposer, len(request.text)
            draft = proposer.propose(tokens)
            if draft.parents is not None:
                rule = (
                    f"drafter '{self._drafter.name}': must draft chains, which alone the engine verifies, got a tree"
                )
                raise CalibrationError(rule)
            drafts.append(draft.tokens)
        context = sum(len(request.text) for request in requests)
        step = DraftStep(self._drafter.name, len(requests), len(requests), context, *watch.read())
        return list(drafts), [step]

    def settle(self, request: Served, agreed: int) -> None:
        """Nothing to forget: a proposer reads what was committed only."""

    def close(self, request: Served) -> None:
        """Forget a request."""
        del self._rows[request.request_id]


def prompt_groups(spans: Sequence[Span], cache: KvCache) -> list[list[Span]]:
    """Group prompts for attention: all in one rectangle where the cache is padded, else each for itself."""
    return [list(spans)] if isinstance(cache, PaddedCache) else [[span] for span in spans]


def model_of(drafter: Drafter) -> Any | None:
    """Give the causal LM of a drafter that is one, None for a proposer; `CalibrationError` for any other kind."""
    if isinstance(drafter, GivenDrafter):
        return None
    if isinstance(drafter, ModelDrafter) and drafter.window is None and drafter.stop is None:
        return drafter.model
    rule = "must be a causal LM without a window or a stopping rule of its own, or propose given chains"
    raise CalibrationError(f"drafter '{drafter.name}': {rule}, got paradigm '{drafter.info.paradigm}'")


Range = tuple[int, int, int]
"""First and last batch size, and the draft length K for them."""


class DraftLengths:
    """A draft length by the number of requests that decode, the same for all of them.

    A table has the form and meaning of vLLM's `num_speculative_tokens_per_batch_size`, and of the scenario policy
    `by_batch`: ranges from 1 on, without gaps; larger batches take the last K.
    """

    def __init__(self, draft_tokens: int | Sequence[Range]) -> None:
        self.table = ((1, 1, draft_tokens),) if isinstance(draft_tokens, int) else tuple(draft_tokens)
        self._fixed = isinstance(draft_tokens, int)
        expected = 1
        for entry in self.table:
            if len(entry) != 3 or entry[0] != expected or entry[1] < entry[0] or entry[2] < 0:
                rule = "must be at least 0, or ranges [first, last, K] that follow each other from 1 on, K >= 0"
                got = draft_tokens if self._fixed else [list(row) for row in self.table]
                raise CalibrationError(f"engine: draft_tokens: {rule}, got {got}")
            expected = entry[1] + 1

    @property
    def longest(self) -> int:
        """The longest draft; 0 also for an empty table."""
        return max((draft_tokens for _, _, draft_tokens in self.table), default=0)

    def at(self, batch: int) -> int:
        """Give the draft length where `batch` requests decode."""
        for _, last, draft_tokens in self.table:
            if batch <= last:
                return draft_tokens
        return self.table[-1][2] if self.table else 0

    def __str__(self) -> str:
        """Give the number, or the table as it is written in a scenario."""
        return str(self.table[0][2] if self._fixed else [list(row) for row in self.table])
