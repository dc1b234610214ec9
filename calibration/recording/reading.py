"""The teacher-forced pass: verifier and drafters read the same text side by side.

From what a drafter proposes at every start to columns of a TraceSet.

*Given tokens, and greedy decoding:* a draft is accepted as far as the text follows it; the run length is exact.

*Sampled chains with a q of their own:* given the text, draft j (from 0) at start t is accepted with probability
min(1, q/p) at x_{t+j}, independently, where q may depend on the start (a head drafts on from its own states). The run
length recorded is one draw of those; a chain of rounds visits a start at most once, so its replay is exact in
distribution, and replays of one recording share that draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.arrays import Ints
from calibration.common.fetch import Advance
from calibration.models.drafter import Drafts, Tap, followed
from calibration.models.lane import Lane, Window, pad_left, pad_right
from calibration.models.sampling import choose, entropy, numpy_generator, processed
from calibration.traces.manifest import DecodingInfo

CHUNK = 64
"""Output positions whose logits are held at once: rows x CHUNK x vocabulary floats per model."""

Stats = dict[str, NDArray[Any]]


@dataclass
class Reading:
    """What a batch's text looks like to every model, per row and output position t: arrays [rows, positions].

    verifier: ``match`` (largest logit is x_t), ``probability`` p(x_t), ``confidence``, ``entropy``.
    drafters: ``match``, ``accept`` = min(1, q(x_t)/p(x_t)), ``rank`` of x_t (0 first), ``confidence``, ``entropy``,
    ``overlap`` = sum of min(p, q), and ``drafted``, the token that a draft from t begins with.
    lanes: the drafters' caches over the text, with x_i in column ``origin`` + i.
    states: per tap and row, the verifier's state after each token of prompt + output but the last.
    """

    origin: int
    prompt_tokens: Tensor
    lanes: dict[str, Lane]
    verifier: Stats = field(default_factory=dict)
    drafters: dict[str, Stats] = field(default_factory=dict)
    states: dict[Tap, list[Tensor]] = field(default_factory=dict)


@torch.inference_mode()
def read_together(
    verifier: Any,
    drafters: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    decoding: DecodingInfo,
    generator: torch.Generator,
    advance: Advance | None = None,
    taps: Sequence[Tap] = (),
    windows: Mapping[str, Window | None] | None = None,
) -> Reading:
    """Feed prompt + output to `verifier` and to every model of `drafters` (by name); give a `Reading`.

    Columns are aligned so that the logits which predict x_t stand in one column for all rows. Distributions are those
    of `calibration.models.sampling.processed`. `advance` is called with the positions just read.
    `taps` are the verifier's states to keep; `windows` limits what drafters attend to, by name.
    """
    device: torch.device = verifier.device
    head, head_real = pad_left([row[:-1] for row in prompts], device)
    body, body_real = pad_right([(row[-1], *out[:-1]) for row, out in zip(prompts, outputs, strict=True)], device)
    emitted, _ = pad_right(outputs, device)
    writer = Lane(verifier, len(prompts), taps=taps)
    bounds = windows or {}
    lanes = {
        name: Lane(model, len(prompts), window=bounds.get(name), prompts=prompts) for name, model in drafters.items()
    }
    states: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    if head.shape[1]:
        for lane in (writer, *lanes.values()):
            lane.feed(head, head_real, last=1)
        _collect(states, writer)
    verifier_parts: list[dict[str, Tensor]] = []
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in drafters}
    for start in range(0, body.shape[1], CHUNK):
        cols = slice(start, start + CHUNK)
        token = emitted[:, cols]
        logits = writer.feed(body[:, cols], body_real[:, cols])
        _collect(states, writer)
        p = processed(logits, decoding)
        verifier_parts.append(_verifier_stats(logits, p, token))
        for name, lane in lanes.items():
            logits = lane.feed(body[:, cols], body_real[:, cols])
            parts[name].append(_drafter_stats(logits, p, token, decoding, generator))
        if advance:
            advance(token.shape[1])
    lengths = torch.tensor([len(row) for row in prompts], device=device)
    return Reading(
        origin=head.shape[1] + 1,
        prompt_tokens=lengths,
        lanes=lanes,
        verifier=_join(verifier_parts),
        drafters={name: _join(chunks) for name, chunks in parts.items()},
        states={tap: _by_row(chunks, writer.kept) for tap, chunks in states.items()},
    )


def _collect(states: dict[Tap, list[Tensor]], lane: Lane) -> None:
    for tap, chunks in states.items():
        chunks.append(lane.tapped[tap])


def _by_row(chunks: list[Tensor], kept: Tensor) -> list[Tensor]:
    """Join the chunks of a state; give each row's own columns, padding left out."""
    return [row[mine] for row, mine in zip(torch.cat(chunks, 1), kept, strict=True)]


def _at(values: Tensor, token: Tensor) -> Tensor:
    """Pick `values` [..., vocabulary] at `token` [...]."""
    return values.gather(-1, token[..., None])[..., 0]


def _verifier_stats(logits: Tensor, p: Tensor, token: Tensor) -> dict[str, Tensor]:
    return {
        "match": logits.argmax(-1) == token,
        "probability": _at(p, token),
        "confidence": p.amax(-1),
        "entropy": entropy(p),
    }


def _drafter_stats(
    logits: Tensor, p: Tensor, token: Tensor, decoding: DecodingInfo, generator: torch.Generator
) -> dict[str, Tensor]:
    q = processed(logits, decoding)
    p_token, q_token = _at(p, token), _at(q, token)
    # p(x_t) is 0 only by rounding between two passes; the limit p -> 0 is then taken.
    ratio = torch.where(p_token > 0, q_token / p_token, (q_token > 0).float())
    return {
        "match": logits.argmax(-1) == token,
        "accept": ratio.clamp(max=1.0),
        "rank": (logits > _at(logits, token)[..., None]).sum(-1),
        "confidence": q.amax(-1),
        "entropy": entropy(q),
        "overlap": torch.minimum(p, q).sum(-1).clamp(max=1.0),
        "drafted": choose(logits, decoding, generator),
    }


