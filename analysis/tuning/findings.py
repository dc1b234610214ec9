"""What a search found: the best setting, those that come as close, and how far from the oracle. Plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from analysis.common.bootstrap import Estimate
from analysis.tuning.goal import Goal
from simulator.results.evidence import Evidence


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
    mean and with its sign turned so that below 0 is worse; in the last rung its interval is widened for the number of
    comparisons (Bonferroni), before it stands alone. `attainment`: mean share of requests within the SLO. `status`:
    ``best``, ``indistinct`` (interval of `behind` contains 0), ``worse``, ``left in rung i (why)``, or
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
class TuneFindings:
    """The answer of a search.

    `best` has the best mean among the feasible candidates of the last rung (`feasible` False: none was, and it has
    the highest attainment). `best_fixed` is the best single drafter at one fixed length, which always reaches the
    last rung; `baseline` runs without speculation. `runners_up` cannot be told apart from the best. `first_run` is
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
