"""A live speculative-decoding loop with real KV caches: the proof that a replay tells the truth.

A round starts at position t, with x_0 .. x_{t-1} committed:

1. *Draft.* The drafter proposes d_1 .. d_k, each from q given the text and the drafts before it.
2. *Verify.* One pass of the verifier over x_{t-1}, d_1 .. d_k gives p at t .. t+k.
3. *Accept.* Greedy: as long as d_j is the largest logit. Sampled: d_j with probability min(1, p(d_j)/q(d_j)).
4. *Emit* the accepted drafts and one token more: after a rejection a draw from norm([p - q]+) there (greedy: the
   largest logit), after k acceptances the bonus token, a draw from p. The text is distributed as the verifier's own.
5. *Roll back* what both caches hold of the rejected drafts.

A draft may also be a tree: the pass then reads all its nodes under a tree mask, and the verifier's own tokens lead
from the root down as long as a node holds them.

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

from calibration.models.drafter import Drafter, Opening, Proposal
from calibration.models.lane import Lane, cut, pad_left
from calibration.models.sampling import choose, draw, processed, residual
from calibration.traces.manifest import DecodingInfo


@dataclass(frozen=True)
class Round:
    """One round: where it started, tokens drafted, accepted (bonus excluded) and emitted (bonus included).

    Of a tree, ``drafted`` is the depth.
    """

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
class Verdict:
    """What verification says of a round: which drafted nodes [rows, n] are emitted, and the token after them [rows].

    ``accepted`` [rows] counts the former; the latter is the verifier's own: correction or bonus.
    """

    nodes: Tensor
    accepted: Tensor
    following: Tensor


def verify(logits: Tensor, proposal: Proposal, decoding: DecodingInfo, generator: torch.Generator) -> Verdict:
    """Apply the acceptance rule to the verifier's `logits` [rows, n + 1, vocabulary]; lossless.

    Trees and greedy chains: the verifier's own token at every column leads from node to node as long as one holds it
    (in sampled decoding: naive multi-draft verification of given tokens). Sampled chains: token-level speculative
    sampling.
    """
    width = proposal.tokens.shape[1]
    real = torch.arange(width, device=logits.device) < proposal.counts[:, None]
    if proposal.q is None or proposal.parents is not None:
        return _follow(choose(logits, decoding, generator), proposal, real)
    rows = torch.arange(len(logits), device=logits.device)
    p = processed(logits, decoding)
    p_draft = p[:, :width].gather(-1, proposal.tokens[..., None])[..., 0]
    q_draft = proposal.q.gather(-1, proposal.tokens[..., None])[..., 0]
    luck = torch.rand(real.shape, generator=generator, device=logits.device)
    accepted = leading((luck * q_draft < p_draft) & real)
    # Behind the last draft q is 0: the residual is p itself, and the draw from it is the bonus token.
    q = torch.cat([proposal.q, torch.zeros_like(p[:, :1])], 1)
    following = draw(residual(p[rows, accepted], q[rows, accepted]), generator)
    nodes = torch.arange(width, device=logits.device) < accepted[:, None]
    return Verdict(nodes, accepted, following)


def _follow(own: Tensor, proposal: Proposal, real: Tensor) -> Verdict:
    """Walk each row's drafts along the verifier's `own` tokens [rows, n + 1]."""
    rows, width = proposal.tokens.shape
    column = torch.arange(-1, width - 1, device=own.device).expand(rows, -1)
    parents = column if proposal.parents is None else proposal.parents
    at = torch.full((rows,), -1, device=own.device)
    nodes = torch.zeros(rows, width, dtype=torch.bool, device=own.device)
    index = torch.arange(rows, device=own.device)
    for node in range(width):
        hit = real[:, node] & (parents[:, node] == at) & (proposal.tokens[:, node] == own[index, at + 1])
        nodes[:, node] = hit
        at = torch.where(hit, node, at)
    return Verdict(nodes, nodes.sum(1), own[index, at + 1])


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
    lane = Lane(verifier, len(prompts), taps=drafter.taps)
    tokens, real = pad_left(prompts, verifier.device)
    last = choose(lane.feed(tokens, real, last=1)[:, -1], decoding, generator)
    states = {tap: [s[r] for s, r in zip(lane.tapped[tap], real, strict=True)] for tap in drafter.taps}
    side = drafter.side(Opening(verifier, prompts, last.tolist(), decoding, states))
    texts = [[token] for token in last.tolist()]
    rounds: list[list[Round]] = [[] for _ in prompts]
    while not all(_finished(text, max_new_tokens, end_ids) for text in texts):
        proposal = side.draft(gamma, generator)
        logits = _feed(lane, last, proposal)
        verdict = verify(logits, proposal, decoding, generator)
        last = verdict.following
        kept = torch.cat([torch.ones_like(last, dtype=torch.bool)[:, None], verdict.nodes], 1)
        lane.forget(~kept)
        states = {tap: [s[k] for s, k in zip(lane.tapped[tap], kept, strict=True)] for tap in drafter.taps}
        emitted = [
            [*tokens[nodes].tolist(), int(following)]
            for tokens, nodes, following in zip(proposal.tokens, verdict.nodes, last, strict=True)
        ]
        side.commit(emitted, states)
        depth = _depths(proposal).tolist()
        for row, (text, new) in enumerate(zip(texts, emitted, strict=True)):
            rounds[row].append(Round(len(text), depth[row], len(new) - 1, len(new)))
            text.extend(new)
    return [_trim(text[:max_new_tokens], mine, end_ids) for text, mine in zip(texts, rounds, strict=True)]


def _feed(lane: Lane, last: Tensor, proposal: Proposal) -> Tensor:
    """Let the verifier read the last committed token and the drafts behind it."""
    tokens = torch.cat([last[:, None], proposal.tokens], 1)
    real = torch.arange(tokens.shape[1], device=last.device) <= proposal.counts[:, None]
    if proposal.parents is None:
        return lane.feed(tokens, real)
    return lane.feed_tree(tokens, real, proposal.parents)


def _depths(proposal: Proposal) -> Tensor:
    """Give how many tokens deep each row's drafts are [rows]."""
    if proposal.parents is None:
        return proposal.counts
    depth = torch.zeros_like(proposal.tokens)
    index = torch.arange(len(depth), device=depth.device)
    for node in range(depth.shape[1]):
        up = proposal.parents[:, node]
        real = node < proposal.counts
        depth[:, node] = torch.where(real, torch.where(up < 0, 0, depth[index, up]) + 1, 0)
    deepest: Tensor = depth.amax(1) if depth.shape[1] else proposal.counts
    return deepest


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
