"""Run every cell of a sweep, keep each in a store the moment it is done, and give all of them as one table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

import calibration.common.errors
from calibration.common.errors import PacelineError, PacelineWarning, ScenarioError
from calibration.common.files import whole_file
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.experiments.axes import SweepPlan, name_of, plan_sweep, text_of
from simulator.experiments.pool import Outcome, retell, run_all
from simulator.experiments.replicate import Estimate, estimate, metric_names, results_of, runs_table
from simulator.experiments.store import Store, StoredCell, cell_key, cell_keys, traces_hash
from simulator.scenario.loading import name_faults
from simulator.scenario.scenario import Scenario

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".parquet", ".csv")
_SHOWN = 10
"""Failed cells that are spelled out."""


@dataclass(frozen=True)
class SweepResult:
    """All cells of a finished sweep, in the order of its plan. `reused`: how many came from the store."""

    plan: SweepPlan
    summaries: tuple[dict[str, Any], ...]
    reused: int

    @property
    def table(self) -> pa.Table:
        """One row per cell: the value of every axis, replication, seed, scenario hash, every number of its summary.

        Axes whose values are tables or of several types are given as text.
        """
        plain = {key: len({type(value) for value in values}) == 1 for key, values in self.plan.axes.items()}
        plain = {key: one and not isinstance(self.plan.axes[key][0], dict | list) for key, one in plain.items()}
        keys = [
            {
                **{key: value if plain[key] else text_of(value) for key, value in cell.point.items()},
                "replication": cell.replication,
                "seed": cell.scenario.seed,
                "scenario_hash": cell.scenario.hash,
            }
            for cell in self.plan.cells
        ]
        return runs_table(keys, [results_of(summary) for summary in self.summaries])

    def frame(self) -> pd.DataFrame:
        """Give the table as a pandas data frame."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def estimates(self) -> list[tuple[dict[str, Any], dict[str, Estimate]]]:
        """Give, per point, its values and the estimate of every number over the replications that have it."""
        found = []
        for start in range(0, len(self.plan.cells), self.plan.replications):
            runs = [results_of(summary) for summary in self.summaries[start : start + self.plan.replications]]
            point = {name: estimate([run[name] for run in runs if name in run]) for name in metric_names(runs)}
            certain = len(runs) > 1 and all(run == runs[0] for run in runs)
            point = {name: e.without_interval() for name, e in point.items()} if certain else point
            found.append((self.plan.cells[start].point, point))
        return found

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the table to `path` (.parquet or .csv), whole or not at all; give the path."""
        import pyarrow.csv
        import pyarrow.parquet

        target = check_format(path)
        with whole_file(target) as scratch:
            if target.suffix == ".csv":
                pyarrow.csv.write_csv(self.table, scratch)
            else:
                pyarrow.parquet.write_table(self.table, scratch, compression="zstd")
        return target


def check_format(path: str | os.PathLike[str]) -> Path:
    """Give `path`; `ScenarioError` unless its ending is one of `FORMATS`."""
    target = Path(path)
    if target.suffix not in FORMATS:
        raise ScenarioError(f"{target}: must end in {' or '.join(FORMATS)}, got '{target.suffix}'")
    return target


def sweep(
    scenario: Scenario,
    grid: Mapping[str, Sequence[Any]],
    *,
    replications: int = 1,
    store: str | os.PathLike[str] | None = None,
    traces: TraceSet | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> SweepResult:
    """Run `scenario` at every point of `grid`, keys of the scenario with lists of values; see `run_sweep`.

    >>> sweep(scenario, {"stopping.draft_tokens": [1, 2, 4], "engine.max_num_seqs": [8, 32]})  # doctest: +SKIP
    """
    plan = plan_sweep(scenario, grid, replications)
    return run_sweep(plan, store=store, traces=traces, workers=workers, progress=progress)


def run_sweep(
    plan: SweepPlan,
    *,
    store: str | os.PathLike[str] | None = None,
    traces: TraceSet | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> SweepResult:
    """Run the cells of `plan` that `store` (a sqlite file; default: none) does not have yet; give all of them.

    A cell is the same if its scenario (seed included), the version and the code of paceline, and the content of
    every file it reads are the same. Every cell is kept when it ends: after Ctrl-C or a crash the same call goes on
    from there.
    `traces` replaces the TraceSets that the scenarios name; `progress` hears (cells done, cells in all). The result
    does not depend on `workers`.

    Raises `ScenarioError`, after all other cells have ended, with every cell that could not be run.
    """
    _check_names(plan, traces)
    shared = None if traces is None else traces_hash(traces)
    keys = cell_keys((cell.scenario for cell in plan.cells), shared)
    with Store(store) as cells:
        done = cells.get(keys)
        missing = [i for i, key in enumerate(keys) if key not in done]
        reused, total = len(keys) - len(missing), len(keys)
        report = progress or (lambda number, total: None)
        report(reused, total)
        faults: dict[int, PacelineError] = {}
        scenarios = [plan.cells[i].scenario for i in missing]
        with contextlib.closing(run_all(scenarios, traces, workers=workers)) as runs:
            for ended, (number, outcome) in enumerate(runs, start=1):
                i = missing[number]
                if outcome.fault is not None:
                    faults[i] = outcome.fault
                elif cell_key(plan.cells[i].scenario, shared) != keys[i]:
                    faults[i] = ScenarioError("a file that it reads was changed while the sweep ran; run it again")
                else:
                    done[keys[i]] = _kept(outcome)
                    cells.put(keys[i], plan.cells[i].scenario, done[keys[i]])
                report(reused + ended, total)
    if faults:
        raise ScenarioError(_failed(plan, faults))
    found = [done[key] for key in keys]
    retell([_outcome(cell) for cell in found])
    return SweepResult(plan, tuple(cell.summary for cell in found), reused)


def _kept(outcome: Outcome) -> StoredCell:
    return StoredCell(outcome.summary, tuple((kind.__name__, text) for kind, text in outcome.said))


def _check_names(plan: SweepPlan, traces: TraceSet | None) -> None:
    """Check every cell against what it will replay, before anything runs."""
    faults: dict[str, None] = {}
    domains = [] if traces is None else traces.sequences["domain"].unique().to_pylist()
    for cell in plan.cells[:: plan.replications]:
        source = cell.scenario.traces
        if traces is not None:
            found = name_faults(cell.scenario.model_dump(), traces.manifest.drafter_names, domains)
            faults |= dict.fromkeys(f"sweep: {name_of(cell.point)}: {fault}" for fault in found)
        elif source.bundled is None and source.path is None:
            faults["sweep: traces: must have bundled or path, or be given to sweep()"] = None
    if faults:
        raise ScenarioError("\n".join(faults))


def _failed(plan: SweepPlan, faults: Mapping[int, PacelineError]) -> str:
    """Give a line for every cell that could not be run, and the number of those that are kept."""
    lines = []
    for i in sorted(faults)[:_SHOWN]:
        cell = plan.cells[i]
        replication = f", replication {cell.replication}" if plan.replications > 1 else ""
        lines.append(f"sweep: {name_of(cell.point)}{replication}: {faults[i]}")
    if len(faults) > _SHOWN:
        lines.append(f"sweep: and {len(faults) - _SHOWN} more cells")
    kept = len(plan.cells) - len(faults)
    lines.append(f"sweep: {len(faults)} of {len(plan.cells)} cells could not be run ({kept} are kept)")
    return "\n".join(lines)


def _outcome(cell: StoredCell) -> Outcome:
    return Outcome(cell.summary, None, tuple((_category(name), text) for name, text in cell.warnings))


def _category(name: str) -> type[PacelineWarning]:
    """Give the category of a stored warning, by its name."""
    found = getattr(calibration.common.errors, name, PacelineWarning)
    return found if isinstance(found, type) and issubclass(found, PacelineWarning) else PacelineWarning
