"""The space that a search covers, as candidates: fixed lengths first, policies for the drafters that lead then.

Only policies that an engine could run: they see tokens, past acceptance and the drafter's confidence, never the
future. The oracles stand apart.

A candidate: what it sets in the scenario, and the scenario that this makes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

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


THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
LENGTH, THRESHOLD, NODES = "draft length (tokens)", "threshold", "tree nodes (tokens)"
BATCHED, SEATS = "max_num_batched_tokens", "max_num_seqs"


def nothing(base: Base) -> Candidate:
    """Give the candidate that does not speculate, on the same sequences."""
    overrides = base.single(base.names[0], {"policy": "none"})
    return Candidate("no speculation", "none", (), overrides)


def fixed(base: Base, drafter: str, draft_tokens: int) -> Candidate:
    """Give one drafter at one length (without the bonus token)."""
    stopping = {"policy": "fixed", "draft_tokens": draft_tokens}
    name = f"{drafter}: {draft_tokens}"
    return Candidate(
        name=name,
        kind="fixed",
        drafters=(drafter,),
        overrides=base.single(drafter, stopping),
        axis=LENGTH,
        at=draft_tokens,
        series=drafter,
    )


def fixed_lengths(base: Base, lengths: Sequence[int]) -> list[Candidate]:
    """Give every drafter at every length."""
    return [fixed(base, drafter, k) for drafter in base.names for k in lengths]


def by_batch(base: Base, drafter: str, table: Sequence[Sequence[int]]) -> Candidate:
    """Give one drafter with a length for each range of batch sizes, ``[first, last, K]``."""
    stopping = {"policy": "by_batch", "table": [list(entry) for entry in table]}
    return Candidate(f"{drafter}: by batch size", "by_batch", (drafter,), base.single(drafter, stopping))


def policies(base: Base, traces: TraceSet, drafter: str, best: int, longest: int) -> list[Candidate]:
    """Give the policies for one drafter whose best fixed length is `best`; the longest draft is `longest`."""
    felt = _rows(traces, drafter, "drafter_confidence")
    found = [*_learning(base, drafter, best, longest)]
    if felt:
        found += _thresholds(base, drafter, longest)
    given = next(info for info in traces.manifest.drafters if info.name == drafter).deterministic
    if not given and _rows(traces, drafter, "emitted_rank"):
        found += _trees(base, drafter)
    return found


def _policy(
    base: Base,
    drafter: str,
    label: str,
    stopping: Mapping[str, Any],
    axis: str | None = None,
    at: float | None = None,
) -> Candidate:
    return Candidate(
        name=f"{drafter}: {label}",
        kind=str(stopping["policy"]),
        drafters=(drafter,),
        overrides=base.single(drafter, stopping),
        axis=axis,
        at=at,
        series=f"{drafter}: {stopping['policy']}",
    )


def _learning(base: Base, drafter: str, best: int, longest: int) -> Iterator[Candidate]:
    """Policies that read past acceptance."""
    tiers = {"1": {"candidate_steps": sorted({0, 1, max(1, best // 2), best, longest})}}
    yield _policy(base, drafter, "moving average (SGLang's tiers)", {"policy": "moving_average"})
    yield _policy(
        base,
        drafter,
        "moving average",
        {"policy": "moving_average", "tiers": tiers, "initial_steps": best},
    )
    yield _policy(base, drafter, "goodput", {"policy": "goodput", "max_draft_tokens": longest, "probe_rounds": 20})
    yield _policy(base, drafter, "per request", {"policy": "per_request", "max_draft_tokens": longest})
    yield _policy(base, drafter, "budget", {"policy": "budget", "max_draft_tokens": longest})
    yield _policy(base, drafter, "heuristic", {"policy": "heuristic", "start_tokens": best, "max_draft_tokens": 20})


def confidence(base: Base, drafter: str, threshold: float, longest: int) -> Candidate:
    """Give a draft that stops where the drafter's confidence falls below `threshold`."""
    stopping = {"policy": "confidence", "threshold": threshold, "max_draft_tokens": longest}
    return _policy(base, drafter, f"confidence {threshold:g}", stopping, THRESHOLD, threshold)


def _thresholds(base: Base, drafter: str, longest: int) -> Iterator[Candidate]:
    """Policies that read the drafter's confidence or entropy."""
    for threshold in THRESHOLDS:
        yield confidence(base, drafter, threshold, longest)
    for threshold in (0.4, 0.6):
        stopping = {"policy": "adaedl", "threshold": threshold, "max_draft_tokens": longest}
        yield _policy(base, drafter, f"AdaEDL {threshold:g}", stopping, THRESHOLD, threshold)
    for threshold in (0.3, 0.5, 0.7):
        stopping = {
            "policy": "specdec++",
            "threshold": threshold,
            "min_draft_tokens": 1,
            "max_draft_tokens": longest,
        }
        yield _policy(base, drafter, f"SpecDec++ {threshold:g}", stopping, THRESHOLD, threshold)
    stopping = {"policy": "learned", "max_draft_tokens": longest}
    yield _policy(base, drafter, "learned from confidence", stopping)
    stopping = {"policy": "budget", "estimate": "confidence", "max_draft_tokens": longest}
    yield _policy(base, drafter, "budget by confidence", stopping)


