"""Tuning is judged where it did not choose: fresh seeds, null worlds, and the capacity plan for open loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from scenarios import DRAFT, LINEAR, random_runs
from several import several

from analysis.capacity import Objective, plan_capacity
from analysis.tuning import TuneSettings, tune
from analysis.tuning.findings import make_goal
from analysis.tuning.halving import Judge, best_of
from analysis.tuning.judging import JUDGED_REQUESTS, JUDGED_SEEDS, judge_on_fresh_seeds
from analysis.tuning.runs import FIRST_FRESH
from analysis.tuning.space import Candidate
from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator.experiments.replicate import replication_seeds
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario


def given(workload: dict[str, Any], **more: Any) -> Scenario:
    return parse_scenario(
        {
            "name": "asked",
            "seed": 3,
            "workload": workload,
            "costs": {"verifier": LINEAR, "drafter": DRAFT},
            "engine": {"max_num_seqs": 4},
            **more,
        }
    )


def world(alpha: float) -> TraceSet:
    rng = np.random.default_rng(5)
    return several({"lookup": [random_runs(rng, 24, alpha=alpha) for _ in range(24)]})


CLOSED = {"kind": "closed", "concurrency": 2, "requests": 8}
QUICK: dict[str, Any] = {"replications": 3, "workers": 1, "draft_tokens": (1, 4)}


class Drawn:
    """Stands for the runs of a search: the objective of every candidate is drawn, its mean as given."""

    def __init__(self, rng: Generator, means: dict[str, float]) -> None:
        self._rng, self._means = rng, means
        self._values: dict[tuple[str, int], float] = {}
        self._shared: dict[int, float] = {}

    def _value(self, name: str, replication: int) -> float:
        if (name, replication) not in self._values:
            shared = self._shared.setdefault(replication, self._rng.normal(0, 0.05))
            self._values[name, replication] = self._means[name] * (1 + shared + self._rng.normal(0, 0.05))
        return self._values[name, replication]

    def values(self, candidate: Candidate, read: Any, number: int) -> np.ndarray:
        return np.array([self._value(candidate.name, r) for r in range(number)])

    def fill_fresh(self, stage: str, candidates: list[Candidate], number: int) -> None:
        pass

    def fresh(self, candidate: Candidate, read: Any, number: int) -> np.ndarray:
        return np.array([self._value(candidate.name, FIRST_FRESH + r) for r in range(number)])


def judged(rng: Generator, means: dict[str, float], seeds: int = 8) -> tuple[str, bool, bool]:
    """Choose the best of `means` as a search does, and judge it; also whether the search's own runs say so."""
    candidates = {name: Candidate(name, "kind", ("lookup",), {}) for name in means}
    runs = Drawn(rng, means)
    judge = Judge(runs, make_goal(given(CLOSED), "throughput"), 0.0, 100)  # type: ignore[arg-type]
    best = best_of(judge, list(candidates.values()), seeds)
    found = judge_on_fresh_seeds(judge, best, candidates["fixed"], candidates["none"], seeds)
    own = judge.behind(candidates["none"], best, seeds)
    return best.name, found.pays, own.high is not None and own.high < 0


NAMES = ["none", "fixed", *(f"policy {i}" for i in range(30))]


def test_a_winner_of_many_that_do_not_pay_is_rarely_said_to_pay() -> None:
    """All are as good as none: the runs that chose say "better" in a fifth of searches, fresh ones hardly ever."""
    rng = np.random.default_rng(0)
    found = [judged(rng, dict.fromkeys(NAMES, 1.0)) for _ in range(400)]
    assert np.mean([pays for _, pays, _ in found]) <= 0.05  # nominal 2.5% on this side, and 3 standard errors
    assert np.mean([own for _, _, own in found]) > 0.12


def test_a_true_winner_is_still_found() -> None:
    """One policy gains 15%, replications vary by 5 to 7%: found and said to pay in nearly all of 100 searches."""
    rng = np.random.default_rng(1)
    found = [judged(rng, dict.fromkeys(NAMES, 1.0) | {"policy 7": 1.15}) for _ in range(100)]
    assert np.mean([name == "policy 7" and pays for name, pays, _ in found]) > 0.8


