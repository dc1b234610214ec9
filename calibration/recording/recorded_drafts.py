"""From what a drafter proposes at every start to columns of a TraceSet.

*Given tokens, and greedy decoding:* a draft is accepted as far as the text follows it; the run length is exact.

*Sampled chains with a q of their own:* given the text, draft j (from 0) at start t is accepted with probability
min(1, q/p) at x_{t+j}, independently, where q may depend on the start (a head drafts on from its own states). The run
length recorded is one draw of those; a chain of rounds visits a start at most once, so its replay is exact in
distribution, and replays of one recording share that draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.common.arrays import Ints
from calibration.models.drafter import Drafts, followed
from calibration.models.sampling import numpy_generator

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
