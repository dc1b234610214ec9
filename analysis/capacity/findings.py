"""What a capacity plan finds, as records of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.common.bootstrap import Estimate
from analysis.common.records import Record
from simulator.results.evidence import Evidence

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Objective:
    """What a request is promised, in ms, and the share of requests for which it must be kept.

    A request keeps it where it keeps every limit that is not None; so at ``attainment`` 0.99 the 99th percentile of
    each of them lies within its limit, and of all together. ``source``: ``stated``, or how it was assumed.
    """

    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    attainment: float = 0.99
    source: str = "stated"

    @property
    def limits(self) -> dict[str, float]:
        """Give the stated limits in ms by name."""
        named = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.e2el_ms}
        return {name: limit for name, limit in named.items() if limit is not None}


@dataclass(frozen=True)
class RatePoint:
    """One arrival rate, per replica: attainment and tails there, with intervals over replications.

    ``share``: of the rate at which the engine is saturated.
    """

    rate_rps: float
    share: float
    attainment: Estimate
    p99_ttft_ms: Estimate
    p99_tpot_ms: Estimate


@dataclass(frozen=True)
class Needed:
    """Replicas and devices that a load needs, whole numbers; low and high from the interval of the sustained rate.

    ceil(load / rate of one replica): the load is split evenly over replicas that do not help each other.
    ``high`` ones are None where the interval reaches down to no load at all.
    """

    load_rps: float
    replicas: int
    replicas_low: int
    replicas_high: int | None
    devices: int
    devices_low: int
    devices_high: int | None


@dataclass(frozen=True)
class PolicyCapacity:
    """What one policy carries. Rates and throughputs are those of one replica.

    ``rate_rps``: the largest arrival rate at which the objective is kept, mean over replications (Student's t
    interval). ``ratio``: that over the first policy's, paired by seed. ``saturation_rps``: requests a second of an
    engine that is never idle, which no rate can exceed for long. ``limited_by``: what gives way first above the
    rate. At the sustained rate, over the replications that sustain any: ``output_tokens_per_s``, tails,
    ``requests_in_system`` = rate x mean stay (Little 1961), and per million output tokens the dollars (where a price
    is given) and joules (where the prices of steps tell them). ``needed`` and dollars count
    ``devices_per_replica``. ``extrapolated_share``: of its iterations priced outside of what was measured, the
    largest of any run of the curve.
    """

    policy: str
    rate_rps: Estimate
    ratio: Estimate | None
    saturation_rps: Estimate
    limited_by: str
    output_tokens_per_s: Estimate
    p99_ttft_ms: Estimate
    p99_tpot_ms: Estimate
    requests_in_system: Estimate
    usd_per_million_output_tokens: Estimate | None
    joules_per_million_output_tokens: Estimate | None
    needed: Needed | None
    curve: tuple[RatePoint, ...]
    extrapolated_share: float
    devices_per_replica: int = 1


@dataclass(frozen=True)
class LengthTrial:
    """The sustained rate of a few seeds at one run length, from which the length of all runs was chosen."""

    requests: int
    rate_rps: float


@dataclass(frozen=True)
class CapacityFindings(Record):
    """The capacity plan of one scenario. Every number is *simulated*, with step costs as ``costs`` says.

    ``requests_per_run`` arrive in a run; the first ``warmup_share`` and the last ``tail_share`` of them, in order of
    arrival, are not judged: the system fills up and runs empty there. ``trials``: how the length was found; empty
    where it was given. ``stable``: whether doubling it moved the rate by less than ``stability``.
    """

    name: str
    created: str
    verifier: str
    device: str
    costs: str
    acceptance: str
    arrivals: str
    objective: Objective
    policies: tuple[PolicyCapacity, ...]
    replicas: int
    devices_per_replica: int
    load_rps: float | None
    usd_per_device_hour: float | None
    energy_counts: str | None
    replications: int
    requests_per_run: int
    warmup_share: float
    tail_share: float
    tolerance: float
    trials: tuple[LengthTrial, ...]
    stable: bool
    stability: float
    warnings: tuple[str, ...]
    evidence: Evidence | None = None
    schema_version: int = field(default=SCHEMA_VERSION)
