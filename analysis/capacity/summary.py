"""From what every seed sustains to the capacity of a policy, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.capacity.findings import Needed, PolicyCapacity, RatePoint
from analysis.capacity.sustain import Sustained
from analysis.common.bootstrap import Estimate, number
from simulator.experiments.estimate import estimate


def policy_capacity(
    name: str,
    several: Sequence[Sustained],
    first: Sequence[Sustained] | None,
    replicas: int,
    size: int,
    load_rps: float | None,
    price: float | None,
) -> PolicyCapacity:
    """Sum up one policy over its seeds; `first` are those of the policy that it is compared with."""
    rates = [one.rate_rps / replicas for one in several]
    seen = [one.at for one in several if one.at is not None]
    judged = sum(one.judged for one in seen)
    rate = _estimate(rates, judged)
    ratio = None
    if first is not None and all(one.rate_rps > 0 for one in first):
        ratio = _estimate([b.rate_rps / a.rate_rps for a, b in zip(first, several, strict=True)], judged)
    failing = [one.failing for one in several]
    tokens = [one.output_tokens_per_s / replicas for one in seen]
    joules = [one.joules_per_million for one in seen if one.joules_per_million is not None]
    return PolicyCapacity(
        policy=name,
        rate_rps=rate,
        ratio=ratio,
        saturation_rps=_estimate([one.saturation_rps / replicas for one in several], judged),
        limited_by=max(dict.fromkeys(failing), key=failing.count) or "saturation",
        output_tokens_per_s=_estimate(tokens, judged),
        p99_ttft_ms=_estimate([one.p99_ttft_ms for one in seen], judged),
        p99_tpot_ms=_estimate([one.p99_tpot_ms for one in seen], judged),
        requests_in_system=_estimate([one.rate_rps / replicas * one.mean_e2el_s for one in seen], judged),
        usd_per_million_output_tokens=None
        if price is None or not tokens
        else _estimate([price * size / 3600 / one * 1e6 for one in tokens], judged),
        joules_per_million_output_tokens=_estimate(joules, judged) if len(joules) == len(seen) > 0 else None,
        needed=None if load_rps is None else needed(load_rps, rate, size),
        curve=_curve(several, replicas),
        extrapolated_share=number(max((p.extrapolated_share for one in several for p in one.curve), default=0.0))
        or 0.0,
        devices_per_replica=size,
    )


def _curve(several: Sequence[Sustained], replicas: int) -> tuple[RatePoint, ...]:
    """Give attainment and tails at every rate of the curve, which all seeds share."""
    reference = float(np.mean([one.saturation_rps for one in several]))
    points = []
    for probes in zip(*(one.curve for one in several), strict=True):
        judged = sum(p.judged for p in probes)

        def over(values: list[float], judged: int = judged) -> Estimate:
            return _estimate(values, judged)

        points.append(
            RatePoint(
                number(probes[0].rate_rps / replicas) or 0.0,
                number(probes[0].rate_rps / reference) or 0.0,
                over([p.attained["all"] for p in probes]),
                over([p.p99_ttft_ms for p in probes]),
                over([p.p99_tpot_ms for p in probes]),
            )
        )
    return tuple(points)


def needed(load_rps: float, rate: Estimate, size: int) -> Needed | None:
    """Give ceil(load / rate) replicas; None where a replica carries nothing."""
    if not rate.value:
        return None
    middle = math.ceil(load_rps / rate.value)
    low = math.ceil(load_rps / (rate.high or rate.value))
    high = math.ceil(load_rps / rate.low) if rate.low else None
    return Needed(load_rps, middle, low, high, middle * size, low * size, None if high is None else high * size)


def _estimate(values: Sequence[float], judged: int) -> Estimate:
    """Give the mean over replications with its t interval, no bound below zero; undefined where there is none."""
    if not values:
        return Estimate(None, None, None, judged)
    found = estimate(values)
    low = None if found.low is None else number(max(0.0, found.low))
    high = None if found.high is None else number(found.high)
    return Estimate(number(found.mean), low, high, judged)
