"""A live speculative-decoding loop with real KV caches: the proof that a replay tells the truth.

A round starts at position t, with x_0 .. x_{t-1} committed:

1. *Draft.* The drafter proposes d_1 .. d_k, each from q given the text and the drafts before it.
2. *Verify.* One pass of the verifier over x_{t-1}, d_1 .. d_k gives p at t .. t+k.
3. *Accept.* Greedy: as long as d_j is the largest logit. Sampled: d_j with probability min(1, p(d_j)/q(d_j)).
4. *Emit* the accepted drafts and one token more: after a rejection a draw from norm([p - q]+) there (greedy: the
   largest logit), after k acceptances the bonus token, a draw from p. The text is distributed as the verifier's own.
5. *Roll back* what both caches hold of the rejected drafts.

Sources: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023); Chen and
others, "Accelerating Large Language Model Decoding with Speculative Sampling" (2023).

This loop is for checking, not for speed: a finished row rides along until the whole batch is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.drafters import Drafter, PromptLookup
from calibration.generate import cut
from calibration.lane import Lane, pad_left, pad_right
from calibration.ngram import NgramIndex
from calibration.sampling import choose, draw, processed, residual
from calibration.traces.manifest import DecodingInfo


@dataclass(frozen=True)
class Round:
    """One round: where it started, tokens drafted, accepted (bonus excluded) and emitted (bonus included)."""

    start: int
    drafted: int
    accepted: int
    emitted: int


@dataclass(frozen=True)
class LiveRun:
    """What one prompt got: output token ids (an end token included), why it ended, and its rounds.

    x_0 comes from the prefill, so the first round starts at 1. The last round is cut to the output's length.
    """

    ids: tuple[int, ...]
    finish_reason: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Proposal:
    """Drafts of one round: `tokens` [rows, k], of which the first `counts` [rows] of each row are real.

    ``q``: the distributions they were drawn from [rows, k, vocabulary], 0 where nothing is drafted; None in greedy
    decoding, which does not need them.
    """

    tokens: Tensor
    counts: Tensor
    q: Tensor | None


class ModelSide:
    """The drafting side with a model: its lane, and the committed tokens that its cache has not seen yet."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], first: Tensor) -> None:
        self._lane = Lane(model, len(prompts))
        self._lane.feed(*pad_left(prompts, model.device), last=1)
        self._pending = first[:, None]
        self._real = torch.ones_like(self._pending, dtype=torch.bool)
        self._last_draft = first

    def draft(self, gamma: int, decoding: DecodingInfo, generator: torch.Generator) -> Proposal:
        """Draft `gamma` tokens per row, one pass each; the last draft itself is not fed."""
        drafts, dists = [], []
        logits = self._lane.feed(self._pending, self._real, last=1)[:, -1]
        for step in range(gamma):
            if decoding.mode == "greedy":
                drafts.append(logits.argmax(-1))
            else:
                dists.append(processed(logits, decoding))
                drafts.append(draw(dists[-1], generator))
            if step + 1 < gamma:
                logits = self._lane.feed(drafts[-1][:, None])[:, -1]
        self._last_draft = drafts[-1]
        counts = torch.full_like(drafts[-1], gamma)
        return Proposal(torch.stack(drafts, 1), counts, torch.stack(dists, 1) if dists else None)

    def commit(self, proposal: Proposal, accepted: Tensor, following: Tensor) -> None:
        """Forget rejected drafts; `following` [rows] is the token emitted after the accepted ones."""
        gamma = proposal.tokens.shape[1]
        if gamma > 1:
            self._lane.forget(torch.arange(gamma - 1, device=accepted.device) >= accepted[:, None])
        # Where all were accepted, the last draft is committed too, and the cache has not seen it.
        self._pending = torch.stack([self._last_draft, following], 1)
        self._real = torch.stack([accepted == gamma, torch.ones_like(accepted, dtype=torch.bool)], 1)


