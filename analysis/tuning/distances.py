"""What the answer is measured against: the oracles, and what lies around the best setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.common.bootstrap import Estimate, number
from analysis.tuning.candidate import Candidate
from analysis.tuning.findings import OracleGap, SensitivityPoint
from analysis.tuning.halving import Judge
from analysis.tuning.intervals import interval, ratio_of_means
from calibration.common.arrays import Floats


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
