"""Replications: the same scenario on different random numbers, for intervals that mean something.

Latencies within a run are autocorrelated, so requests are never resampled: the unit of chance is the run.

Estimates over replications: mean, standard deviation and Student's t interval.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.errors import ReplicationWarning, ScenarioError
from calibration.common.files import fresh_folder
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.experiments.pool import Outcome, retell, run_all
from simulator.scenario.scenario import Scenario

CONFIDENCE = 0.95
COVERS = "over seeds alone: not over which requests were recorded, nor over the error of step times"
"""What intervals over replications cover, for every table that shows them."""
_SETTINGS = frozenset({"seed"})
"""Numbers of a summary that are not results."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` independent replications with the ends of its interval at level `CONFIDENCE`.

    `sd` and the interval are None where n < 2, and the interval also where the replications carry no chance at all.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def without_interval(self) -> Estimate:
        """Give the same without interval."""
        return Estimate(self.n, self.mean, self.sd)

    def to_dict(self) -> dict[str, Any]:
        """Give what is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def estimate(values: Sequence[float]) -> Estimate:
    """Give mean +- t_{n-1} sd / sqrt(n) of independent `values`; exact coverage where they are normal.

    Means and throughputs over many requests are nearly so by the central limit theorem; extreme percentiles of short
    runs are skewed, and their intervals cover a little less.
    """
    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    if n > 1 and bool((array == array[0]).all()):  # the mean of equal numbers is rounded; its sd would not be 0
        return Estimate(n, float(array[0]), 0.0, float(array[0]), float(array[0]))
    if n < 2:
        return Estimate(n, mean)
    sd = float(array.std(ddof=1))
    reach = t_quantile(n - 1) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - reach, mean + reach)


def t_quantile(degrees: int) -> float:
    """Give the two-sided `CONFIDENCE` quantile of Student's t with `degrees` of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def results_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Give every number of a run's summary that is a result; item i of a list becomes ``name[i]``."""
    flat: dict[str, float] = {}
    for name, value in summary.items():
        items = {f"{name}[{i}]": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {
            key: item
            for key, item in items.items()
            if isinstance(item, int | float) and not isinstance(item, bool) and key not in _SETTINGS
        }
    return flat


def metric_names(runs: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Give the names of all results in `runs`, in the order of the first run, later ones after that."""
    return tuple(dict.fromkeys(name for run in runs for name in run))


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