def _trees(base: Base, drafter: str) -> Iterator[Candidate]:
    for nodes, depth in ((4, 3), (8, 4), (16, 6)):
        stopping = {"policy": "tree", "shape": {"kind": "sequoia", "nodes": nodes, "depth": depth}}
        yield _policy(base, drafter, f"tree of {nodes}", stopping, NODES, nodes)


def routings(base: Base, traces: TraceSet, leaders: Sequence[tuple[str, int]]) -> list[Candidate]:
    """Give rules that choose among drafters; `leaders`: drafters with their best fixed lengths, best first.

    Pairs of the best with each of the others, and the best three together, drafting as long as the first of them.
    """
    names = [name for name, _ in leaders]
    if len(names) < 2:
        return []
    groups = [(names[0], other) for other in names[1:3]]
    if len(names) > 2:
        groups.append(tuple(names[:3]))  # type: ignore[arg-type]
    lengths = dict(leaders)
    found: list[Candidate] = []
    for group in groups:
        length = lengths[group[0]]
        felt = all(_rows(traces, name, "drafter_confidence") for name in group)
        for label, rule in _rules(group, felt=felt):
            name = f"{label} of {' + '.join(group)}: {length}"
            stopping = {"policy": "fixed", "draft_tokens": length}
            found.append(Candidate(name, str(rule["policy"]), tuple(group), base.routed(rule, stopping)))
    return found


def _rules(group: Sequence[str], *, felt: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    drafters = list(group)
    yield "UCB1", {"policy": "ucb", "drafters": drafters}
    yield "Thompson sampling", {"policy": "thompson", "drafters": drafters}
    yield "classifier", {"policy": "classifier", "drafters": drafters}
    yield "merged drafts", {"policy": "merged", "drafters": drafters}
    if felt:
        yield "confidence", {"policy": "confidence", "drafters": drafters}


def oracles(base: Base, leaders: Sequence[str]) -> list[Candidate]:
    """Give the bounds: the exact length for each of `leaders`, and the better drafter at its exact length."""
    found = []
    for drafter in leaders:
        for policy, label in (("oracle", "accepted length"), ("oracle_cost", "accepted length by cost")):
            overrides = base.single(drafter, {"policy": policy})
            name = f"oracle: {label} of {drafter}"
            found.append(Candidate(name, "length oracle", (drafter,), overrides, oracle=True))
    if len(base.names) > 1:
        rule = {"policy": "oracle_round", "by": "seconds", "drafters": list(base.names)}
        for policy, label in (("oracle", "accepted length"), ("oracle_cost", "accepted length by cost")):
            overrides = base.routed(rule, {"policy": policy})
            name = f"oracle: drafter and {label}"
            found.append(Candidate(name, "drafter oracle", base.names, overrides, oracle=True))
    return found


def budgets(best: Candidate, batched: Sequence[int], seats: Sequence[int]) -> list[Candidate]:
    """Give `best` under each token budget and each largest batch."""
    return [
        Candidate(
            name=f"{best.name}; {key} {value}",
            kind="engine",
            drafters=best.drafters,
            overrides=best.overrides | {f"engine.{key}": value},
            axis=key,
            at=value,
            series=best.name,
        )
        for key, values in ((BATCHED, batched), (SEATS, seats))
        for value in values
    ]


def neighbours(base: Base, best: Candidate, lengths: Sequence[int], longest: int) -> list[Candidate]:
    """Give what lies between `best` and what was tried on both sides of it, on its own axis."""
    if best.fixed and best.at is not None:
        between = sorted({*_between(int(best.at), [*lengths, 0])} - set(lengths))
        return [fixed(base, best.drafters[0], k) for k in between if k >= 1]
    if best.kind == "confidence" and len(best.drafters) == 1 and best.at is not None:
        points = sorted({round(best.at + step, 2) for step in (-0.1, 0.1)} - set(THRESHOLDS))
        return [confidence(base, best.drafters[0], at, longest) for at in points if 0 < at < 1]
    return []


def _between(best: int, lengths: Sequence[int]) -> Iterator[int]:
    """The lengths next to `best`, the middles of the gaps on its sides, and twice `best` where it is the longest."""
    known = sorted(set(lengths))
    for low, high in itertools.pairwise(known):
        if best in (low, high) and high - low > 1:
            yield (low + high) // 2
            yield best - 1 if best == high else best + 1
    if best == known[-1]:
        yield best + max(1, best // 2)
        yield 2 * best


def _rows(traces: TraceSet, drafter: str, column: str) -> bool:
    """Whether any position of `drafter` has `column`."""
    positions = traces.positions
    if column not in positions.column_names:
        return False
    mine = positions[column].filter(pc.equal(positions["drafter"], drafter))
    return bool(mine.null_count < len(mine))
