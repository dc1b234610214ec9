"""Successive halving on common random numbers: who is judged how, and who goes on.

After Jamieson and Talwalkar (2016): all candidates get few replications, those that go on get more. Unlike theirs, a
candidate is never given up on its rank alone while there is room: it leaves if it is shown to be worse than the
leader (the 95% interval of the paired difference lies below 0), or if more than the rung's `at_most` are left and it
is not among the best of them by its mean; a rule over several drafters also if it did the same as one of them. The
best fixed length and no speculation always go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.common.bootstrap import Estimate
from analysis.tuning.candidate import Candidate
from analysis.tuning.findings import Rung
from analysis.tuning.goal import Goal
from analysis.tuning.intervals import behind, interval
from analysis.tuning.runs import Runs
from calibration.common.arrays import Floats

_SLACK = 1e-9
"""Attainments closer than this are equal."""


@dataclass
class Judge:
    """Judges candidates of `runs` by `goal`. `wide`: see `intervals.widening`; `requests`: recorded ones."""

    runs: Runs
    goal: Goal
    wide: float
    requests: int

    @property
    def sign(self) -> int:
        """1 where large numbers are good."""
        return 1 if self.goal.larger_is_better else -1

    def values(self, candidate: Candidate, number: int) -> Floats:
        """Give the objective of the first `number` runs."""
        return self.runs.values(candidate, self.goal.value, number)

    def attainment(self, candidate: Candidate, number: int) -> Floats | None:
        """Give the share of requests within the objectives in every run; None where there are none."""
        if not self.goal.slo:
            return None
        return self.runs.values(candidate, _attained, number)

    def feasible(self, candidate: Candidate, number: int) -> bool:
        """Whether on average enough requests keep the objectives that are a constraint."""
        attained = self.attainment(candidate, number) if self.goal.constrained else None
        return attained is None or float(attained.mean()) >= self.goal.attainment - _SLACK

    def score(self, candidate: Candidate, number: int) -> tuple[bool, float]:
        """Give what candidates are ordered by, more is better: feasible ones by their mean, others by attainment."""
        if self.feasible(candidate, number):
            return True, self.sign * float(self.values(candidate, number).mean())
        attained = self.attainment(candidate, number)
        return False, float("nan") if attained is None else float(attained.mean())

    def order(self, candidates: Sequence[Candidate], number: int) -> list[Candidate]:
        """Give `candidates`, the best first; of equals the earlier."""
        scores = {c.name: self.score(c, number) for c in candidates}
        return sorted(candidates, key=lambda c: (not scores[c.name][0], -scores[c.name][1]))

    def behind(self, candidate: Candidate, leader: Candidate, number: int, comparisons: int = 1) -> Estimate:
        """Give how far `candidate` is behind `leader` over `number` paired seeds, as a share of the leader's mean."""
        mine, best = self.values(candidate, number), self.values(leader, number)
        if number > 1 and _certain(mine) and _certain(best):
            found = behind(mine[:1], best[:1], self.sign, self.wide, self.requests, 1)
            return found if found.value else Estimate(0.0, 0.0, 0.0, self.requests)
        return behind(mine, best, self.sign, self.wide, self.requests, comparisons)

    def shown_worse(self, candidate: Candidate, leader: Candidate, number: int, comparisons: int = 1) -> bool:
        """Whether `candidate` is shown to be worse: the interval lies below 0, or it misses the SLO for sure."""
        if self.feasible(leader, number) and self.misses(candidate, number):
            return True
        found = self.behind(candidate, leader, number, comparisons)
        if found.high is None:
            return found.value is not None and found.value < 0
        return found.high < 0

    def misses(self, candidate: Candidate, number: int) -> bool:
        """Whether the attainment lies below what is asked for, with its interval."""
        attained = self.attainment(candidate, number) if self.goal.constrained else None
        if attained is None:
            return False
        found = interval(attained, self.wide, self.requests)
        high = found.value if found.high is None else found.high
        return high is not None and high < self.goal.attainment - _SLACK

    def estimate(self, candidate: Candidate, number: int) -> Estimate:
        """Give the objective with its interval; without one where no two runs differ."""
        values = self.values(candidate, number)
        return interval(values[:1] if _certain(values) else values, self.wide, self.requests)


def _attained(summary: Mapping[str, Any]) -> float:
    return float(summary["slo_attainment"])


def _certain(values: Floats) -> bool:
    """Whether all runs give the same number, but for rounding."""
    return bool(np.allclose(values, values[0], rtol=1e-12, atol=0.0))


def best_of(judge: Judge, candidates: Sequence[Candidate], number: int) -> Candidate:
    """Give the best."""
    return judge.order(candidates, number)[0]


def ascend(
    judge: Judge,
    candidates: Sequence[Candidate],
    rung: Rung,
    number: int,
    spared: Callable[[Candidate], bool],
) -> tuple[list[Candidate], dict[str, str]]:
    """Give who goes on from a rung of `number` replications, and in what words each of the others leaves."""
    leader = best_of(judge, candidates, number)
    told: dict[str, str] = {}
    staying: list[Candidate] = []
    for candidate in judge.order(candidates, number):
        if candidate is not leader and not spared(candidate) and judge.shown_worse(candidate, leader, number):
            told[candidate.name] = "shown worse"
        elif (twin := _twin(judge, candidate, staying, number)) is not None:
            told[candidate.name] = f"does the same as {twin.name}"
        elif len(staying) >= rung.at_most and not spared(candidate):
            told[candidate.name] = f"not among the best {rung.at_most}"
        else:
            staying.append(candidate)
    return staying, told


def _twin(judge: Judge, candidate: Candidate, staying: Sequence[Candidate], number: int) -> Candidate | None:
    """Give the simpler candidate that `candidate`, a rule over several drafters, does the same as, run for run."""
    if len(candidate.drafters) < 2:
        return None
    mine = judge.values(candidate, number)
    alike = (one for one in staying if len(one.drafters) == 1)
    return next((one for one in alike if np.array_equal(judge.values(one, number), mine)), None)
