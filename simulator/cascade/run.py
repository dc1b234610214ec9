"""Simulate a cascade: one fleet per stage in one environment, and a router that sends requests from stage to stage.

Who runs where: the stages that each item goes through, in order; the last of them answers.

A policy sees of an item what the stages that ran it have shown. As correctness and signals of an item are the same
whenever it comes, its path can be looked up before time begins: an exact counterfactual, no estimate.
"""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import simpy

from calibration.common.errors import ExtrapolationWarning, ScenarioError, did_you_mean
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from simulator.cascade.items import ItemTable, Transfer, read_items, transfer
from simulator.cascade.router import CascadeRouter, StageItems
from simulator.cascade.scenario import Always, Assigned, CascadeScenario, Stage, Threshold
from simulator.cascade.summing import CascadeResult, StageRun, requests_of, summarise
from simulator.playback.replay import SequenceTable, select_sequences
from simulator.results.result import Record
from simulator.running.assemble import ReplicaSetup, make_fleet, members, replica_setups
from simulator.running.run import read_traces
from simulator.serving.fleet import Fleet
from simulator.workload import make_source

Path_ = tuple[int, ...]
"""Indices of stages, each at most once."""


def make_paths(scenario: CascadeScenario, table: ItemTable) -> tuple[Path_, ...]:
    """Give the path of every item of `table` under the policy of `scenario`.

    Raises `ScenarioError` where a file of it is faulty, or a signal is missing where it is needed.
    """
    match scenario.policy:
        case Always(stage=stage):
            return (((scenario.stages.index(stage)),),) * len(table)
        case Threshold() as rule:
            return tuple(_stopped(rule, table, item) for item in range(len(table)))
        case Assigned(path=path):
            return _assigned(scenario.locate(path), table)


def _stopped(rule: Threshold, table: ItemTable, item: int) -> Path_:
    """Give the stages up to the first that is sure enough."""
    last = len(table.stages) - 1
    for stage in range(last):
        value = table.signals[rule.signal][item][stage]
        limit = rule.threshold if isinstance(rule.threshold, float | int) else rule.threshold[stage]
        if value != value:
            where = f"item '{table.items[item]}', stage '{table.stages[stage]}'"
            raise ScenarioError(
                f"policy.signal: must be known where a request may stop, got no '{rule.signal}' of {where}"
            )
        if value >= limit if rule.stop == "at_least" else value <= limit:
            return tuple(range(stage + 1))
    return tuple(range(last + 1))


def _assigned(file: Path, table: ItemTable) -> tuple[Path_, ...]:
    """Read the stages of every item; items that the table does not have are an error, too."""
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        raise ScenarioError(f"policy.path: no such file, got '{file}'") from None
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise ScenarioError(f"{file.name}: must be a CSV file ({fault})") from None
    found: dict[str, Path_] = {}
    for number, row in enumerate(rows, 2):
        place = f"{file.name}: row {number}"
        item, names = row.get("item"), [name.strip() for name in (row.get("stages") or "").split(";")]
        if not item or item in found:
            raise ScenarioError(f"{place}, column 'item': must be an item of its own, got '{item or ''}'")
        if item not in table.items:
            raise ScenarioError(f"{place}, column 'item': not in the table of items, got '{item}'")
        for name in names:
            if name not in table.stages:
                hint = did_you_mean(name, table.stages)
                raise ScenarioError(f"{place}, column 'stages': must be stages with semicolons, got '{name}'{hint}")
        if len(set(names)) < len(names):
            raise ScenarioError(f"{place}, column 'stages': must name each stage once, got {';'.join(names)}")
        found[item] = tuple(table.stages.index(name) for name in names)
    for item in table.items:
        if item not in found:
            raise ScenarioError(f"{file.name}: must have a row of item '{item}'")
    return tuple(found[item] for item in table.items)