def _join(parts: list[dict[str, Tensor]]) -> Stats:
    return {key: torch.cat([part[key] for part in parts], 1).cpu().numpy() for key in parts[0]}


def run_lengths(match: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Give, for each position of `match` [positions], how many ones follow from there on."""
    stops = np.where(match, len(match), np.arange(len(match)))
    return (np.minimum.accumulate(stops[::-1])[::-1] - np.arange(len(match))).astype(np.int32)


Columns = dict[str, list[Any]]


def position_columns(
    drafts: Drafts,
    output_ids: tuple[int, ...],
    generator: torch.Generator,
    *,
    deterministic: bool,
    mass: NDArray[np.float32] | None = None,
) -> Columns:
    """Give the columns of positions.parquet that a drafter fills, one entry per start; bonus excluded.

    ``deterministic``: drafts are given tokens, or decoding is greedy. ``mass`` [T]: p of the first proposed token.
    """
    depth = node_depths(drafts)
    proposed = depth.max(1, initial=0)
    tree = drafts.parents is not None
    if drafts.runs is not None:
        runs = drafts.runs
    elif deterministic:
        runs = followed(drafts, np.asarray(output_ids, dtype=np.int64))
    elif drafts.accept is None:
        raise ValueError("a sampled drafter must say with which probability its drafts are accepted")
    else:
        luck = numpy_generator(generator).random(drafts.accept.shape)
        runs = leading_true(luck < np.nan_to_num(drafts.accept))
    runs = np.minimum(runs, np.minimum(proposed, np.arange(len(output_ids), 0, -1)))
    any_ = proposed > 0
    first = None if drafts.accept is None else drafts.accept[:, 0]
    hits = (runs > 0).astype(float) if deterministic or first is None else first
    overlap = mass if drafts.overlap is None else drafts.overlap
    count = len(output_ids)
    return {
        "run_length": runs.tolist(),
        "proposal_length": proposed.tolist(),
        "proposal_nodes": _cumulative(depth, proposed) if tree else [None] * count,
        "draft_layers": _lists(drafts.layers, proposed),
        "accept_probability": _where(any_, hits),
        "emitted_rank": _where(any_, drafts.rank) if drafts.rank is not None else _rank(drafts, runs),
        "drafter_confidence": [None] * count if drafts.confidence is None else _where(any_, drafts.confidence[:, 0]),
        "drafter_entropy": [None] * count if drafts.entropy is None else _where(any_, drafts.entropy[:, 0]),
        "overlap": [None] * count if overlap is None else _where(any_, overlap),
    }


def rollout_columns(drafts: Drafts, starts: Ints) -> Columns:
    """Give columns of rollouts.parquet for the rows of `drafts`, which begin at `starts`; none without confidence."""
    if drafts.confidence is None or drafts.entropy is None:
        return {}
    columns: Columns = {"position": [], "step": [], "drafter_confidence": [], "drafter_entropy": []}
    for row, start in enumerate(starts.tolist()):
        steps = int(np.isfinite(drafts.confidence[row]).sum())
        columns["position"] += [start] * steps
        columns["step"] += list(range(1, steps + 1))
        columns["drafter_confidence"] += drafts.confidence[row, :steps].tolist()
        columns["drafter_entropy"] += drafts.entropy[row, :steps].tolist()
    return columns


def node_depths(drafts: Drafts) -> Ints:
    """Give the depth of every drafted node [T, N], 1 for a first token, 0 where there is none."""
    count, width = drafts.tokens.shape
    real = drafts.tokens >= 0
    if drafts.parents is None:
        return np.where(real, np.arange(1, width + 1), 0)
    depth = np.zeros((count, width + 1), dtype=np.int64)  # the last column is the committed text
    rows = np.arange(count)
    for node in range(width):
        depth[:, node] = np.where(real[:, node], depth[rows, drafts.parents[:, node]] + 1, 0)
    return depth[:, :width]


def leading_true(flags: NDArray[np.bool_]) -> Ints:
    """Count the true values of each row before the first false."""
    count: Ints = np.cumprod(flags, axis=1, dtype=np.int64).sum(1)
    return count


def _cumulative(depth: Ints, proposed: Ints) -> list[list[int]]:
    """Give, for every start, how many nodes there are down to depth 1, 2, ..."""
    levels = range(1, int(proposed.max(initial=0)) + 1)
    counts = np.stack([((depth > 0) & (depth <= level)).sum(1) for level in levels], 1) if levels else depth[:, :0]
    return [row[:length].tolist() for row, length in zip(counts, proposed.tolist(), strict=True)]


def _lists(values: NDArray[Any] | None, lengths: Ints) -> list[Any]:
    if values is None:
        return [None] * len(lengths)
    return [row[:length].tolist() for row, length in zip(np.cumsum(values, 1), lengths.tolist(), strict=True)]


def _where(present: NDArray[np.bool_], values: NDArray[Any]) -> list[Any]:
    return [value if here else None for here, value in zip(present.tolist(), values.tolist(), strict=True)]


def _rank(drafts: Drafts, runs: Ints) -> list[int | None]:
    """Rank of x_t among the first tokens proposed: known where it is one of a chain's."""
    if drafts.parents is not None:
        return [None] * len(runs)
    return [0 if run > 0 else None for run in runs.tolist()]
