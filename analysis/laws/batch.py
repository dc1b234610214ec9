"""Speed against batch size, simulated from a TraceSet with its own costs.

Measured speed against batch size: from runs of real engines, or from any table of measurements.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

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
