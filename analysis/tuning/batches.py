"""The best draft length at each batch size, from short closed loops that keep the batch full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.common.bootstrap import number
from analysis.tuning.candidate import Base, Candidate
from analysis.tuning.findings import BatchLength
from analysis.tuning.runs import Runs
from analysis.tuning.space import fixed, nothing
from simulator.scenario.scenario import Scenario

LARGEST = 64
"""Largest batch of the grid where arrivals are open: larger ones take the length found there."""
_REQUESTS = 32
"""Requests counted at least: the same ones at every length, so that even few tell lengths apart."""


def batch_sizes(scenario: Scenario) -> tuple[int, ...]:
    """Give the powers of two up to the largest batch that can occur; none where the batch never varies."""
    load, seats = scenario.workload, scenario.engine.max_num_seqs
    largest = min(seats, LARGEST)
    if load.kind == "closed":
        if load.copies > 1 or min(load.concurrency, seats) == 1:
            return ()
        largest = min(load.concurrency, seats)
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return tuple(sizes)


def grid(base: Base, drafters: Sequence[str], lengths: Sequence[int], sizes: Sequence[int]) -> list[Candidate]:
    """Give every drafter at every length, and no speculation, with a full batch of every size.

    Workload and objectives of the scenario do not matter here: the loop is closed, and only throughput is read.
    """
    return [
        _at(cell, batch)
        for batch in sizes
        for cell in (nothing(base), *(fixed(base, drafter, k) for drafter in drafters for k in lengths))
    ]


def _at(cell: Candidate, batch: int) -> Candidate:
    load = {
        "kind": "closed",
        "concurrency": batch,
        "keep_full": True,
        "order": "shuffled",
        "requests": max(_REQUESTS, 2 * batch),
    }
    overrides = cell.overrides | {"workload": load, "slo": None, "measure": None}
    return Candidate(_name(cell, batch), "grid", cell.drafters, overrides)


def _name(cell: Candidate, batch: int) -> str:
    return f"{cell.name}; batch {batch}"


def batch_lengths(
    runs: Runs, base: Base, drafters: Sequence[str], lengths: Sequence[int], sizes: Sequence[int]
) -> tuple[BatchLength, ...]:
    """Read the grid that was run: speed-up over no speculation by drafter, batch and length, the fastest marked."""
    found = []
    for drafter in drafters:
        for batch in sizes:
            plain = _throughput(runs, nothing(base), batch)
            speeds = {k: _throughput(runs, fixed(base, drafter, k), batch) for k in lengths}
            if plain is None or any(speed is None for speed in speeds.values()):
                continue
            ratios = {0: 1.0} | {k: (speed or 0.0) / plain for k, speed in speeds.items()}
            best = max(ratios, key=lambda k: (ratios[k], -k))
            found += [BatchLength(drafter, batch, k, number(r) or 0.0, k == best) for k, r in ratios.items()]
    return tuple(found)


def _throughput(runs: Runs, cell: Candidate, batch: int) -> float | None:
    candidate = Candidate(_name(cell, batch), "grid", cell.drafters, {})
    if candidate.name in runs.skipped or runs.count(candidate) == 0:
        return None
    summary: Mapping[str, Any] = runs.summary(candidate)
    return float(summary["engine_output_throughput"])


def table(found: Sequence[BatchLength], drafter: str) -> list[list[int]]:
    """Give ``[first, last, K]`` for `drafter`: a size b of the grid stands for the sizes above the one before, to b.

    Ranges with equal lengths are joined. Empty where the grid lacks the drafter.
    """
    ranges: list[list[int]] = []
    first = 1
    for batch, tokens in best_by_batch(found, drafter).items():
        if ranges and ranges[-1][2] == tokens:
            ranges[-1][1] = batch
        else:
            ranges.append([first, batch, tokens])
        first = batch + 1
    return ranges


def best_by_batch(found: Sequence[BatchLength], drafter: str) -> dict[int, int]:
    """Give the fastest length of `drafter` by batch size, in order; empty where the grid lacks it."""
    return {row.batch: row.draft_tokens for row in found if row.drafter == drafter and row.chosen}