def test_fresh_seeds_are_not_those_of_the_search() -> None:
    scenario = given(CLOSED)
    found = tune(scenario, TuneSettings(**QUICK), traces=world(0.9))
    seeds = replication_seeds(scenario.seed, FIRST_FRESH + 8)
    assert len(set(seeds)) == len(seeds)
    assert found.plan.rungs[-1].replications < FIRST_FRESH
    assert found.judged.how == "3 runs on fresh seeds, held out of the search"
    assert found.judged.best != found.best.value  # not the runs that chose
    assert found.judged.over_baseline.value is not None
    assert found.judged.over_baseline.value == pytest.approx(
        (found.judged.best.value or 0) / (found.judged.baseline.value or 1), rel=1e-5
    )
    assert found.searched == ""
    assert found.first_run is not None


POISSON = {"kind": "poisson", "rate_rps": 0.02, "requests": 60}
SLO = {"e2el_ms": 25_000.0}


@pytest.mark.parametrize(("alpha", "pays"), [(0.95, True), (0.02, False)])
@pytest.mark.filterwarnings("ignore::calibration.common.errors.ConvergenceWarning")
def test_tune_and_capacity_agree(alpha: float, pays: bool) -> None:
    """Far below saturation, where goodput is the load whatever is chosen, the sustained rate is the answer."""
    scenario, traces = given(POISSON, slo=SLO), world(alpha)
    found = tune(scenario, TuneSettings(objective="goodput", **QUICK), traces=traces)
    assert found.judged.pays == pays
    assert "just above what no speculation and one fixed length sustain" in found.searched
    assert (found.judged.baseline.value or 0) > 10 * POISSON["rate_rps"]
    answer = parse_scenario(_table(found.best_toml))
    assert answer.workload == scenario.workload  # the scenario to go on with keeps the load that was asked about
    plan = plan_capacity(
        answer if answer.speculates else _fixed(scenario),
        slo=Objective(None, None, SLO["e2el_ms"]),
        requests=JUDGED_REQUESTS,
        replications=JUDGED_SEEDS,
        traces=traces,
        workers=1,
    )
    none, *rest = plan.policies
    for mine, theirs in (
        (found.judged.baseline, none.rate_rps),
        (found.judged.best, (rest if pays else [none])[0].rate_rps),
    ):
        assert None not in (mine.low, mine.high, theirs.low, theirs.high)
        assert mine.low <= theirs.high
        assert theirs.low <= mine.high


def _fixed(scenario: Scenario) -> Scenario:
    changes = {"drafter": {"name": "lookup"}, "stopping": {"policy": "fixed", "draft_tokens": 1}}
    return parse_scenario(scenario.model_dump(mode="json", exclude_unset=True) | changes)


def _table(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def test_an_open_loop_fixes_throughput_so_a_full_engine_is_asked() -> None:
    found = tune(given(POISSON), TuneSettings(**QUICK), traces=world(0.9))
    assert "never idle" in found.searched
    assert (found.judged.baseline.value or 0) > 24 * POISSON["rate_rps"] * 10


def test_latency_is_judged_at_the_given_rate() -> None:
    found = tune(given(POISSON), TuneSettings(objective="latency", **QUICK), traces=world(0.9))
    assert found.searched == ""
    assert found.goal.metric == "mean_tpot_ms"
    assert found.judged.pays
    assert (found.judged.best.value or 0) < (found.judged.baseline.value or 0)
    assert (found.judged.over_baseline.value or 0) > 1


def test_open_loops_are_never_shortened() -> None:
    clock = iter(np.arange(0, 1e6, 50.0))
    found = tune(
        given({**POISSON, "requests": 90}),
        TuneSettings(objective="latency", workers=1, draft_tokens=(2,), budget_s=1.0),
        traces=world(0.9),
        clock=lambda: float(next(clock)),
    )
    assert found.plan.requests == 90
    assert not any("shortened" in why for why in found.plan.changed.values())


def test_goodput_of_arrivals_without_one_rate_is_refused() -> None:
    load = {"kind": "piecewise", "rates": [[0.0, 1.0], [10.0, 2.0]], "requests": 20}
    with pytest.raises(ScenarioError, match=r"must be poisson or gamma, got 'piecewise'; --objective latency"):
        tune(given(load, slo=SLO), TuneSettings(objective="goodput", **QUICK), traces=world(0.9))
