"""Where speculation stops paying: measured and predicted, over the batch sizes of closed loops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from analysis.fidelity.table import Condition, Crossover
from simulator.scenario.scenario import Scenario
from simulator.scenario.workload import ClosedLoop

_FREE = ("name", "seed", "stopping", "drafter", "placement", "costs")
"""Parts of a scenario in which a condition and its baseline may differ."""


class Throughput(NamedTuple):
    """Output tokens per second of one condition."""

    measured: float
    predicted: float
    fitted: bool


def crossovers(conditions: Sequence[tuple[Condition, Scenario]]) -> tuple[Crossover, ...]:
    """Give a crossover for each drafter and draft length that was run, with its baseline, at two batches or more.

    A baseline is the condition of the same source without speculation whose scenario is the same but for drafter,
    policy, placement and prices; the batch is the concurrency of the closed loop. Speed-ups are ratios of
    throughputs. Of conditions that say the same, the first one counts.
    """
    plain: dict[tuple[str, str], dict[int, Throughput]] = {}
    drafting: dict[tuple[str, str], dict[tuple[str, str], dict[int, Throughput]]] = {}
    for condition, scenario in conditions:
        load, throughput = scenario.workload, condition.of("output_throughput")
        if not isinstance(load, ClosedLoop) or throughput is None:
            continue
        where = condition.source, _rest(scenario)
        seen = Throughput(throughput.measured, throughput.predicted, condition.role == "fit")
        if scenario.speculates:
            way = condition.labels["drafter"], condition.labels["draft_tokens"]
            drafting.setdefault(where, {}).setdefault(way, {}).setdefault(load.concurrency, seen)
        else:
            plain.setdefault(where, {}).setdefault(load.concurrency, seen)
    found = [
        _crossover(source, way, batches, plain.get((source, rest), {}))
        for (source, rest), ways in drafting.items()
        for way, batches in ways.items()
    ]
    return tuple(one for one in found if one is not None)


def _rest(scenario: Scenario) -> str:
    """Give what must be the same in a condition and its baseline, and at all batches."""
    data: dict[str, Any] = scenario.model_dump(mode="json", exclude_none=True, exclude=set(_FREE))
    for section, keys in (("workload", ("concurrency", "requests")), ("engine", ("max_num_seqs",))):
        data[section] = {key: value for key, value in data[section].items() if key not in keys}
    return json.dumps(data, sort_keys=True)


def _crossover(
    source: str, way: tuple[str, str], batches: dict[int, Throughput], plain: dict[int, Throughput]
) -> Crossover | None:
    grid = tuple(sorted(set(batches) & set(plain)))
    if len(grid) < 2:
        return None
    measured, predicted = (
        tuple(getattr(batches[b], which) / getattr(plain[b], which) for b in grid)
        for which in ("measured", "predicted")
    )
    return Crossover(
        source,
        *way,
        grid,
        _stops_paying(grid, measured),
        _stops_paying(grid, predicted),
        measured,
        predicted,
        fitted=all(batches[b].fitted and plain[b].fitted for b in grid),
    )


def _stops_paying(grid: Sequence[int], speedups: Sequence[float]) -> int | None:
    return next((batch for batch, speedup in zip(grid, speedups, strict=True) if speedup <= 1), None)
