"""What is predicted: the scenario beside each measured run, simulated without a look at what is held out.

Where speculation stops paying: measured and predicted, over the batch sizes of closed loops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from analysis.fidelity.measured import MeasuredCondition
from analysis.fidelity.table import Condition, Crossover
from calibration.common.errors import ExtrapolationWarning, ScenarioError
from calibration.common.progress import Progress
from calibration.measured import MeasuredRun
from calibration.measured.run import MARKER
from simulator.experiments.pool import Outcome, run_all
from simulator.scenario.scenario import Costs, Observed, Scenario
from simulator.scenario.workload import ClosedLoop


def observed_runs(condition: MeasuredCondition) -> Iterator[tuple[str, Path]]:
    """Give (place in the scenario, folder) of every measured run that the prices of `condition` are fitted to."""
    scenario = condition.scenario
    tables: list[tuple[str, Costs | None]] = [("costs", scenario.costs)]
    tables += [(f"replica[{i}].costs", replica.costs) for i, replica in enumerate(scenario.replica or ())]
    for place, costs in tables:
        if costs is None:
            continue
        prices = {"verifier": costs.verifier, "drafter": costs.drafter}
        prices |= {f"drafters.{name}": price for name, price in (costs.drafters or {}).items()}
        for part, price in prices.items():
            if isinstance(price, Observed):
                yield from ((f"{place}.{part}.runs", scenario.locate(run)) for run in price.runs)


def priced(condition: MeasuredCondition, conditions: Sequence[MeasuredCondition]) -> Scenario:
    """Give the scenario of `condition`; one without prices gets those observed in the ``fit`` runs of its source."""
    scenario = condition.scenario
    runs = tuple(
        str(other.folder.resolve())
        for other in conditions
        if other.source == condition.source and other.run.manifest.role == "fit" and other.run.steps.num_rows
    )
    if scenario.costs != Costs() or not runs:
        return scenario
    costs = scenario.costs.model_copy(update={"verifier": Observed(kind="observed", runs=runs)})
    return scenario.model_copy(update={"costs": costs})


def predicted_scenario(condition: MeasuredCondition, conditions: Sequence[MeasuredCondition]) -> Scenario:
    """Give the scenario of `condition` as it is simulated: with its costs, and its clients starting as measured."""
    return started_as_measured(condition, priced(condition, conditions))


def started_as_measured(condition: MeasuredCondition, scenario: Scenario) -> Scenario:
    """Give `scenario` with its clients starting as far apart as those of the measured run, unless it says how far.

    The median gap of the first arrivals, over repeats: 0 for engines driven from within, which take all at once.
    """
    load = scenario.workload
    if not isinstance(load, ClosedLoop) or load.stagger_s is not None:
        return scenario
    requests = condition.run.requests
    gaps = []
    for repeat in range(condition.run.manifest.repeats):
        own = requests.filter(pc.equal(requests["repeat"], repeat))
        first = own.filter(pc.less(own["request_id"], load.concurrency))["arrival_s"].to_numpy()
        gaps += np.diff(np.sort(first)).tolist()
    apart = float(np.median(gaps)) if gaps else 0.0
    return scenario.model_copy(update={"workload": load.model_copy(update={"stagger_s": apart})})


def check_leaks(conditions: Sequence[MeasuredCondition]) -> None:
    """Refuse, with `ScenarioError`, a held-out condition whose prices were fitted to a held-out run, maybe itself."""
    roles = {condition.folder.resolve(): condition.run.manifest.role for condition in conditions}
    faults = []
    for condition in conditions:
        if condition.run.manifest.role != "held-out":
            continue
        for place, folder in observed_runs(condition):
            run = folder.resolve()
            if run not in roles and (run / MARKER).is_file():
                roles[run] = MeasuredRun.read(run).manifest.role
            if roles.get(run) == "held-out":
                faults.append(
                    f"{condition.folder / 'scenario.toml'}: {place}: a held-out condition must be priced from runs "
                    f"of role 'fit', got '{folder}' of role 'held-out'"
                )
    if faults:
        raise ScenarioError("\n".join(faults))


def own_steps(condition: MeasuredCondition) -> bool:
    """Whether the prices of `condition` are fitted to its own steps, by name or because it names none."""
    if condition.run.manifest.role == "fit" and condition.scenario.costs == Costs():
        return bool(condition.run.steps.num_rows)
    return condition.folder.resolve() in {folder.resolve() for _, folder in observed_runs(condition)}


def predict(
    conditions: Sequence[MeasuredCondition], *, workers: int = 2, progress: Progress | None = None
) -> list[Outcome]:
    """Simulate the scenario beside each of `conditions`: the same requests and arrivals, one seed.

    A scenario that prices nothing (no ``[costs]``) is priced from the steps of all ``fit`` runs of its source.

    Raises `ScenarioError` for a leak (see `check_leaks`) and for a scenario that cannot be simulated.
    """
    check_leaks(conditions)
    found: dict[int, Outcome] = {}
    scenarios = [predicted_scenario(condition, conditions) for condition in conditions]
    for index, outcome in run_all(scenarios, workers=workers):
        if outcome.fault is not None:
            raise ScenarioError(f"{conditions[index].folder}: cannot be predicted: {outcome.fault}")
        found[index] = outcome
        if progress is not None:
            progress(len(found), len(conditions))
    return [found[index] for index in range(len(conditions))]


def price_notes(outcome: Outcome) -> list[str]:
    """Say what a reader must know of a prediction: prices outside of what was measured, and other warnings."""
    summary = outcome.summary
    notes = [text for category, text in outcome.said if category is not ExtrapolationWarning]
    if summary["extrapolated_iterations"]:
        share = 100 * summary["extrapolated_iterations"] / summary["iterations"]
        notes.append(f"{share:.2g} % of the iterations priced outside of the range of the fit")
    return notes


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
