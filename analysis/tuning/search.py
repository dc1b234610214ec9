"""The search: fixed lengths, then policies for the drafters that lead, then halving, then the distance to the oracle.

Common random numbers: replication r of every candidate has the same arrivals, the same order of requests and the
same luck, so that differences are paired. The work is planned before it begins (`plan`); what the budget cuts on the
way is told in the findings, never silently.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.tuning.findings import (
    ATTAINMENT,
    BatchLength,
    Goal,
    Judgement,
    Plan,
    Scored,
    Skipped,
    TuneFindings,
    make_goal,
)
from analysis.tuning.halving import Judge, ascend, best_of, interval, oracle_gaps, sensitivity, widening
from analysis.tuning.hybrids import hybrids
from analysis.tuning.judging import (
    AS_GIVEN,
    SUSTAINED,
    Finalists,
    judge_on_fresh_seeds,
    judge_sustained,
    requests_of,
    searched,
    setting_of,
)
from analysis.tuning.plan import plan_by_clock, plan_by_user
from analysis.tuning.runs import LEAST, Runs, batch_lengths, batch_sizes, grid, table
from analysis.tuning.space import (
    Base,
    Candidate,
    budgets,
    by_batch,
    fixed,
    fixed_lengths,
    make_base,
    neighbours,
    nothing,
    oracles,
    policies,
    routings,
)
from calibration.common.errors import ScenarioError
from calibration.common.progress import StageProgress
from calibration.traces import TraceSet
from simulator.playback.replay import select_sequences
from simulator.results.evidence import Evidence
from simulator.running.run import read_traces
from simulator.scenario.scenario import Objectives, Scenario

DRAFT_TOKENS = (1, 2, 4, 8)
BUDGET_S = 100.0
LEADERS = 2
"""Drafters that get policies: the best ones at a fixed length."""
_SHARES = (0.35, 0.65, 0.75, 0.88, 1.0)
"""Of the budget, when each stage must be done: fixed lengths, policies, refinement, second rung, final stage."""


@dataclass(frozen=True)
class TuneSettings:
    """What to search for and how. Lengths count without the bonus token.

    `slo` replaces the limits of the scenario key by key; `price_per_hour` is for one replica. `token_budgets` and
    `max_num_seqs` are values of ``engine.max_num_batched_tokens`` and ``max_num_seqs`` to try with the best
    candidate. `replications` of the final stage: given, no clock decides anything; else the plan follows the first
    timing.
    """

    objective: str = "throughput"
    slo: dict[str, float] = field(default_factory=dict)
    attainment: float = ATTAINMENT
    price_per_hour: float | None = None
    drafters: tuple[str, ...] | None = None
    draft_tokens: tuple[int, ...] = DRAFT_TOKENS
    token_budgets: tuple[int, ...] = ()
    max_num_seqs: tuple[int, ...] = ()
    replications: int | None = None
    budget_s: float = BUDGET_S
    workers: int = 2

    def __post_init__(self) -> None:
        """Refuse what no search can be made of."""
        for option, values in (
            ("--draft-tokens", self.draft_tokens),
            ("--token-budgets", self.token_budgets),
            ("--max-num-seqs", self.max_num_seqs),
        ):
            if any(value < 1 for value in values) or len(set(values)) != len(values):
                raise ScenarioError(f"{option}: must be different whole numbers of at least 1, got {list(values)}")
        if not self.draft_tokens:
            raise ScenarioError("--draft-tokens: must have at least one length")
        if not self.budget_s > 0:
            raise ScenarioError(f"--budget-s: must be above 0, got {self.budget_s:g}")
        if self.price_per_hour is not None and not self.price_per_hour > 0:
            raise ScenarioError(f"--price-per-hour: must be above 0, got {self.price_per_hour:g}")


def tune(
    scenario: Scenario,
    settings: TuneSettings | None = None,
    *,
    traces: TraceSet | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: StageProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuneFindings:
    """Find the best settings for `scenario`, whose own drafter and stopping policy are not used.

    `traces` replaces the TraceSet that it names; `store` keeps finished runs for a search that is interrupted;
    `progress` hears (stage, runs done, runs in all). With equal plans the answer is the same on every machine and
    for any number of workers.

    Raises `ScenarioError` for settings that the scenario cannot answer, and where nothing can be run.
    """
    settings = settings or TuneSettings()
    began = clock()
    recorded = traces if traces is not None else read_traces(scenario)
    priced = _priced(scenario, settings)
    goal = make_goal(priced, settings.objective, settings.attainment)
    load, told = priced, ""
    setting = setting_of(priced, settings.objective)
    if setting != AS_GIVEN:
        base = make_base(priced, recorded, settings.drafters, _tables(priced, settings))
        known = select_sequences(recorded, domains=priced.traces.domains, drafter=base.names).ids
        middle = sorted(settings.draft_tokens)[len(settings.draft_tokens) // 2]
        pilot = base.make(fixed(base, base.names[0], middle).overrides)
        number = requests_of(priced, known)
        load, told = searched(
            scenario=priced,
            setting=setting,
            pilot=pilot,
            requests=number,
            attainment=settings.attainment,
            traces=recorded,
            workers=settings.workers,
        )
        objective = "goodput" if setting == SUSTAINED else settings.objective
        goal = make_goal(load, objective, settings.attainment)
    search = _Search(
        scenario=load,
        settings=settings,
        goal=goal,
        recorded=recorded,
        given=traces,
        store=store,
        progress=progress,
        clock=clock,
        began=began,
    )
    search.origin, search.setting, search.searched = priced, setting, told
    return search.run()


def _priced(scenario: Scenario, settings: TuneSettings) -> Scenario:
    """Give the scenario with the limits and the price of the settings."""
    update: dict[str, Any] = {}
    if settings.slo:
        known = {} if scenario.slo is None else scenario.slo.model_dump(exclude_none=True)
        update["slo"] = Objectives(**known | settings.slo)
    if settings.price_per_hour is not None:
        replicas = sum(replica.count for replica in scenario.replica) if scenario.replica else 1
        fleet = settings.price_per_hour * replicas
        update["costs"] = scenario.costs.model_copy(update={"usd_per_hour": fleet})
    return scenario.model_copy(update=update)


def _tables(scenario: Scenario, settings: TuneSettings) -> dict[str, Any]:
    """Give what the settings change in the tables of the scenario."""
    told: dict[str, Any] = {}
    if settings.slo and scenario.slo is not None:
        told["slo"] = scenario.slo.model_dump(exclude_none=True)
    if settings.price_per_hour is not None:
        told["costs.usd_per_hour"] = scenario.costs.usd_per_hour
    return told


class _Search:
    """One search, stage by stage."""

    def __init__(
        self,
        scenario: Scenario,
        settings: TuneSettings,
        goal: Goal,
        recorded: TraceSet,
        given: TraceSet | None,
        store: str | os.PathLike[str] | None,
        progress: StageProgress | None,
        clock: Callable[[], float],
        began: float,
    ) -> None:
        self.scenario, self.settings, self.goal, self.traces = scenario, settings, goal, recorded
        self.clock, self.began = clock, began
        extra = _tables(scenario, settings)
        base = make_base(scenario, recorded, settings.drafters, extra)
        self.served = select_sequences(recorded, domains=scenario.traces.domains, drafter=base.names).ids
        number = len(self.served)
        self.plan, overrides = self._planned(base, number)
        self.base = make_base(scenario, recorded, settings.drafters, extra | overrides)
        self.runs = Runs(self.base, given, settings.workers, store, progress, clock)
        self.judge = Judge(self.runs, goal, widening(self.plan.share), number)
        self.baseline = nothing(self.base)
        self.origin, self.setting, self.searched = scenario, AS_GIVEN, ""
        self.left: dict[str, str] = {}
        self.cuts: list[str] = []
        self.lengths: tuple[BatchLength, ...] = ()

    def _planned(self, base: Base, number: int) -> tuple[Plan, dict[str, Any]]:
        settings = self.settings
        if settings.replications is not None:
            plan, length = plan_by_user(self.scenario, number, settings.replications, settings.budget_s)
            return plan, length.overrides

        def probes(overrides: Mapping[str, Any]) -> list[Scenario]:
            middle = sorted(settings.draft_tokens)[len(settings.draft_tokens) // 2]
            return [base.make(fixed(base, name, middle).overrides | dict(overrides)) for name in base.names[:2]]

        plan, length = plan_by_clock(
            self.scenario,
            probes,
            number,
            1 + len(base.names) * len(settings.draft_tokens),
            workers=settings.workers,
            budget_s=settings.budget_s,
            clock=self.clock,
            run=self._timed,
        )
        return plan, length.overrides

    def _timed(self, scenario: Scenario) -> Any:
        """Run `scenario` on the traces at hand."""
        from simulator.experiments.pool import run_one

        return run_one(scenario, self.traces)

    def _until(self, stage: int) -> float | None:
        """Give the instant at which `stage` must be done; None where the user fixed the replications."""
        if self.settings.replications is not None:
            return None
        return self.began + _SHARES[stage] * self.settings.budget_s

    def _fill(self, stage: str, index: int, candidates: Sequence[Candidate], replications: int) -> list[Candidate]:
        """Run `candidates`; note what the budget cut."""
        ready = self.runs.fill(stage, candidates, replications, self._until(index))
        if ready and (made := self.runs.common(ready)) < replications:
            self.cuts.append(f"{stage}: {made} of {replications} replications")
        return ready

    def run(self) -> TuneFindings:
        """Search; no worker process outlives it."""
        with self.runs:
            return self._run()

    def _run(self) -> TuneFindings:
        first, second, last = self.plan.rungs
        tried = self._screen(first.replications)
        shared = self.runs.common(tried)
        refined = self._fill("refine", 2, self._refined(tried, shared), first.replications)
        tried += refined
        shared = self.runs.common(tried)
        staying = self._ascend(1, tried, shared)
        staying = self._fill("second rung", 3, staying, second.replications)
        staying = self._ascend(2, staying, self.runs.common(staying))
        number = self._last(staying, last.replications)
        best = best_of(self.judge, staying, number)
        return self._findings(tried, staying, best, number, shared)

    def _screen(self, replications: int) -> list[Candidate]:
        """Run no speculation and every fixed length, then the policies for the drafters that lead."""
        lengths = self.settings.draft_tokens
        plain = self._fill("fixed lengths", 0, [self.baseline, *fixed_lengths(self.base, lengths)], replications)
        if self.baseline not in plain:
            raise self.runs.fault(self.baseline)
        alone = [candidate for candidate in plain if candidate.fixed]
        if not alone:
            raise self.runs.fault(fixed(self.base, self.base.names[0], lengths[0]))
        leaders = self._leaders(alone, self.runs.common(plain))
        longest = max(lengths)
        top = self._gridded(leaders)
        several = [
            one for name, best in leaders[:LEADERS] for one in policies(self.base, self.traces, name, best, longest)
        ]
        several += routings(self.base, self.traces, leaders)
        sizes = batch_sizes(self.runs.scenario(self.baseline))
        if sizes:
            self.runs.fill("batch sizes", grid(self.base, top, lengths, sizes), 1)
            self.lengths = batch_lengths(self.runs, self.base, top, lengths, sizes)
        rows = [(name, table(self.lengths, name)) for name in top]
        several += [by_batch(self.base, name, found) for name, found in rows if len(found) > 1]
        several += hybrids(self.base, self.traces, self.served, leaders, longest, self.lengths)
        return plain + self._fill("policies", 1, several, replications)

    def _gridded(self, leaders: Sequence[tuple[str, int]]) -> list[str]:
        """Give the drafters whose lengths by batch size are found: the leading ones, a lookup and a model if any."""
        names = [name for name, _ in leaders]
        given = {info.name for info in self.traces.manifest.drafters if info.deterministic}
        kinds = [next((n for n in names if (n in given) is copies), None) for copies in (True, False)]
        return list(dict.fromkeys([*names[:1], *(name for name in kinds if name), *names[1:]]))[:LEADERS]

    def _leaders(self, alone: Sequence[Candidate], shared: int) -> list[tuple[str, int]]:
        """Give every drafter with its best fixed length, the best drafter first."""
        found: dict[str, int] = {}
        for candidate in self.judge.order(alone, shared):
            found.setdefault(candidate.drafters[0], int(candidate.at or 0))
        return list(found.items())

    def _refined(self, tried: Sequence[Candidate], shared: int) -> list[Candidate]:
        """Give candidates between those tried: around the best of all, around the best fixed length, and budgets."""
        lengths = self.settings.draft_tokens
        best = best_of(self.judge, tried, shared)
        alone = best_of(self.judge, [c for c in tried if c.fixed], shared)
        found = [*neighbours(self.base, alone, lengths, max(lengths))]
        if best is not alone:
            found += neighbours(self.base, best, lengths, max(lengths))
        return found + budgets(best, self.settings.token_budgets, self.settings.max_num_seqs)

    def _ascend(self, index: int, candidates: Sequence[Candidate], shared: int) -> list[Candidate]:
        """Let the candidates of rung `index` go on, or leave."""
        alone = best_of(self.judge, [c for c in candidates if c.fixed], shared)
        spared = {self.baseline.name, alone.name}
        staying, told = ascend(self.judge, candidates, self.plan.rungs[index - 1], shared, lambda c: c.name in spared)
        self.left |= {name: f"left in rung {index} ({why})" for name, why in told.items()}
        return staying

    def _last(self, staying: Sequence[Candidate], replications: int) -> int:
        """Run the final stage, and beside it the oracles; give the replications that all have."""
        top = list(dict.fromkeys(c.drafters[0] for c in staying if c.fixed))[:LEADERS]
        self.bounds = [*oracles(self.base, top)]
        ready = self._fill("final stage", 4, [*staying, *self.bounds], replications)
        self.bounds = [bound for bound in self.bounds if bound in ready]
        return self.runs.common(staying)

    def _findings(
        self, tried: Sequence[Candidate], staying: Sequence[Candidate], best: Candidate, number: int, shared: int
    ) -> TuneFindings:
        """Put the answer together."""
        alone = best_of(self.judge, [c for c in staying if c.fixed], number)
        order = self.judge.order(staying, number)
        gone = [c for c in tried if c not in staying]
        final = {c.name: self._scored(c, best, number, len(staying) - 1) for c in order}
        final |= {c.name: self._scored(c, best, min(self.runs.count(c), number), 1) for c in gone}
        judged = self._judged(best, alone)
        self.runs.retell()
        scenario = self._answer(best)
        provenance = self.runs.summary(best)["provenance"]
        return TuneFindings(
            scenario=self.scenario.name,
            verifier=provenance["verifier"],
            costs=provenance["costs"],
            goal=self.goal,
            plan=dataclasses.replace(self.plan, cuts=tuple(self.cuts)),
            feasible=self.judge.feasible(best, number),
            best=final[best.name],
            best_fixed=final[alone.name],
            baseline=final[self.baseline.name],
            runners_up=tuple(final[c.name] for c in order if final[c.name].status == "indistinct"),
            candidates=tuple(final.values()),
            skipped=tuple(Skipped(name, reason) for name, reason in self.runs.skipped.items()),
            compared=len(staying) - 1,
            first_run=None if self.searched else self.goal.value(self.runs.summary(best)),
            judged=judged,
            searched=self.searched,
            oracles=oracle_gaps(self.judge, self.bounds, best, alone),
            sensitivity=sensitivity(self.judge, tried, best, min(shared, number)),
            batch_lengths=self.lengths,
            exports=(),
            notes=tuple(self._notes(best, number)),
            best_toml=scenario.to_toml(),
            evidence=Evidence.of(self.runs.summary(one)["provenance"] for one in (best, alone)),
        )

    def _answer(self, candidate: Candidate) -> Scenario:
        """Give the scenario of `candidate` under the workload that was asked about."""
        if not self.searched:
            return self.runs.scenario(candidate)
        extra = _tables(self.origin, self.settings)
        return make_base(self.origin, self.traces, self.settings.drafters, extra).make(candidate.overrides)

    def _judged(self, best: Candidate, alone: Candidate) -> Judgement:
        """Judge the winner where it was not chosen."""
        if self.setting == SUSTAINED:
            winner = self._answer(best) if best is not self.baseline else None
            finalists = Finalists(winner, self._answer(alone))
            slo, share = self.origin.slo, self.settings.attainment
            return judge_sustained(finalists, self.goal, slo, share, self.traces, self.settings.workers)
        number = max(self.plan.rungs[-1].replications, LEAST)
        return judge_on_fresh_seeds(self.judge, best, alone, self.baseline, number)

    def _scored(self, candidate: Candidate, best: Candidate, number: int, comparisons: int) -> Scored:
        gap = self.judge.behind(candidate, best, number, max(1, comparisons))
        attained = self.judge.attainment(candidate, number)
        return Scored(
            name=candidate.name,
            kind=candidate.kind,
            drafters=candidate.drafters,
            overrides=candidate.overrides,
            value=self.judge.estimate(candidate, number),
            behind=gap,
            attainment=None if attained is None else interval(attained, 0.0, self.judge.requests).value,
            replications=number,
            status=self._status(candidate, best, number, max(1, comparisons)),
        )

    def _status(self, candidate: Candidate, best: Candidate, number: int, comparisons: int) -> str:
        if candidate is best:
            return "best"
        if candidate.name in self.left:
            return self.left[candidate.name]
        if self.judge.feasible(best, number) and self.judge.misses(candidate, number):
            return "misses the SLO"
        return "worse" if self.judge.shown_worse(candidate, best, number, comparisons) else "indistinct"

    def _notes(self, best: Candidate, number: int) -> list[str]:
        """Say what the reader of the numbers must know."""
        notes = []
        if not self.base.shared:
            notes.append(
                f"drafters were recorded on different requests; only the {self.plan.recorded} that all of them have "
                "are served"
            )
        if self.plan.share is None:
            notes.append("intervals are for these requests; they do not cover which requests were recorded")
        if not self.judge.feasible(best, number):
            notes.append(
                f"no candidate keeps the SLO for {self.goal.attainment:.0%} of the requests; the best is the "
                "one that keeps it most often"
            )
        if best.kind == "specdec++":
            notes.append("SpecDec++ was fitted to the recording that it is judged on")
        values = self.judge.values(best, number)
        if number > 1 and bool((values == values[0]).all()):
            notes.append("all replications are the same, nothing in the runs is random: there are no intervals")
        return notes
