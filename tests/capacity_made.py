"""A capacity plan made by hand, for tests of what reads one."""

from __future__ import annotations

from analysis.capacity import CapacityFindings, Needed, Objective, PolicyCapacity, RatePoint
from analysis.capacity.findings import LengthTrial
from analysis.common.bootstrap import Estimate


def about(value: float, requests: int = 1000) -> Estimate:
    """A value with an interval of a tenth to either side."""
    return Estimate(value, 0.9 * value, 1.1 * value, requests)


def made_policy(name: str, rate: float, *, first: bool = False, limited_by: str = "ttft") -> PolicyCapacity:
    """One policy that sustains `rate` requests a second."""
    return PolicyCapacity(
        policy=name,
        rate_rps=about(rate),
        ratio=None if first else about(rate / 2.0),
        saturation_rps=about(2 * rate),
        limited_by=limited_by,
        output_tokens_per_s=about(50 * rate),
        p99_ttft_ms=about(480.0),
        p99_tpot_ms=about(31.0),
        requests_in_system=about(3 * rate),
        usd_per_million_output_tokens=about(1.25),
        joules_per_million_output_tokens=about(3.6e6),
        needed=Needed(40.0, round(40 / rate), round(36 / rate), round(45 / rate), 2 * round(40 / rate), 30, 50),
        curve=tuple(
            RatePoint(share * 2 * rate, share, about(1 - share / 3), about(300 + 900 * share), about(20 + 30 * share))
            for share in (0.3, 0.5, 0.75, 1.0)
        ),
        extrapolated_share=0.05,
    )


def made_capacity() -> CapacityFindings:
    """Two policies; speculation sustains 3 requests a second, and 2 without it."""
    return CapacityFindings(
        name="chat at noon",
        created="2026-01-02T00:00:00+00:00",
        verifier="large",
        device="H100",
        costs="roofline",
        acceptance="measured",
        arrivals="Poisson",
        objective=Objective(500.0, 40.0, None),
        policies=(made_policy("no speculation", 2.0, first=True), made_policy("four tokens", 3.0)),
        replicas=1,
        devices_per_replica=2,
        load_rps=40.0,
        usd_per_device_hour=4.0,
        energy_counts="device energy",
        replications=5,
        requests_per_run=500,
        warmup_share=0.2,
        tail_share=0.1,
        tolerance=0.02,
        trials=(LengthTrial(250, 3.2), LengthTrial(500, 3.1)),
        stable=True,
        stability=0.03,
        warnings=(),
    )
