"""The runs of a search: every candidate on the same seeds, kept so that no run is made twice.

The best draft length at each batch size, from short closed loops that keep the batch full.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import calibration.common.errors
from analysis.common.bootstrap import number
from analysis.tuning.findings import BatchLength
from analysis.tuning.space import Base, Candidate, fixed, nothing
from calibration.common.arrays import Floats
from calibration.common.errors import PacelineError, PacelineWarning, ScenarioError
from calibration.common.progress import StageProgress
from calibration.traces import TraceSet
from simulator.experiments.pool import Outcome, process_pool, retell, run_one, run_prepared
from simulator.experiments.replicate import replication_seeds, with_seed
from simulator.experiments.store import Store, StoredCell, cell_key, cell_keys, traces_hash
from simulator.scenario.scenario import Scenario

_SEEDS = 64
FIRST_FRESH = _SEEDS
"""Number of the first seed that no search uses: replications of a search are numbered below it."""
LEAST = 3
"""Replications that are made whatever the clock says: fewer give no interval worth the name."""


@dataclass
class Runs:
    """Runs candidates of `base` on common seeds: replication r of every candidate has the same arrivals, order, luck.

    `traces` replaces the TraceSet that the scenario names; `store` (a sqlite file) keeps every run, so that an
    interrupted search goes on where it stopped. `skipped` tells why candidates could not be run.
    """

    base: Base
    traces: TraceSet | None = None
    workers: int = 2
    store: str | os.PathLike[str] | None = None
    progress: StageProgress | None = None
    clock: Callable[[], float] = time.monotonic
    skipped: dict[str, str] = field(default_factory=dict)
    made: int = 0
    """Runs that were simulated here, not taken from the store."""
    _summaries: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _scenarios: dict[str, Scenario] = field(default_factory=dict)
    _told: list[Outcome] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _pool: ProcessPoolExecutor | None = None

    def count(self, candidate: Candidate) -> int:
        """Give how many replications of `candidate` there are, counted from the first."""
        return next(r for r in range(_SEEDS + 1) if (candidate.name, r) not in self._summaries)

    def values(self, candidate: Candidate, read: Callable[[Mapping[str, Any]], float], number: int) -> Floats:
        """Give what `read` finds in the first `number` runs of `candidate`, in the order of the seeds."""
        return np.array([read(self._summaries[candidate.name, r]) for r in range(number)], dtype=np.float64)

    def summary(self, candidate: Candidate, replication: int = 0) -> dict[str, Any]:
        """Give the summary of one run."""
        return self._summaries[candidate.name, replication]

    def scenario(self, candidate: Candidate) -> Scenario:
        """Give the scenario of `candidate`, on the first seed."""
        if candidate.name not in self._scenarios:
            self._scenarios[candidate.name] = self.base.make(candidate.overrides)
        return self._scenarios[candidate.name]

    def runnable(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Give those that can be run; the reason of each of the others is kept."""
        return [candidate for candidate in candidates if self._allowed(candidate)]

    def _allowed(self, candidate: Candidate) -> bool:
        if candidate.name in self.skipped:
            return False
        try:
            self.scenario(candidate)
        except ScenarioError as fault:
            self.skipped[candidate.name] = str(fault).removeprefix("candidate: ")
            return False
        return True

    def fill(
        self, stage: str, candidates: Sequence[Candidate], replications: int, until: float | None = None
    ) -> list[Candidate]:
        """Run every candidate on the first `replications` seeds; give those that could be run.

        Runs go seed by seed. After the instant `until` (of `clock`) no further seed is begun, so that all candidates
        have the same ones; `LEAST` are always made.
        """
        ready = self.runnable(candidates)
        seeds = replication_seeds(self.base.scenario.seed, replications)
        todo = [
            (candidate, r)
            for r in range(replications)
            for candidate in ready
            if (candidate.name, r) not in self._summaries
        ]
        scenarios = [with_seed(self.scenario(candidate), seeds[r]) for candidate, r in todo]
        self._run(stage, todo, scenarios, until)
        return [candidate for candidate in ready if candidate.name not in self.skipped]

    def fill_fresh(self, stage: str, candidates: Sequence[Candidate], number: int) -> None:
        """Run every candidate on `number` seeds that no search uses; `ScenarioError` where one cannot be run."""
        seeds = replication_seeds(self.base.scenario.seed, FIRST_FRESH + number)
        todo = [(candidate, FIRST_FRESH + r) for r in range(number) for candidate in candidates]
        scenarios = [with_seed(self.scenario(candidate), seeds[r]) for candidate, r in todo]
        self._run(stage, todo, scenarios, None)
        for candidate in candidates:
            if candidate.name in self.skipped:
                raise self.fault(candidate)

    def fresh(self, candidate: Candidate, read: Callable[[Mapping[str, Any]], float], number: int) -> Floats:
        """Give what `read` finds in `number` runs of `candidate` on fresh seeds."""
        found = (self._summaries[candidate.name, FIRST_FRESH + r] for r in range(number))
        return np.array([read(one) for one in found], dtype=np.float64)

    def _run(
        self, stage: str, todo: list[tuple[Candidate, int]], scenarios: list[Scenario], until: float | None
    ) -> None:
        shared = None if self.traces is None else traces_hash(self.traces)
        keys = cell_keys(scenarios, shared) if self.store is not None else []
        opened = contextlib.nullcontext() if self.store is None else Store(self.store)
        with opened as cells:
            kept = {} if cells is None else cells.get(keys)
            missing = []
            for i, cell in enumerate(todo):
                if keys and keys[i] in kept:
                    self._keep(cell, _restored(kept[keys[i]]))
                else:
                    missing.append(i)
            total, done = len(todo), len(todo) - len(missing)
            self._tell(stage, done, total)
            for i, outcome in self._outcomes(missing, todo, scenarios, until):
                self._keep(todo[i], outcome)
                self.made += 1
                if cells is not None and outcome.fault is None and cell_key(scenarios[i], shared) == keys[i]:
                    said = tuple((kind.__name__, text) for kind, text in outcome.said)
                    cells.put(keys[i], scenarios[i], StoredCell(outcome.summary, said))
                done += 1
                self._tell(stage, done, total)

    def _outcomes(
        self,
        missing: list[int],
        todo: list[tuple[Candidate, int]],
        scenarios: list[Scenario],
        until: float | None,
    ) -> Iterator[tuple[int, Outcome]]:
        """Run what is missing; once `until` has passed, begin no more of what may be left out."""
        for numbers, deadline in (
            ([i for i in missing if todo[i][1] < LEAST], None),
            ([i for i in missing if todo[i][1] >= LEAST], until),
        ):
            wanted = [i for i in numbers if todo[i][0].name not in self.skipped]
            if wanted and not (deadline is not None and self.clock() >= deadline):
                yield from self._several(wanted, scenarios, deadline)

    def _several(
        self, numbers: list[int], scenarios: list[Scenario], deadline: float | None
    ) -> Iterator[tuple[int, Outcome]]:
        if self.workers == 1:
            for i in numbers:
                yield i, run_one(scenarios[i], self.traces)
                if deadline is not None and self.clock() >= deadline:
                    return
            return
        futures: dict[Future[Outcome], int] = {}
        try:
            pool = self._workers()
            futures = {pool.submit(run_prepared, scenarios[i]): i for i in numbers}
            for future in as_completed(futures):
                yield futures[future], future.result()
                if deadline is not None and self.clock() >= deadline:
                    return
        except (BrokenProcessPool, OSError) as broken:
            raise PacelineError(
                "workers: a worker process ended abruptly or could not start (out of memory, or killed; a script "
                "must start searches below if __name__ == '__main__'); workers = 1 runs in one process"
            ) from broken
        finally:
            for future in futures:
                future.cancel()

    def _workers(self) -> ProcessPoolExecutor:
        """Give the worker processes, started when they are first needed: starting them takes seconds."""
        if self._pool is None:
            self._pool = self._stack.enter_context(process_pool(self.workers, self.traces))
        return self._pool

    def __enter__(self) -> Runs:
        """Give itself; the worker processes end with the block."""
        return self

    def __exit__(self, *fault: Any) -> None:
        """End the worker processes, at once where the block ends by an exception."""
        self._stack.__exit__(*fault)

    def _keep(self, cell: tuple[Candidate, int], outcome: Outcome) -> None:
        candidate, replication = cell
        if outcome.fault is not None:
            self.skipped.setdefault(candidate.name, str(outcome.fault))
            return
        self._summaries[candidate.name, replication] = outcome.summary
        self._told.append(Outcome({}, None, outcome.said))

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None and total:
            self.progress(stage, done, total)

    def common(self, candidates: Sequence[Candidate]) -> int:
        """Give how many first replications all `candidates` have."""
        return min(self.count(candidate) for candidate in candidates)

    def retell(self) -> None:
        """Warn once for each kind of warning of the runs."""
        retell(self._told, stacklevel=4)

    def fault(self, candidate: Candidate) -> PacelineError:
        """Give the reason why `candidate` could not be run, as an error."""
        return ScenarioError(f"{candidate.name}: {self.skipped[candidate.name]}")


def _restored(cell: StoredCell) -> Outcome:
    """Give a stored run, its warnings under their categories."""
    said = tuple((getattr(calibration.common.errors, name, PacelineWarning), text) for name, text in cell.warnings)
    return Outcome(cell.summary, None, said)


LARGEST = 64
"""Largest batch of the grid where arrivals are open: larger ones take the length found there."""
_REQUESTS = 32
"""Requests counted at least: the same ones at every length, so that even few tell lengths apart."""


def batch_sizes(scenario: Scenario) -> tuple[int, ...]:
    """Give the powers of two up to the largest batch that can occur; none where the batch never varies."""
    load, max_num_seqs = scenario.workload, scenario.engine.max_num_seqs
    largest = min(max_num_seqs, LARGEST)
    if load.kind == "closed":
        if load.copies > 1 or min(load.concurrency, max_num_seqs) == 1:
            return ()
        largest = min(load.concurrency, max_num_seqs)
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
