"""Successive halving on common random numbers: who is judged how, and who goes on.

After Jamieson and Talwalkar (2016): all candidates get few replications, those that go on get more. Unlike theirs, a
candidate is never given up on its rank alone while there is room: it leaves if it is shown to be worse than the
leader (the 95% interval of the paired difference lies below 0), or if more than the rung's `at_most` are left and it
is not among the best of them by its mean; a rule over several drafters also if it did the same as one of them. The
best fixed length and no speculation always go on.

What the answer is measured against: the oracles, and what lies around the best setting.

Intervals over replications that also cover, where they can, which requests happened to be recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.tuning.findings import Goal, OracleGap, Rung, SensitivityPoint
from analysis.tuning.runs import Runs
from analysis.tuning.space import Candidate
from calibration.common.arrays import Floats

METHOD = "Student's t over replications on common random numbers"


def widening(share: float | None) -> float:
    """Give w: the variance of a mean over R replications is that of one replication times (1 / R + w).

    Each replication serves a share f of the recorded requests, drawn without replacement. If S^2 / n is the variance
    of a mean of n requests, such a replication has S^2 / n (1 - f), and the mean over all recorded requests, as a
    sample of those to come, S^2 / N = S^2 / n (1 - f) * f / (1 - f): w = f / (1 - f). With halves w is 1: balanced
    half samples (McCarthy 1969), delete-d jackknife (Shao and Wu 1989). Approximate for ratios of means. 0 where
    `share` is None: the interval then is for these requests alone.
    """
    return 0.0 if share is None else share / (1 - share)


def interval(values: Floats, wide: float, requests: int, comparisons: int = 1) -> Estimate:
    """Give the mean of `values`, one a replication, with its interval at level 1 - 0.05 / `comparisons`."""
    from scipy.special import stdtrit

    count = len(values)
    mean = float(values.mean())
    if count < 2:
        return Estimate(number(mean), None, None, requests)
    spread = 0.0 if bool((values == values[0]).all()) else float(values.std(ddof=1))
    quantile = float(stdtrit(count - 1, 1 - (1 - LEVEL) / (2 * comparisons)))
    reach = quantile * spread * math.sqrt(1 / count + wide)
    return Estimate(number(mean), number(mean - reach), number(mean + reach), requests)


def behind(values: Floats, best: Floats, sign: int, wide: float, requests: int, comparisons: int) -> Estimate:
    """Give the paired difference to `best` as a share of its mean; below 0 is worse (`sign` -1: small is good)."""
    scale = abs(float(best.mean())) or 1.0
    return interval(sign * (values - best) / scale, wide, requests, comparisons)


def ratio_of_means(above: Floats, below: Floats, wide: float, requests: int) -> Estimate:
    """Give mean(above) / mean(below) of paired values, interval by the delta method; undefined for below <= 0."""
    bottom = float(below.mean())
    if bottom <= 0:
        return Estimate(None, None, None, requests)
    ratio = float(above.mean()) / bottom
    rest = interval(np.asarray((above - ratio * below) / bottom), wide, requests)
    if rest.low is None or rest.high is None or rest.value is None:
        return Estimate(number(ratio), None, None, requests)
    return Estimate(
        number(ratio), number(ratio + rest.low - rest.value), number(ratio + rest.high - rest.value), requests
    )


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


def oracle_gaps(
    judge: Judge, bounds: Sequence[Candidate], best: Candidate, fixed: Candidate
) -> tuple[OracleGap, ...]:
    """Give the distance of `best` to each kind of oracle among `bounds`, the better one of each kind.

    The tightest bound comes last. Choosing among drafters is planned for a batch of one, so that with large batches
    its oracle may lie below that of one drafter's lengths.
    """
    found = []
    for kind in dict.fromkeys(bound.kind for bound in bounds):
        mine = [bound for bound in bounds if bound.kind == kind]
        shared = judge.runs.common([*mine, best, fixed])
        top = max(mine, key=lambda bound: judge.sign * float(judge.values(bound, shared).mean()))
        found.append(_gap(judge, top, best, fixed, shared))
    return tuple(sorted(found, key=lambda gap: -judge.sign * (gap.value.value or 0.0)))


def _gap(judge: Judge, bound: Candidate, best: Candidate, fixed: Candidate, shared: int) -> OracleGap:
    oracle, mine, plain = (judge.values(one, shared) for one in (bound, best, fixed))
    above, below = (mine, oracle) if judge.goal.larger_is_better else (oracle, mine)
    return OracleGap(
        bound.name,
        judge.estimate(bound, shared),
        ratio_of_means(above, below, judge.wide, judge.requests),
        ratio_of_means(judge.sign * (mine - plain), judge.sign * (oracle - plain), judge.wide, judge.requests),
    )


def sensitivity(
    judge: Judge, candidates: Sequence[Candidate], best: Candidate, shared: int
) -> tuple[SensitivityPoint, ...]:
    """Give the objective of all candidates that lie on an axis, relative to `best`, over the `shared` first seeds.

    Above 1 is better than the best, whatever the objective.
    """
    top = judge.values(best, shared)
    return tuple(
        SensitivityPoint(
            candidate.axis,
            candidate.series,
            float(candidate.at),
            _relative(judge, judge.values(candidate, shared), top),
            candidate.name == best.name,
        )
        for candidate in candidates
        if candidate.axis is not None and candidate.at is not None
    )


def _relative(judge: Judge, values: Floats, top: Floats) -> Estimate:
    """Give the mean of `values` over that of `top` (turned over where small is good), from paired differences."""
    scale = abs(float(top.mean())) or 1.0
    share = np.asarray(1 + judge.sign * (values - top) / scale)
    found = interval(share, judge.wide, judge.requests)
    return Estimate(number(found.value), found.low, found.high, judge.requests)
