"""Replications: the same scenario on different luck, for intervals that mean something.

Latencies within a run are autocorrelated, so requests are never resampled: the unit of chance is the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.errors import ReplicationWarning, ScenarioError
from calibration.common.files import fresh_folder
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.experiments.estimate import CONFIDENCE, Estimate, estimate, metric_names, results_of
from simulator.experiments.pool import Outcome, retell, run_all
from simulator.scenario.scenario import Scenario

METHOD = "mean over independent replications, Student's t interval"


def replication_seeds(seed: int, n: int) -> tuple[int, ...]:
    """Give `n` seeds: first `seed` itself, so that replication 0 is the plain run, then derived ones.

    The r-th is the first 63 bits of numpy's ``SeedSequence(seed, spawn_key=(r,))``. More replications only append.
    """
    derived = (np.random.SeedSequence(seed, spawn_key=(r,)).generate_state(1, np.uint64)[0] for r in range(1, n))
    return (seed, *(int(state) >> 1 for state in derived))[:n]


def with_seed(scenario: Scenario, seed: int) -> Scenario:
    """Give `scenario` with another seed."""
    return scenario.model_copy(update={"seed": seed})


@dataclass(frozen=True)
class Replications:
    """Finished replications of one scenario, in the order of `seeds`."""

    scenario: Scenario
    seeds: tuple[int, ...]
    summaries: tuple[dict[str, Any], ...]

    @property
    def results(self) -> tuple[dict[str, float], ...]:
        """Every number of every summary."""
        return tuple(results_of(summary) for summary in self.summaries)

    @property
    def deterministic(self) -> bool:
        """Whether no number differs between replications: nothing in the scenario is random."""
        results = self.results
        return len(results) > 1 and all(run == results[0] for run in results)

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Mean, standard deviation and interval of every number, over the replications that have it (`Estimate.n`).

        Without intervals where the replications do not differ at all.
        """
        results, certain = self.results, self.deterministic
        found = {name: estimate([run[name] for run in results if name in run]) for name in metric_names(results)}
        return {name: e.without_interval() for name, e in found.items()} if certain else found

    @property
    def table(self) -> pa.Table:
        """One row per replication: its number, its seed, and every number of its summary (null where absent)."""
        return runs_table([{"replication": r, "seed": s} for r, s in enumerate(self.seeds)], self.results)

    def to_dict(self) -> dict[str, Any]:
        """Give what ``replications.json`` holds."""
        first = self.summaries[0]
        return {
            "name": self.scenario.name,
            "replications": len(self.seeds),
            "confidence": CONFIDENCE,
            "method": METHOD,
            "deterministic": self.deterministic,
            "scenario_hash": self.scenario.hash,
            "paceline_version": first["paceline_version"],
            "seeds": list(self.seeds),
            "metrics": {name: e.to_dict() for name, e in self.estimates.items()},
            "costs": first["costs"],
            "provenance": first["provenance"],
        }

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write scenario.toml, replications.json and replications.parquet to `folder`, whole or not at all.

        A folder with an older replications.json is replaced; any other that is not empty is refused.
        """
        target = Path(folder)
        with fresh_folder(target, "replications.json", error=ScenarioError) as scratch:
            (scratch / "scenario.toml").write_text(self.scenario.to_toml(target.absolute()), encoding="utf-8")
            write_json(scratch / "replications.json", self.to_dict())
            pq.write_table(self.table, scratch / "replications.parquet", compression="zstd")
        return target


def replicate(
    scenario: Scenario,
    n: int,
    traces: TraceSet | None = None,
    *,
    workers: int = 2,
    progress: Progress | None = None,
) -> Replications:
    """Run `scenario` `n` times on the seeds of `replication_seeds`; the result does not depend on `workers`.

    `traces` replaces the TraceSet that the scenario names; `progress` hears (runs done, runs in all). Raises
    `ScenarioError` where n < 2, and what `simulate` raises; warns with `ReplicationWarning` where the replications do
    not differ, and once for each kind of warning of the runs.
    """
    check_number(n)
    seeds = replication_seeds(scenario.seed, n)
    outcomes = gather([with_seed(scenario, seed) for seed in seeds], traces, workers=workers, progress=progress)
    replications = Replications(scenario, seeds, tuple(outcome.summary for outcome in outcomes))
    retell(outcomes)
    warn_if_certain([replications])
    return replications


def check_number(n: int) -> None:
    """Refuse fewer than two replications."""
    if n < 2:
        raise ScenarioError(f"replications: must be at least 2, so that there is an interval, got {n}")


def gather(
    scenarios: Sequence[Scenario],
    traces: TraceSet | None,
    *,
    workers: int,
    progress: Progress | None,
) -> list[Outcome]:
    """Give the outcomes in the order of `scenarios`; raises the first fault that comes back."""
    found: dict[int, Outcome] = {}
    with contextlib.closing(run_all(scenarios, traces, workers=workers)) as runs:
        for index, outcome in runs:
            if outcome.fault is not None:
                raise outcome.fault
            found[index] = outcome
            if progress is not None:
                progress(len(found), len(scenarios))
    return [found[index] for index in range(len(scenarios))]


def warn_if_certain(several: Sequence[Replications]) -> None:
    """Warn where replications do not differ."""
    names = [f"'{r.scenario.name}'" for r in several if r.deterministic]
    if names:
        warnings.warn(
            f"scenario {', '.join(names)}: all {len(several[0].seeds)} replications are the same, nothing in it "
            "is random, so it gets no interval; workload.order = 'shuffled' or an open-loop workload "
            "(kind = 'poisson') lets them differ",
            ReplicationWarning,
            stacklevel=3,
        )


def runs_table(keys: Sequence[dict[str, Any]], results: Sequence[dict[str, float]]) -> pa.Table:
    """Give a row per run: its `keys`, then its results; null where a run lacks a number that others have."""
    columns: dict[str, list[Any]] = {name: [row[name] for row in keys] for name in (keys[0] if keys else {})}
    return pa.table(columns | {name: [run.get(name) for run in results] for name in metric_names(results)})


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as JSON that people can read."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
