"""Drafting with a head: step by step in a live loop, and from every start of a text at once.

A draft is the largest logit in greedy decoding, else drawn from q, the processed softmax of the logits. Medusa's and
a block's q at draft j do not depend on the drafts before it; an EAGLE head's does.

Recording packs all starts as branches of one past: one pass over the text, and for an EAGLE head one more per depth.
It equals the step-by-step loop but for rounding (the tests ask, depth by depth). Greedy replay is exact. Sampled:
the head runs a second time along the text's own tokens (and its own features), which gives the acceptance of every
draft given that those before it are the text; exact in distribution, one draw recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.models.clock import start_clock
from calibration.models.drafter import Drafter, Drafts, Opening, Proposal, Read, Side, Tap
from calibration.models.lane import pad_left
from calibration.models.sampling import draw, entropy, processed
from calibration.traces.manifest import DecodingInfo, DrafterInfo
from calibration.trained.heads import Head, Past

CHUNK = 256
"""Starts that draft at once: CHUNK x vocabulary floats per draft."""


@dataclass
class Chooser:
    """Picks the draft at each depth, and keeps what the trace wants to know of it: lists over the depth of [R, S].

    ``text`` [R, S, depth]: tokens to go on with in place of the drafts; -1 where the text has ended.
    """

    verifier: Any
    decoding: DecodingInfo
    generator: torch.Generator
    text: Tensor | None = None
    keep_q: bool = False
    tokens: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)

    def __call__(self, step: int, features: Tensor) -> Tensor:
        """Choose from the verifier's head over `features`; give the embedding of what stands there."""
        logits = self.verifier.get_output_embeddings()(features).to(features.device)
        q = processed(logits, self.decoding)
        greedy = self.decoding.mode == "greedy"
        self.tokens.append(logits.argmax(-1) if greedy else draw(q, self.generator))
        self.confidence.append(q.amax(-1))
        self.entropy.append(entropy(q))
        if self.keep_q:
            self.q.append(q)
        token = self.tokens[-1] if self.text is None else self.text[..., step].clamp(min=0)
        embedded: Tensor = self.verifier.get_input_embeddings()(token)
        return embedded


@dataclass(frozen=True)
class HeadDrafter:
    """A trained head and the `verifier` model whose states, embedding and LM head it uses."""

    info: DrafterInfo
    head: Head
    verifier: Any
    parts: tuple[Drafter, ...] = ()
    model: None = None
    taps: tuple[Tap, ...] = ("norm",)

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name

    def limit(self, depth: int) -> int:
        """Give how many of `depth` tokens it drafts."""
        return min(depth, self.info.max_draft_tokens or depth)

    def side(self, opening: Opening) -> Side:
        """Begin drafting for a batch."""
        return HeadSide(self, opening)

    def read(self, past: Past | None, features: Tensor, tokens: Tensor, real: Tensor | None = None) -> Past:
        """Take in pairs: `features` [R, n, hidden size], each with the token behind it [R, n]."""
        if real is None:
            real = torch.ones_like(tokens, dtype=torch.bool)
        return self.head.read(past, features, self.verifier.get_input_embeddings()(tokens), real)

    def drafts(self, read: Read, depth: int, generator: torch.Generator) -> Drafts:
        """Give the drafts from every start; none where no state is known yet (a prompt of one token, t = 0)."""
        limit, count = self.limit(depth), len(read.output_ids)
        known = len(read.prompt_ids) - 2  # column of the last pair at start 0
        starts = torch.arange(max(0, -known), count, device=self.verifier.device)
        empty = _Found.empty(count, limit, sampled=read.decoding.mode == "sampled")
        if not len(starts):
            return empty.drafts()
        text = torch.tensor([*read.prompt_ids, *read.output_ids], device=self.verifier.device)
        pairs = known + count
        past = self.read(None, read.states["norm"][None, :pairs], text[None, 1 : pairs + 1])
        for begin in range(0, len(starts), CHUNK):
            self._draft_from(
                starts=starts[begin : begin + CHUNK],
                known=known,
                past=past,
                read=read,
                limit=limit,
                generator=generator,
                found=empty,
            )
        return empty.drafts()

    def _draft_from(
        self,
        starts: Tensor,
        known: int,
        past: Past,
        read: Read,
        limit: int,
        generator: torch.Generator,
        found: _Found,
    ) -> None:
        """Fill in the rows of `starts` [S]."""
        rows, branches = starts.cpu().numpy(), past.branches((starts + known)[None])
        free = Chooser(self.verifier, read.decoding, generator, keep_q=True)
        self.head.unroll(past, branches, limit, free)
        for name in ("tokens", "confidence", "entropy"):
            getattr(found, name)[rows] = torch.stack(getattr(free, name), -1)[0].cpu().numpy()
        text = _text_from(read.output_ids, starts, limit)
        first, p = free.q[0][0], read.verifier_p[starts]
        found.rank[rows] = (first > first.gather(1, text[:, :1])).sum(1).cpu().numpy()
        found.overlap[rows] = torch.minimum(p, first).sum(1).clamp(max=1.0).cpu().numpy()
        if found.accept is not None:
            forced = Chooser(self.verifier, read.decoding, generator, text=text[None], keep_q=True)
            self.head.unroll(past, branches, limit, forced)
            found.accept[rows] = _acceptance(read.verifier_p, starts, text, forced.q).cpu().numpy()

    def step(self, batch: int, context_tokens: int, noise: torch.Generator) -> Callable[[], float]:
        """Give a function that runs one step once: one draft of an EAGLE head, a whole round of the others.

        The past holds `context_tokens` pairs of noise, whose values do not matter to the time.
        """
        device, weight = self.verifier.device, self.verifier.get_input_embeddings().weight
        hidden = self.verifier.config.hidden_size
        count = max(context_tokens, 1)
        features = torch.randn(batch, count, hidden, generator=noise, device=noise.device).to(device, weight.dtype)
        tokens = torch.zeros(batch, count, dtype=torch.long, device=device)
        last = torch.full((batch, 1), count - 1, device=device)
        logits = self.verifier.get_output_embeddings()
        depth = 2 if self.head.autoregressive else self.limit(self.head.shape.tokens)
        embedded = self.verifier.get_input_embeddings()(tokens[:, :1])

        @torch.inference_mode()
        def run() -> float:
            past = self.read(None, features, tokens)
            branches = past.branches(last)
            clock = start_clock(device)
            drafts = self.head.unroll(past, branches, depth, lambda step, g: embedded)
            logits(torch.cat(drafts[1:] if self.head.autoregressive else drafts, 1)).argmax(-1)
            return clock()

        return run


