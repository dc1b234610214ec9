"""Measured speed against batch size: from runs of real engines, or from any table of measurements."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.common.bootstrap import Estimate
from analysis.laws.batch import SPEED_FORMS
from analysis.laws.law import Law, LawPoint, compare_curves, fit_all
from calibration.common.errors import ReportError

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
