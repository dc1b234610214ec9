"""Speed against batch size, simulated from a TraceSet with its own costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.common.rounds import recording, replay_rounds
from analysis.laws.law import Curve, Law, LawPoint, compare_curves, fit_all
from analysis.speedup.grid import Cell, CellRun, baselines, run_grid
from calibration.common.arrays import Floats
from calibration.common.errors import ReplayError, ReportError
from calibration.traces import TraceSet

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_DRAFTERS = 3
SPEED_FORMS = ("constant", "log-linear", "power", "saturating")
"""No logit: a speed has no whole that it is a share of."""


def best_drafters(traces: TraceSet, draft_tokens: int, most: int = MOST_DRAFTERS) -> tuple[str, ...]:
    """Names of the drafters that accept the most tokens per round of `draft_tokens`, best first."""
    found = []
    for name in traces.manifest.drafter_names:
        try:
            rounds = replay_rounds(recording(traces, name), draft_tokens)
        except ReplayError:
            continue
        found.append((-rounds.accepted.sum() / rounds.rounds.sum(), name))
    return tuple(name for _, name in sorted(found)[:most])


def batch_laws(
    traces: TraceSet, draft_tokens: int, *, batches: Sequence[int] = BATCHES, workers: int = 1, seed: int = 0
) -> tuple[Law, Law]:
    """Give the decoding speed of a request, and the speed-up over no speculation, against batch size.

    Simulated: every recorded request served once in a batch kept full, with the costs of the TraceSet, for the three
    drafters that accept most, and without speculation (speed only). The speed of a request is the throughput over
    the batch size. Intervals are over requests, paired, given the schedule and the costs.
    """
    names = best_drafters(traces, draft_tokens)
    if not names:
        raise ReportError(f"batch law: needs a drafter that can draft {draft_tokens} tokens, got none")
    plain = baselines(traces)
    bases = tuple(dict.fromkeys(plain[name] for name in names))
    cells = [Cell(name, 0, b) for name in bases for b in batches]
    cells += [Cell(name, draft_tokens, b) for name in names for b in batches]
    runs = {(r.drafter, r.draft_tokens, r.batch): r for r in run_grid(traces, cells, workers=workers, seed=seed)}
    bootstrap = ClusterBootstrap(traces.sequences["domain"].to_pylist(), np.random.default_rng(seed))
    speeds = [_speeds(bootstrap, name, [runs[name, draft_tokens, b] for b in batches]) for name in names]
    speeds += [_speeds(bootstrap, "no speculation", [runs[base, 0, b] for b in batches]) for base in bases[:1]]
    gains = [
        _gains(
            bootstrap,
            name,
            [runs[name, draft_tokens, b] for b in batches],
            [runs[plain[name], 0, b] for b in batches],
        )
        for name in names
    ]
    outside = sorted({r.batch for r in runs.values() if r.extrapolated})
    caution = "the fitted costs carry their own error, which no interval here has" + (
        f"; costs are extrapolated at batch {', '.join(map(str, outside))}" if outside else ""
    )
    source = f"closed batches of {batches[0]} to {batches[-1]} at draft length {draft_tokens}, costs of the TraceSet"
    requests = traces.sequences.num_rows
    return (
        _law(
            "batch-speed",
            "Decoding speed of a request",
            "Output tokens per second and request",
            source,
            speeds,
            requests,
            caution,
            seed,
        ),
        _law("batch-speedup", "Speed-up", "Speed-up over no speculation", source, gains, requests, caution, seed),
    )


def _law(
    key: str, title: str, y_name: str, source: str, curves: Sequence[Curve], requests: int, caution: str, seed: int
) -> Law:
    return Law(
        key=key,
        title=f"{title} against batch size",
        x_name="Batch size (requests decoded together)",
        y_name=y_name,
        kind="simulated",
        source=source,
        requests=requests,
        curves=tuple(curves),
        compared="drafters",
        comparison=compare_curves(curves, seed=seed, forms=SPEED_FORMS),
        caution=caution,
    )


def _speeds(bootstrap: ClusterBootstrap, name: str, runs: Sequence[CellRun]) -> Curve:
    batches = np.array([run.batch for run in runs], dtype=np.float64)
    sums = np.stack([r.output_tokens for r in runs] + [r.engine_seconds for r in runs], axis=1)

    def speed(s: Floats) -> Floats:
        tokens, seconds = np.split(s, 2, axis=-1)
        return np.asarray(tokens / seconds / batches)

    return _curve(name, runs, bootstrap.estimates(speed, sums))


def _gains(bootstrap: ClusterBootstrap, name: str, runs: Sequence[CellRun], plain: Sequence[CellRun]) -> Curve:
    columns = [r.output_tokens for r in runs] + [r.engine_seconds for r in runs]
    columns += [r.output_tokens for r in plain] + [r.engine_seconds for r in plain]

    def gain(s: Floats) -> Floats:
        tokens, seconds, plain_tokens, plain_seconds = np.split(s, 4, axis=-1)
        return np.asarray((tokens / seconds) / (plain_tokens / plain_seconds))

    return _curve(name, runs, bootstrap.estimates(gain, np.stack(columns, axis=1)))


def _curve(name: str, runs: Sequence[CellRun], found: Sequence[Estimate]) -> Curve:
    points = [LawPoint(float(run.batch), y) for run, y in zip(runs, found, strict=True)]
    return fit_all(name, points, forms=SPEED_FORMS)
