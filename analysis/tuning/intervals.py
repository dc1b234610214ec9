"""Intervals over replications that also cover, where they can, which requests happened to be recorded."""

from __future__ import annotations

import math

import numpy as np

from analysis.common.bootstrap import LEVEL, Estimate, number
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