def simulate_cascade(
    scenario: CascadeScenario,
    *,
    items: ItemTable | None = None,
    traces: Mapping[str, TraceSet] | None = None,
    progress: Progress | None = None,
) -> CascadeResult:
    """Run `scenario` and give its result.

    `items` replaces the table that the scenario names, `traces` (by name of the stage) the TraceSets. `progress`
    hears (requests answered, in all). Quality, cost by the table and who runs where are exact counterfactuals of the
    table of items; times are simulated. Where a stage speculates, its acceptance is replayed from recorded sequences
    of the item's domain (of all domains where it has none), as the item's own text was not recorded: an
    approximation. Prompts are all different to a prefix cache. Same scenario, same files, same version: same bytes.

    Raises `ScenarioError`, `TraceError`, `ReplayError` or `CostError`; warns with `ExtrapolationWarning`, once,
    where iterations were priced outside of what was measured.
    """
    table = items if items is not None else _read_items(scenario)
    prompt_tokens, output_tokens = _lengths(scenario, table)
    paths = make_paths(scenario, table)
    env = simpy.Environment()
    entry_table = SequenceTable(table.items, table.domains, prompt_tokens, tuple(row[0] for row in output_tokens))
    entry = make_source(scenario.of_stage(scenario.stage[0]), entry_table)
    found = [_stage(scenario, stage, (traces or {}).get(stage.name)) for stage in scenario.stage]
    items_of = [
        StageItems(_bound(table.domains, sequences), np.array([row[at] for row in output_tokens]))
        for at, (_, sequences) in enumerate(found)
    ]

    def hand(here: int, there: int, tokens: int) -> Transfer:
        return transfer(scenario.handover, scenario.stage[here], scenario.stage[there], tokens)

    router = CascadeRouter(
        env=env,
        entry=entry,
        paths=paths,
        prompt_tokens=prompt_tokens,
        items_of=items_of,
        hand=hand,
        ended=_Tally(progress, entry.counted).add,
    )
    fleets = _fleets(scenario, found, router, env)
    router.open(fleets)
    env.run()
    runs = [
        StageRun(stage, places, sequences, Record(members(fleet, places)))
        for stage, (places, sequences), fleet in zip(scenario.stage, found, fleets, strict=True)
    ]
    requests = requests_of(router, table, runs)
    summary = summarise(scenario, table, entry, runs, requests)
    _warn(summary["extrapolated_iterations"])
    return CascadeResult(scenario, summary, requests)


def _read_items(scenario: CascadeScenario) -> ItemTable:
    if scenario.items.path is None:
        raise ScenarioError("items.path: must be given, or a table of items to simulate_cascade()")
    return read_items(scenario.locate(scenario.items.path), scenario.stages, policy_signals(scenario))


def policy_signals(scenario: CascadeScenario) -> tuple[str, ...]:
    """Give the signals that the policy of `scenario` reads: columns that its table of items must have."""
    policy = scenario.policy
    return (policy.signal,) if isinstance(policy, Threshold) and len(scenario.stage) > 1 else ()


def _lengths(scenario: CascadeScenario, table: ItemTable) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Give prompt tokens per item, and output tokens per item and stage: the scenario's own before the table's."""
    if table.stages != scenario.stages:
        raise ScenarioError(f"items: must be a table of {', '.join(scenario.stages)}, got {', '.join(table.stages)}")
    own = scenario.items.prompt_tokens
    prompt = table.prompt_tokens if own is None else (own,) * len(table)
    if prompt is None:
        raise ScenarioError("items.prompt_tokens: must be given, as the table has no column 'item_prompt_tokens'")
    for number, stage in enumerate(scenario.stage):
        if stage.output_tokens is None and table.output_tokens is None:
            raise ScenarioError(
                f"stage[{number}].output_tokens: must be given, as the table has no column 'output_tokens'"
            )
    recorded = table.output_tokens or ((0,) * len(scenario.stage),) * len(table)
    stated = [stage.output_tokens for stage in scenario.stage]
    return prompt, [
        tuple(n if fixed is None else fixed for n, fixed in zip(row, stated, strict=True)) for row in recorded
    ]


Found = tuple[list[ReplicaSetup], SequenceTable]


def _stage(scenario: CascadeScenario, stage: Stage, traces: TraceSet | None) -> Found:
    """Give the replicas of one stage and the recorded sequences that answer there."""
    view = scenario.of_stage(stage)
    own = traces if traces is not None else read_traces(view)
    drafter = None if view.drafter is None else view.drafter.name
    if drafter is not None:
        own.manifest.drafter(drafter)
    sequences = select_sequences(own, domains=view.traces.domains, drafter=drafter)
    return replica_setups(view, own, sequences, read_traces), sequences


def _bound(domains: Sequence[str], sequences: SequenceTable) -> np.ndarray:
    """Bind items to sequences: those of its domain take turns, all sequences where it has none."""
    own = {name: [i for i, d in enumerate(sequences.domains) if d == name] for name in set(sequences.domains)}
    turns: dict[str, Iterator[int]] = {}
    everything: Iterator[int] = itertools.cycle(range(len(sequences)))
    bound = []
    for domain in domains:
        if domain in own:
            bound.append(next(turns.setdefault(domain, itertools.cycle(own[domain]))))
        else:
            bound.append(next(everything))
    return np.array(bound, dtype=np.int64)


def _fleets(
    scenario: CascadeScenario, found: Sequence[Found], router: CascadeRouter, env: simpy.Environment
) -> list[Fleet]:
    """Start the engines of every stage."""
    return [
        make_fleet(scenario.of_stage(stage), places, sequences, source, env, lambda number: None)
        for stage, (places, sequences), source in zip(scenario.stage, found, router.sources, strict=True)
    ]


class _Tally:
    """Adds up answers for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, number: int) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(self._done, self._total)


def _warn(extrapolated: int) -> None:
    if extrapolated:
        warnings.warn(
            f"{extrapolated} iterations were priced outside of what was measured; summary.json: stages: costs: "
            "measured_range says what was",
            ExtrapolationWarning,
            stacklevel=3,
        )
