"""What a search found: the best setting, those that come as close, and how far from the oracle. Plain records.

What a search tries to make best: one number of a run, and the service-level objectives that it must keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.common.bootstrap import Estimate
from analysis.common.records import Record
from calibration.common.errors import ScenarioError, did_you_mean
from simulator.results.evidence import Evidence
from simulator.scenario.scenario import Objectives, Scenario

OBJECTIVES = ("throughput", "goodput", "latency", "cost", "energy")
ATTAINMENT = 0.99
"""Share of requests that must keep the objectives, unless told otherwise."""
_UNITS = {
    "throughput": "output tokens/s",
    "goodput": "requests/s within the SLO",
    "cost": "USD per million output tokens",
    "energy": "joules per output token",
    "latency": "ms per output token after the first (mean TPOT)",
}


@dataclass(frozen=True)
class Goal:
    """What is made best: `metric` of a run's summary, times `scale`, in `unit`.

    `slo`: limits in ms by key. With objective ``goodput`` they are part of the number; with the others they are a
    constraint: a candidate is feasible if on average `attainment` of the requests keep all of them.
    """

    objective: str
    metric: str
    scale: float
    unit: str
    larger_is_better: bool
    slo: dict[str, float]
    attainment: float

    @property
    def constrained(self) -> bool:
        """Whether the objectives are a constraint."""
        return bool(self.slo) and self.objective != "goodput"

    def value(self, summary: Mapping[str, Any]) -> float:
        """Give the number of a run; `ScenarioError` where the run does not have it."""
        if self.metric not in summary:
            raise ScenarioError(f"--objective {self.objective}: {_MISSING[self.objective]}")
        return float(summary[self.metric]) * self.scale


_MISSING = {
    "latency": "the runs give no TPOT: outputs of one token have none",
    "throughput": "the runs give no throughput",
    "goodput": "needs service-level objectives, e.g. --slo ttft_ms=500,tpot_ms=50",
    "cost": "needs a price, e.g. --price-per-hour 2.5, or costs.usd_per_hour in the scenario",
    "energy": "the prices give no joules; they do where the timings of the TraceSet hold joules, and for "
    "costs of kind 'roofline' on a device with known power",
}


def make_goal(scenario: Scenario, objective: str, attainment: float = ATTAINMENT) -> Goal:
    """Give the goal of tuning `scenario` (which holds its ``[slo]`` and ``usd_per_hour``) for `objective`.

    Throughput counts all tokens of the engine where a closed loop keeps the batch full by fillers. Raises
    `ScenarioError` for an unknown objective and for one that the scenario cannot answer.
    """
    if objective not in OBJECTIVES:
        raise ScenarioError(
            f"--objective: must be one that is known, got '{objective}'{did_you_mean(objective, OBJECTIVES)}"
        )
    if not 0 < attainment <= 1:
        raise ScenarioError(f"--attainment: must be above 0 and at most 1, got {attainment:g}")
    slo = {} if scenario.slo is None else scenario.slo.model_dump(exclude_none=True)
    if objective == "goodput" and not slo:
        raise ScenarioError(f"--objective goodput: {_MISSING['goodput']}")
    if objective == "cost" and scenario.costs.usd_per_hour is None:
        raise ScenarioError(f"--objective cost: {_MISSING['cost']}")
    filled = bool(getattr(scenario.workload, "keep_full", False))
    metric = {
        "throughput": "engine_output_throughput" if filled else "output_throughput",
        "goodput": "request_goodput",
        "cost": "usd_per_million_output_tokens",
        "energy": "joules_per_million_output_tokens",
        "latency": "mean_tpot_ms",
    }[objective]
    scale = 1e-6 if objective == "energy" else 1.0
    larger = objective in ("throughput", "goodput")
    return Goal(
        objective=objective,
        metric=metric,
        scale=scale,
        unit=_UNITS[objective],
        larger_is_better=larger,
        slo=slo,
        attainment=attainment,
    )


def parse_slo(text: str) -> dict[str, float]:
    """Give the limits in ``ttft_ms=500,tpot_ms=50``; `ScenarioError` names every faulty piece.

    >>> parse_slo("ttft_ms=500,tpot_ms=50")
    {'ttft_ms': 500.0, 'tpot_ms': 50.0}
    """
    keys = tuple(Objectives.model_fields)
    found: dict[str, float] = {}
    faults = []
    for piece in text.split(","):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            faults.append(f"must be KEY=MS,KEY=MS with keys {', '.join(keys)}, got '{piece.strip()}'")
        elif key not in keys:
            faults.append(f"no such limit, got '{key}'{did_you_mean(key, keys)}")
        elif key in found:
            faults.append(f"must name {key} once")
        elif (limit := _milliseconds(value)) is None:
            faults.append(f"{key} must be a number of ms above 0, got '{value}'")
        else:
            found[key] = limit
    if faults:
        raise ScenarioError("\n".join(f"--slo: {fault}" for fault in faults))
    return found


def _milliseconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


@dataclass(frozen=True)
class Rung:
    """A stage of successive halving: `replications` runs of each candidate, at most `at_most` candidates go on."""

    replications: int
    at_most: int


@dataclass(frozen=True)
class Plan:
    """The work of a search, settled before it began.

    `requests` counted in each run (None: as the scenario says), of `recorded` ones in the TraceSet. `share` is
    requests / recorded where every run draws that share of the recorded requests without replacement: intervals then
    also cover which requests happened to be recorded. `chosen_by`: ``clock`` where the first timing
    (`seconds_per_run`) chose it to fit into `budget_s` - another machine may choose another plan - or ``user``.
    `changed`: keys of the workload that the runs have otherwise than the scenario, and why. `cuts`: what the budget
    left out on the way; empty where everything planned was done.
    """

    requests: int | None
    recorded: int
    share: float | None
    rungs: tuple[Rung, ...]
    chosen_by: str
    budget_s: float
    predicted_s: float | None
    seconds_per_run: float | None
    changed: dict[str, str]
    cuts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A candidate and how it did.

    `overrides`: what it sets, by dotted keys of the scenario (None: left out). `value` is the objective over
    `replications` runs. `behind` is the paired difference to the best on the same seeds, as a share of the best's
    mean and with its sign turned so that below 0 is worse; in the final stage its interval is widened for the number
    of comparisons (Bonferroni), before it stands alone. `attainment`: mean share of requests within the SLO.
    `status`: ``best``, ``indistinct`` (interval of `behind` contains 0), ``worse``, ``left in rung i (why)``, or
    ``misses the SLO``.
    """

    name: str
    kind: str
    drafters: tuple[str, ...]
    overrides: dict[str, Any]
    value: Estimate
    behind: Estimate
    attainment: float | None
    replications: int
    status: str