class LookupSide:
    """The drafting side of prompt lookup: one n-gram index per row."""

    def __init__(self, spec: PromptLookup, prompts: Sequence[Sequence[int]], first: Tensor, vocabulary: int) -> None:
        sizes = {"ngram_max": spec.ngram_max, "ngram_min": spec.ngram_min, "max_draft_tokens": spec.max_draft_tokens}
        self._rows = [NgramIndex((*row, x), **sizes) for row, x in zip(prompts, first.tolist(), strict=True)]
        self._vocabulary = vocabulary
        self._device = first.device

    def draft(self, gamma: int, decoding: DecodingInfo, generator: torch.Generator) -> Proposal:
        """Propose up to `gamma` tokens per row, none where no n-gram matches; their q is one-hot."""
        tokens, real = pad_right([row.propose(gamma) for row in self._rows], self._device)
        q = None
        if decoding.mode == "sampled":
            q = torch.nn.functional.one_hot(tokens, self._vocabulary).float() * real[..., None]
        return Proposal(tokens, real.sum(1), q)

    def commit(self, proposal: Proposal, accepted: Tensor, following: Tensor) -> None:
        """Take in the accepted drafts and the token after them."""
        drafts = proposal.tokens.tolist()
        for row, index in enumerate(self._rows):
            index.extend([*drafts[row][: int(accepted[row])], int(following[row])])


def verify(
    logits: Tensor, proposal: Proposal, decoding: DecodingInfo, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Apply the acceptance rule to the verifier's `logits` [rows, k + 1, vocabulary]; exact.

    Gives (accepted [rows], bonus excluded; the token emitted after them [rows]).
    """
    width = proposal.tokens.shape[1]
    real = torch.arange(width, device=logits.device) < proposal.counts[:, None]
    rows = torch.arange(len(logits), device=logits.device)
    if proposal.q is None:
        best = logits.argmax(-1)
        accepted = leading((proposal.tokens == best[:, :width]) & real)
        return accepted, best[rows, accepted]
    p = processed(logits, decoding)
    p_draft = p[:, :width].gather(-1, proposal.tokens[..., None])[..., 0]
    q_draft = proposal.q.gather(-1, proposal.tokens[..., None])[..., 0]
    luck = torch.rand(real.shape, generator=generator, device=logits.device)
    accepted = leading((luck * q_draft < p_draft) & real)
    # Behind the last draft q is 0: the residual is p itself, and the draw from it is the bonus token.
    q = torch.cat([proposal.q, torch.zeros_like(p[:, :1])], 1)
    return accepted, draw(residual(p[rows, accepted], q[rows, accepted]), generator)


def leading(flags: Tensor) -> Tensor:
    """Count the True values of each row [rows, k] before the first False."""
    return flags.long().cumprod(1).sum(1)


@torch.inference_mode()
def speculate(
    verifier: Any,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    gamma: int,
    decoding: DecodingInfo,
    max_new_tokens: int,
    end_ids: frozenset[int],
    generator: torch.Generator,
) -> list[LiveRun]:
    """Continue every prompt by speculative decoding with drafts of `gamma` tokens; one batch, ragged acceptance."""
    lane = Lane(verifier, len(prompts))
    last = choose(lane.feed(*pad_left(prompts, verifier.device), last=1)[:, -1], decoding, generator)
    side = (
        LookupSide(drafter.spec, prompts, last, verifier.config.vocab_size)
        if isinstance(drafter.spec, PromptLookup)
        else ModelSide(drafter.model, prompts, last)
    )
    texts = [[token] for token in last.tolist()]
    rounds: list[list[Round]] = [[] for _ in prompts]
    while not all(_finished(text, max_new_tokens, end_ids) for text in texts):
        proposal = side.draft(gamma, decoding, generator)
        columns = torch.arange(proposal.tokens.shape[1] + 1, device=lane.device)
        real = columns <= proposal.counts[:, None]
        logits = lane.feed(torch.cat([last[:, None], proposal.tokens], 1), real)
        accepted, last = verify(logits, proposal, decoding, generator)
        lane.forget(columns > accepted[:, None])
        side.commit(proposal, accepted, last)
        drafts = proposal.tokens.tolist()
        for row, (text, hits) in enumerate(zip(texts, accepted.tolist(), strict=True)):
            rounds[row].append(Round(len(text), int(proposal.counts[row]), hits, hits + 1))
            text.extend([*drafts[row][:hits], int(last[row])])
    return [_trim(text[:max_new_tokens], mine, end_ids) for text, mine in zip(texts, rounds, strict=True)]


def _finished(text: list[int], max_new_tokens: int, end_ids: frozenset[int]) -> bool:
    return len(text) >= max_new_tokens or not end_ids.isdisjoint(text)


def _trim(text: list[int], rounds: list[Round], end_ids: frozenset[int]) -> LiveRun:
    """Cut a row to its output of T tokens: accepted and emitted of its last round end there."""
    output = cut(text, end_ids)
    count = len(output.ids)
    kept = [
        Round(r.start, r.drafted, min(r.accepted, count - r.start), min(r.emitted, count - r.start))
        for r in rounds
        if r.start < count
    ]
    return LiveRun(output.ids, output.finish_reason, tuple(kept))
