"""Who runs where: the stages that each item goes through, in order; the last of them answers.

A policy sees of an item what the stages that ran it have shown. As correctness and signals of an item are the same
whenever it comes, its path can be looked up before time begins: an exact counterfactual, no estimate.
"""

from __future__ import annotations

import csv
from pathlib import Path

from calibration.common.errors import ScenarioError, did_you_mean
from simulator.cascade.items import ItemTable
from simulator.cascade.scenario import CascadeScenario
from simulator.cascade.settings import Always, Assigned, Threshold

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
