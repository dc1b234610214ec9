"""Speed against batch size, simulated from a TraceSet with its own costs.

Measured speed against batch size: from runs of real engines, or from any table of measurements.

Accepted length against how far the output has come, and against how much context stands before it.
"""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.common.rounds import Recording, recording, replay_rounds
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
            key="batch-speed",
            title="Decoding speed of a request",
            y_name="Output tokens per second and request",
            source=source,
            curves=speeds,
            requests=requests,
            caution=caution,
            seed=seed,
        ),
        _law(
            key="batch-speedup",
            title="Speed-up",
            y_name="Speed-up over no speculation",
            source=source,
            curves=gains,
            requests=requests,
            caution=caution,
            seed=seed,
        ),
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


_LEAST_BATCHES = 3

Speeds = Mapping[str, Mapping[float, Sequence[float]]]
"""Tokens per second and request, by configuration and batch size."""


def engine_batch_law(folder: str | Path, *, seed: int = 0) -> Law:
    """Give the measured speed of a request against the number of clients of closed loops, from the runs in `folder`.

    `folder` holds measured runs as `analysis.fidelity.validate` reads them (`analysis.fidelity.bundled_runs` gives
    those of the package). Each source, drafter and draft length is a configuration; speeds are output tokens per
    second of the whole run, prefill included, averaged over repeats. Runs that other sources repeat to the last digit
    count once. Raises `ReportError` where no configuration was run with three numbers of clients.
    """
    from analysis.fidelity.measured import find_conditions, summaries
    from simulator.scenario.workload import ClosedLoop

    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    seen: set[tuple[str, ...]] = set()
    requests = 0
    for condition in find_conditions(Path(folder)):
        load, told = condition.scenario.workload, summaries(condition.run, condition.scenario)
        identity = (condition.name, *(str(one) for one in told))
        if not isinstance(load, ClosedLoop) or identity in seen:
            continue
        seen.add(identity)
        name = f"{condition.source} {condition.name.rsplit('-c', 1)[0]}"
        speeds = [float(one["output_throughput"]) / load.concurrency for one in told]
        found[name][float(load.concurrency)] += speeds
        requests += condition.run.requests.num_rows
    caution = "whole runs, prefill included; points without intervals"
    return _measured_law(found, f"runs of {Path(folder).name}", caution, seed, requests)


def measured_batch_law(
    path: str | Path,
    *,
    batch: str = "batch_size",
    speed: str = "output_tps",
    groups: Sequence[str] = ("target", "benchmark", "drafter", "steps", "topk"),
    seed: int = 0,
) -> Law:
    """Give the measured speed of a request against batch size, from any CSV with a column of each.

    `speed` is the output tokens per second of the whole batch; `groups` name the columns that tell configurations
    apart, each a curve. Rows of one configuration and batch size are averaged. Raises `ReportError` where a column is
    missing, a value is no number, or no configuration was measured at three batch sizes.
    """
    file = Path(path)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as fault:
        raise ReportError(f"{file}: measured speeds must be a readable CSV file, got {fault.strerror}") from None
    missing = [name for name in (batch, speed, *groups) if not rows or name not in rows[0]]
    if missing:
        wanted = ", ".join((batch, speed, *groups))
        raise ReportError(f"{file}: measured speeds need the columns {wanted}, got no {missing[0]}")
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line, row in enumerate(rows, start=2):
        if row[batch] and row[speed]:
            try:
                size, rate = float(row[batch]), float(row[speed])
            except ValueError:
                both = f"'{row[batch]}' and '{row[speed]}'"
                raise ReportError(f"{file}, line {line}: {batch} and {speed} must be numbers, got {both}") from None
            found[" ".join(row[name] for name in groups)][size].append(rate / size)
    return _measured_law(found, file.name, "points of a table, without intervals", seed, None)


def _measured_law(found: Speeds, source: str, caution: str, seed: int, requests: int | None) -> Law:
    full = {name: table for name, table in found.items() if len(table) >= _LEAST_BATCHES}
    if not full:
        most = max((len(table) for table in found.values()), default=0)
        raise ReportError(f"{source}: a configuration must be measured at three batch sizes, got {most} at most")
    curves = [
        fit_all(
            name,
            [LawPoint(b, Estimate(float(np.mean(v)), None, None, 0)) for b, v in sorted(table.items())],
            forms=SPEED_FORMS,
        )
        for name, table in full.items()
    ]
    curves.sort(key=lambda curve: (-len(curve.points), curve.name))
    return Law(
        key="batch-measured",
        title="Measured decoding speed of a request against batch size",
        x_name="Batch size (requests decoded together)",
        y_name="Output tokens per second and request",
        kind="measured",
        source=f"{source}: {len(curves)} configurations at three batch sizes or more, of {len(found)}",
        requests=requests,
        curves=tuple(curves),
        compared="configurations",
        comparison=compare_curves(curves, seed=seed, forms=SPEED_FORMS),
        caution=caution,
    )


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
            curve = _context_curve(traces, recording(traces, name), draft_tokens, axis, seed)
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


def _context_curve(traces: TraceSet, recorded: Recording, k: int, axis: str, seed: int) -> Curve:
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