class HeadSide:
    """The past of a batch, and the pairs of each row that the head has not read yet."""

    def __init__(self, drafter: HeadDrafter, opening: Opening) -> None:
        self._drafter, self._decoding = drafter, opening.decoding
        self._past: Past | None = None
        self._features = list(opening.states["norm"])
        self._tokens = [[*prompt[1:], token] for prompt, token in zip(opening.prompts, opening.first, strict=True)]

    def draft(self, gamma: int, generator: torch.Generator) -> Proposal:
        """Read what was committed, then draft up to `gamma` tokens per row."""
        drafter = self._drafter
        tokens, real = pad_left(self._tokens, drafter.verifier.device)
        features = torch.zeros(*real.shape, self._features[0].shape[-1], device=real.device).to(self._features[0])
        features[real] = torch.cat(self._features)
        self._past = drafter.read(self._past, features, tokens, real)
        last = torch.full((len(real), 1), self._past.real.shape[1] - 1, device=real.device)
        sampled = self._decoding.mode == "sampled"
        chooser = Chooser(drafter.verifier, self._decoding, generator, keep_q=sampled)
        limit = drafter.limit(gamma)
        drafter.head.unroll(self._past, self._past.branches(last), limit, chooser)
        counts = torch.full((len(real),), limit, device=real.device)
        q = torch.cat(chooser.q, 1) if sampled else None
        return Proposal(torch.cat(chooser.tokens, 1), counts, q, confidence=torch.cat(chooser.confidence, 1))

    def commit(self, emitted: Sequence[Sequence[int]], states: Mapping[Tap, Sequence[Tensor]]) -> None:
        """Keep the new pairs; what the head made of its drafts is dropped."""
        self._tokens = [list(row) for row in emitted]
        self._features = list(states["norm"])


@dataclass
class _Found:
    """Arrays of `Drafts` being filled."""

    tokens: Any
    confidence: Any
    entropy: Any
    rank: Any
    overlap: Any
    accept: Any | None

    @classmethod
    def empty(cls, count: int, limit: int, *, sampled: bool) -> _Found:
        nothing = [np.full((count, limit), np.nan, dtype=np.float32) for _ in range(3)]
        return cls(
            tokens=np.full((count, limit), -1, dtype=np.int32),
            confidence=nothing[0],
            entropy=nothing[1],
            rank=np.zeros(count, dtype=np.int32),
            overlap=np.zeros(count, dtype=np.float32),
            accept=nothing[2] if sampled else None,
        )

    def drafts(self) -> Drafts:
        return Drafts(
            self.tokens,
            confidence=self.confidence,
            entropy=self.entropy,
            accept=self.accept,
            rank=self.rank,
            overlap=self.overlap,
        )


def _text_from(output_ids: Sequence[int], starts: Tensor, depth: int) -> Tensor:
    """Give the text from every start on [S, depth]; -1 behind its end."""
    text = torch.tensor([*output_ids, *[-1] * depth], device=starts.device)
    return text[starts[:, None] + torch.arange(depth, device=starts.device)]


def _acceptance(p: Tensor, starts: Tensor, text: Tensor, q: Sequence[Tensor]) -> Tensor:
    """Give min(1, q/p) of the text at every draft [S, depth]; NaN where the text has ended."""
    found = []
    for step, dist in enumerate(q):
        token = text[:, step, None]
        here = token[:, 0] >= 0
        safe = token.clamp(min=0)
        at = (starts + step).clamp(max=len(p) - 1)
        p_token, q_token = p[at].gather(1, safe)[:, 0], dist[0].gather(1, safe)[:, 0]
        # p(x_t) is 0 only by rounding between two passes; the limit p -> 0 is then taken.
        ratio = torch.where(p_token > 0, q_token / p_token, (q_token > 0).float()).clamp(max=1.0)
        found.append(torch.where(here, ratio, torch.nan))
    return torch.stack(found, 1)
