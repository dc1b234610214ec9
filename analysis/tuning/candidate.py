"""A candidate: what it sets in the scenario, and the scenario that this makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calibration.common.errors import ScenarioError, did_you_mean
from calibration.traces import TraceSet
from simulator.playback.replay import select_sequences
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario


@dataclass(frozen=True)
class Candidate:
    """One setting to try.

    `overrides`: values by dotted keys of the scenario; None leaves a key out. `axis` and `at` place it on an axis of
    the sensitivity figure, in the line `series`. An `oracle` sees the future: it is evaluated, never chosen.
    """

    name: str
    kind: str
    drafters: tuple[str, ...]
    overrides: dict[str, Any] = field(hash=False)
    axis: str | None = None
    at: float | None = None
    series: str = ""
    oracle: bool = False

    @property
    def fixed(self) -> bool:
        """Whether it is a single drafter at one length."""
        return self.kind == "fixed"


@dataclass(frozen=True)
class Base:
    """The scenario that candidates change: its tables, without drafter, stopping and drafter routing.

    `names` are the drafters to choose from; `prices` what the scenario says of each one's costs (None: from the
    TraceSet). `shared`: all of them were recorded on the same sequences; else every candidate serves those that all
    of them have, so that candidates serve the same requests.
    """

    scenario: Scenario
    tables: dict[str, Any]
    names: tuple[str, ...]
    prices: dict[str, Any]
    shared: bool = True

    def single(self, drafter: str, stopping: Mapping[str, Any]) -> dict[str, Any]:
        """Give the overrides of one drafter with a stopping policy."""
        if not self.shared:
            rule = {"policy": "static", "drafters": list(self.names), "drafter": drafter}
            return self.routed(rule, stopping)
        return {
            "drafter": {"name": drafter},
            "stopping": dict(stopping),
            "costs.drafter": self.prices.get(drafter),
        }

    def routed(self, rule: Mapping[str, Any], stopping: Mapping[str, Any]) -> dict[str, Any]:
        """Give the overrides of several drafters, chosen by `rule`, with a stopping policy."""
        priced = {name: self.prices[name] for name in rule["drafters"] if self.prices.get(name) is not None}
        return {
            "routing.drafter": dict(rule),
            "stopping": dict(stopping),
            "costs.drafters": priced or None,
        }

    def make(self, overrides: Mapping[str, Any]) -> Scenario:
        """Give the scenario with `overrides`; `ScenarioError` names every rule that it breaks."""
        tables = copy.deepcopy(self.tables)
        for key, value in overrides.items():
            _put(tables, key.split("."), value)
        return parse_scenario(tables, where="candidate", folder=self.scenario.locate("."))


def _put(tables: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *outer, last = path
    here = tables
    for name in outer:
        here = here.setdefault(name, {})
    if value is None:
        here.pop(last, None)
    else:
        here[last] = copy.deepcopy(value)


def make_base(
    scenario: Scenario,
    traces: TraceSet,
    drafters: Sequence[str] | None,
    extra: Mapping[str, Any],
) -> Base:
    """Give what candidates change; `extra` are overrides that hold for all of them.

    Drafters: those asked for, else those that the scenario routes among, else the scenario's own where it states that
    one's price, else all of the TraceSet. Raises `ScenarioError` for names that are not there and for replicas that
    have a policy of their own.
    """
    faults = [
        f"replica[{number}].{key}: must be left out, tuning chooses it"
        for number, replica in enumerate(scenario.replica or ())
        for key in ("stopping", "drafter")
        if getattr(replica, key) is not None
    ]
    if faults:
        raise ScenarioError("\n".join(faults))
    names = chosen_drafters(scenario, traces.manifest.drafter_names, drafters)
    if not names:
        raise ScenarioError("traces: must hold a drafter to tune, this TraceSet has none")
    tables = scenario.model_dump(mode="json", exclude_unset=True)
    costs = tables.get("costs") or {}
    prices = dict.fromkeys(names, costs.get("drafter")) | (costs.get("drafters") or {})
    for key in ("stopping", "drafter"):
        tables.pop(key, None)
    for table, keys in (("routing", ("drafter",)), ("costs", ("drafter", "drafters"))):
        for key in keys:
            (tables.get(table) or {}).pop(key, None)
        if table in tables and not tables[table]:
            del tables[table]
    for key, value in extra.items():
        _put(tables, key.split("."), value)
    return Base(scenario, tables, names, prices, _shared(scenario, traces, names))


def chosen_drafters(scenario: Scenario, known: Sequence[str], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Give the drafters to choose from, of those `known` to the TraceSet; see `make_base`."""
    rule = None if scenario.routing is None else scenario.routing.drafter
    if wanted is None:
        if rule is not None:
            return tuple(rule.drafters)
        if scenario.drafter is not None and scenario.costs.drafter is not None:
            return (scenario.drafter.name,)
        return tuple(known)
    for name in wanted:
        if name not in known:
            raise ScenarioError(f"--drafters: not in the TraceSet, got '{name}'{did_you_mean(name, known)}")
    if len(set(wanted)) != len(wanted) or not wanted:
        raise ScenarioError(f"--drafters: must name each drafter once, got {', '.join(wanted) or 'none'}")
    return tuple(wanted)


def _shared(scenario: Scenario, traces: TraceSet, names: Sequence[str]) -> bool:
    """Whether all of `names` were recorded on the same sequences."""
    domains = scenario.traces.domains
    common = len(select_sequences(traces, domains=domains, drafter=tuple(names)))
    return all(len(select_sequences(traces, domains=domains, drafter=name)) == common for name in names)