@dataclass(frozen=True)
class Judgement:
    """How the winner does where it was not chosen: beside the best fixed length and no speculation, on fresh seeds.

    `how`: what was run, in words; `unit` of the three values. `over_baseline` and `over_fixed`: how many times better
    the winner is, above 1 being better also where small numbers are good; each interval by itself, none where it is
    compared with itself. `pays`: whether the interval of `over_baseline` lies above 1.
    """

    how: str
    unit: str
    best: Estimate
    best_fixed: Estimate
    baseline: Estimate
    over_baseline: Estimate
    over_fixed: Estimate
    pays: bool


@dataclass(frozen=True)
class Skipped:
    """A candidate that could not be run, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class OracleGap:
    """A bound that no engine reaches, on the same seeds.

    `reached`: the best as a share of the oracle (of their inverse where small numbers are good). `closed`: the share
    of the way from the best fixed length to the oracle that the best covers; undefined where the oracle is no better
    than the best fixed length. Its interval is by the delta method for a ratio of paired means.
    """

    name: str
    value: Estimate
    reached: Estimate
    closed: Estimate


@dataclass(frozen=True)
class SensitivityPoint:
    """The objective of one candidate relative to the best (1 is as good), on the seeds that all candidates share."""

    dimension: str
    series: str
    at: float
    ratio: Estimate
    is_best: bool


@dataclass(frozen=True)
class BatchLength:
    """Throughput with a draft length at a batch that is kept full, relative to no speculation there. One run each.

    `draft_tokens` counts without the bonus token; `chosen`: this length is the fastest at this batch.
    """

    drafter: str
    batch: int
    draft_tokens: int
    speedup: float
    chosen: bool


@dataclass(frozen=True)
class Export:
    """The best candidate that `engine` can express, in that engine's own words.

    `file`: name of the file in the result's folder (None: nothing to set); `content` its text; `arguments`: what to
    add to the engine's command line; `extra_files` by name. `behind` is the candidate's distance to the best, as in
    `Scored`. `source`: where the schema is documented.
    """

    engine: str
    candidate: str
    file: str | None
    content: str
    arguments: tuple[str, ...]
    extra_files: dict[str, str]
    behind: Estimate
    notes: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class TuneFindings(Record):
    """The answer of a search.

    `best` has the best mean among the feasible candidates of the final stage (`feasible` False: none was, and it has
    the highest attainment). `best_fixed` is the best single drafter at one fixed length, which always reaches the
    final stage; `baseline` runs without speculation. `runners_up` cannot be told apart from the best. `first_run` is
    the objective of the best on the scenario's own seed: what ``simulate`` gives for best.toml (None where the search
    ran under another load). All of these come from the runs that chose; `judged` is the result. `searched`: what load
    the search ran under, in words; empty where it is the scenario's own.
    """

    scenario: str
    verifier: str
    costs: str
    goal: Goal
    plan: Plan
    feasible: bool
    best: Scored
    best_fixed: Scored
    baseline: Scored
    runners_up: tuple[Scored, ...]
    candidates: tuple[Scored, ...]
    skipped: tuple[Skipped, ...]
    compared: int
    first_run: float | None
    judged: Judgement
    searched: str
    oracles: tuple[OracleGap, ...]
    sensitivity: tuple[SensitivityPoint, ...]
    batch_lengths: tuple[BatchLength, ...]
    exports: tuple[Export, ...]
    notes: tuple[str, ...]
    best_toml: str
    evidence: Evidence | None = None
    schema_version: int = 1
