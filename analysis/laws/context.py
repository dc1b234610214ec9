"""Accepted length against how far the output has come, and against how much context stands before it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.common.bootstrap import ClusterBootstrap
from analysis.common.rounds import Recording, recording
from analysis.laws.law import Curve, Law, LawPoint, compare_curves, fit_all
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError, ReportError
from calibration.traces import TraceSet

CONTEXT_BINS = 8
LEAST_BINS = 3
LEAST_REQUESTS = 10
"""Requests below which a bin is left out."""


def context_law(
    traces: TraceSet, draft_tokens: int, *, axis: Literal["position", "context"] = "position", seed: int = 0
) -> Law:
    """Give accepted tokens (bonus not included) of a draft at each position, by output position or context length.

    Every recorded position that leaves room for the whole draft counts as a possible start, once (so this is not the
    mean over rounds, which start after rejections). Bins: powers of two of the position, or eight quantiles of the
    context (prompt and output so far). Intervals are over requests. Exact for greedy traces; for sampled ones the
    expectation. Raises `ReportError` where fewer than three bins hold ten requests.
    """
    curves = []
    skipped = []
    for name in traces.manifest.drafter_names:
        try:
            curve = _curve(traces, recording(traces, name), draft_tokens, axis, seed)
        except ReplayError:
            skipped.append(name)
            continue
        if any((p.y.value or 0.0) > 0 for p in curve.points):
            curves.append(curve)
    curves = [curve for curve in curves if len(curve.points) >= LEAST_BINS]
    if not curves:
        raise ReportError(f"{axis} law: needs {LEAST_BINS} bins of {LEAST_REQUESTS} requests each, got fewer")
    curves.sort(key=lambda c: -float(np.mean([p.y.value or 0.0 for p in c.points])))
    said = {
        "position": "later positions are reached by long outputs alone, so the requests differ between bins",
        "context": "context goes with domain (grounded prompts are long), and nothing here separates the two",
    }
    return Law(
        key=axis,
        title=f"Accepted length against {'output position' if axis == 'position' else 'context'}",
        x_name="Position in the output (tokens)"
        if axis == "position"
        else "Context (tokens: prompt and output so far)",
        y_name=f"Accepted tokens of {draft_tokens} drafted at a position (bonus not included)",
        kind="measured",
        source=f"{len(curves)} drafters, every recorded position",
        requests=traces.sequences.num_rows,
        curves=tuple(curves),
        compared="drafters",
        comparison=compare_curves(curves, scale=float(draft_tokens), seed=seed),
        caution=said[axis] + (f"; not replayable: {', '.join(skipped)}" if skipped else ""),
    )


def expected_accepted(recorded: Recording, draft_tokens: int) -> Floats:
    """Accepted tokens (bonus not included) of a draft of `draft_tokens` started at each position.

    Shape (positions, sequences). min(run length, proposal, k) where run lengths were recorded, else the expectation
    a_t + a_t a_{t+1} + ... over independent acceptances. Raises `ReplayError` beyond the recorded draft length.
    """
    limit = recorded.max_draft_tokens
    if limit is not None and draft_tokens > limit:
        raise ReplayError(f"drafter '{recorded.drafter}': draft length must lie in [1, {limit}], got {draft_tokens}")
    if recorded.run_length is not None:
        capped = np.minimum(np.minimum(recorded.run_length, recorded.proposal), draft_tokens)
        return np.asarray(capped, dtype=np.float64)
    assert recorded.accept is not None
    total = np.zeros(recorded.accept.shape)
    survive = np.ones(recorded.accept.shape)
    for i in range(draft_tokens):
        ahead = np.zeros_like(survive)
        ahead[: len(ahead) - i] = recorded.accept[i:]
        survive = survive * ahead * (recorded.proposal > i)
        total += survive
    return total


def _curve(traces: TraceSet, recorded: Recording, k: int, axis: str, seed: int) -> Curve:
    t = np.arange(len(recorded.proposal))[:, None]
    usable = recorded.startable & (recorded.output_tokens - t >= k)
    if not usable.any():
        return Curve(recorded.drafter, (), ())
    x = np.broadcast_to(t, usable.shape).astype(np.float64)
    if axis == "context":
        prompt = np.asarray(traces.sequences["prompt_tokens"].to_numpy(zero_copy_only=False), dtype=np.float64)
        x = x + prompt
        edges = np.unique(np.quantile(x[usable], np.linspace(0, 1, CONTEXT_BINS + 1)))
        edges[-1] += 1
    else:
        edges = 2.0 ** np.arange(0, np.ceil(np.log2(x[usable].max() + 1)) + 1)
    y = expected_accepted(recorded, k)
    points = _binned(x, y, usable, edges, recorded.domains, seed)
    return fit_all(recorded.drafter, points, scale=float(k), weighted=True)


def _binned(
    x: Floats, y: Floats, usable: NDArray[np.bool_], edges: Floats, domains: Sequence[str], seed: int
) -> list[LawPoint]:
    """Mean of y by bin of x, at the mean x of the bin, with intervals over requests; thin bins are left out."""
    sums, counts, centres = [], [], []
    for low, high in itertools.pairwise(edges):
        inside = usable & (x >= low) & (x < high)
        if np.count_nonzero(inside.any(axis=0)) >= LEAST_REQUESTS:
            sums.append(np.where(inside, y, 0.0).sum(axis=0))
            counts.append(inside.sum(axis=0).astype(np.float64))
            centres.append(float(x[inside].mean()))
    if not sums:
        return []
    bootstrap = ClusterBootstrap(domains, np.random.default_rng(seed))
    half = len(sums)
    found = bootstrap.estimates(lambda s: s[..., :half] / s[..., half:], np.stack(sums + counts, axis=1))
    return [LawPoint(centre, estimate) for centre, estimate in zip(centres, found, strict=True)]
