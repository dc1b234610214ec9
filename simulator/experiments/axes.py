"""What a sweep varies: lists of values for keys of a scenario, and the scenarios that their product makes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.common.errors import ScenarioError
from calibration.common.settings import replaced
from simulator.experiments.replicate import replication_seeds, with_seed
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario

_BARE = re.compile(r"[A-Za-z_][\w.-]*")
"""A word that stands for itself on the command line: fixed, prompt-lookup."""
_SHOWN = 10
"""Faults of one sweep that are spelled out."""


@dataclass(frozen=True)
class Cell:
    """One scenario of a sweep on one seed. `point`: the value of every axis; `index`: which point it is."""

    index: int
    point: dict[str, Any]
    replication: int
    scenario: Scenario


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose every scenario is valid: `axes` (key to values) times `replications` seeds.

    Points are in the order of the product, the last axis fastest. Replication r has the same seed at every point
    (common random numbers), unless ``seed`` is itself an axis.
    """

    axes: dict[str, tuple[Any, ...]]
    replications: int
    cells: tuple[Cell, ...]

    @property
    def points(self) -> int:
        """How many scenarios there are, seeds apart."""
        return len(self.cells) // self.replications


def load_sweep(path: str | os.PathLike[str], axes: Sequence[str] = (), replications: int | None = None) -> SweepPlan:
    """Read the scenario in the TOML file at `path` and the ``[sweep]`` table in it.

    The table holds lists, under keys of the scenario (``stopping.draft_tokens = [1, 2, 4]``), and maybe
    ``replications``. `axes` are texts like ``stopping.draft_tokens=1,2,4``; they add axes or replace those of the
    file, as `replications` does. Raises `ScenarioError` with every fault of every cell.
    """
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScenarioError(f"{file}: not found") from None
    except OSError as fault:
        raise ScenarioError(f"{file}: cannot be read ({fault.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise ScenarioError(f"{file}: not valid TOML ({fault})") from None
    table = data.pop("sweep", {})
    if not isinstance(table, Mapping):
        raise ScenarioError(f"{file}: sweep: must be a table, got {table!r}")
    stated = table.get("replications", 1)
    grid = _flatten({key: value for key, value in table.items() if key != "replications"}, f"{file}: sweep")
    grid |= dict(parse_axis(text) for text in axes)
    number = stated if replications is None else replications
    return plan_sweep(data, grid, number, folder=file.parent, where=str(file))


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Give (key, values) of ``key=value,value``: TOML values, or plain words that stand for themselves.

    ``stopping.draft_tokens=1,2,4``; ``stopping.policy=none,oracle``; ``stopping=[{policy='none'}]`` for whole tables.
    """
    key, found, values = text.partition("=")
    key, values = key.strip(), values.strip()
    if not (found and key and values):
        raise ScenarioError(f"axis '{text}': must be KEY=VALUE,VALUE, e.g. stopping.draft_tokens=1,2,4")
    for whole in (values, f"[{values}]"):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            parsed = tomllib.loads(f"v = {whole}")["v"]
            if isinstance(parsed, list):
                return key, parsed
    return key, [_word(key, piece.strip()) for piece in values.split(",")]


def _word(key: str, text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        if _BARE.fullmatch(text):
            return text
    raise ScenarioError(f"axis '{key}': must have values as TOML writes them, got '{text}'")


def _flatten(table: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, list[Any]]:
    """Give dotted keys and their lists; quoted keys (``"a.b"``) and nested tables (``a.b``) mean the same."""
    flat: dict[str, list[Any]] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, where, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = value
        else:
            raise ScenarioError(f"{where}.{prefix}{key}: must be a list of values, got {value!r}")
    return flat


def plan_sweep(
    base: Scenario | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    replications: int = 1,
    *,
    folder: str | os.PathLike[str] = ".",
    where: str = "sweep",
) -> SweepPlan:
    """Give the plan of a sweep over `base` (a scenario, or the tables of one, with paths relative to `folder`).

    A value replaces what `base` has under its key, be it a number or a whole table. Every scenario is checked by the
    scenario's own rules before anything runs; raises `ScenarioError` with every fault and the first cell that has it.
    """
    tables = base
    if isinstance(base, Scenario):
        tables, folder = base.model_dump(mode="json", exclude_unset=True), base.locate(".")
    axes = {key: tuple(values) for key, values in grid.items()}
    _check_axes(axes, replications, where)
    scenarios, points = [], [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    faults: dict[str, list[str]] = {}
    for point in points:
        try:
            scenarios.append(parse_scenario(replaced(tables, point), where="", folder=folder))
        except ScenarioError as fault:
            for line in str(fault).split("\n"):
                faults.setdefault(line.removeprefix(": "), []).append(name_of(point))
    if faults:
        raise ScenarioError(_sentences(faults, len(points), where))
    cells = [
        Cell(index, point, r, with_seed(scenario, seed))
        for index, (point, scenario) in enumerate(zip(points, scenarios, strict=True))
        for r, seed in enumerate(replication_seeds(scenario.seed, replications))
    ]
    return SweepPlan(axes, replications, tuple(cells))


def _check_axes(axes: Mapping[str, tuple[Any, ...]], replications: Any, where: str) -> None:
    faults = []
    if not isinstance(replications, int) or isinstance(replications, bool) or replications < 1:
        faults.append(f"replications: must be a whole number of at least 1, got {replications!r}")
    if not axes:
        faults.append("must have at least one axis, e.g. stopping.draft_tokens = [1, 2, 4]")
    for key, values in axes.items():
        texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
        if not values:
            faults.append(f"{key}: must have at least one value")
        elif len(set(texts)) != len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            faults.append(f"{key}: must have each value once, got {twice} twice")
        inside = [other for other in axes if other.startswith(f"{key}.")]
        if inside:
            faults.append(f"{key}: must not be an axis beside '{inside[0]}', which is inside it")
    if faults:
        raise ScenarioError("\n".join(f"{where}: {fault}" for fault in faults))


def name_of(point: Mapping[str, Any]) -> str:
    """Give a point as text: ``stopping.draft_tokens=2, engine.max_num_seqs=8``."""
    return ", ".join(f"{key}={text_of(value)}" for key, value in point.items())


def text_of(value: Any) -> str:
    """Give a value of an axis as text: words plain, tables as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _sentences(faults: Mapping[str, Sequence[str]], points: int, where: str) -> str:
    lines = []
    for fault, cells in list(faults.items())[:_SHOWN]:
        at = "every cell" if len(cells) == points else f"{len(cells)} of {points} cells, first {cells[0]}"
        lines.append(f"{where}: {fault} (in {at})")
    if len(faults) > _SHOWN:
        lines.append(f"{where}: and {len(faults) - _SHOWN} more faults")
    return "\n".join(lines)
