"""The capacity plan against queueing laws whose answers are known, and its own promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scenarios import scenario, traces_of
from scipy.optimize import brentq

from analysis.capacity import CapacityFindings, Objective, plan_capacity
from analysis.capacity.sustain import at_rate, devices_per_replica, needed, plain, probe, saturated
from analysis.common.bootstrap import Estimate
from analysis.common.records import from_json, to_json
from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator import Scenario, simulate

SERVICE_S = 0.1
POISSON = {"kind": "poisson", "rate_rps": 1.0}


def single_token(replicas: int = 1, **more: Any) -> tuple[Scenario, TraceSet]:
    """One slot a replica, one token a request, a prefill of constant time: M/D/1 (D/replicas under round robin)."""
    costs = {"verifier": {"kind": "linear", "base_s": SERVICE_S}}
    fleet = {} if replicas == 1 else {"replica": [{"count": replicas}]}
    plan = scenario(None, batch=1, workload=POISSON, costs=costs, drafter=None, **fleet, **more)
    return plan, traces_of([[0]] * 4, prompts=[3] * 4)


def md1_waits_at_most(t: float, rate: float, service: float) -> float:
    """P(W <= t) in M/D/1 (Erlang 1909; Crommelin 1932): a finite sum, exact."""
    load = rate * service
    terms = (
        (-rate * (t - k * service)) ** k / math.factorial(k) * math.exp(rate * (t - k * service))
        for k in range(int(t / service) + 1)
    )
    return (1 - load) * sum(terms)


def test_the_sustained_rate_of_one_constant_server_is_that_of_m_d_1() -> None:
    """The rate at which 95% wait at most three services; and the saturated rate is one over the service."""
    plan, traces = single_token()
    limit_s = 4 * SERVICE_S
    slo = Objective(1000 * limit_s, None, None, attainment=0.95)
    found = plan_capacity(plan, slo=slo, replications=5, requests=2500, traces=traces, workers=1)
    (policy,) = found.policies
    exact = brentq(lambda rate: md1_waits_at_most(limit_s - SERVICE_S, rate, SERVICE_S) - 0.95, 1.0, 9.9)
    assert policy.saturation_rps.value == pytest.approx(1 / SERVICE_S, rel=1e-6)
    assert policy.rate_rps.value == pytest.approx(exact, rel=0.03)
    assert policy.rate_rps.low is not None
    assert policy.rate_rps.high is not None
    assert policy.rate_rps.low * 0.98 < exact < policy.rate_rps.high * 1.02  # the grid of a bisection is 2% wide
    assert policy.limited_by == "ttft"


def test_without_a_limit_that_binds_the_engine_is_limited_by_saturation() -> None:
    plan, traces = single_token()
    found = plan_capacity(plan, slo=Objective(1e9, None, None), replications=2, requests=40, traces=traces, workers=1)
    (policy,) = found.policies
    assert policy.limited_by == "saturation"
    assert policy.rate_rps.value == policy.saturation_rps.value


def test_an_objective_that_is_never_kept_carries_nothing() -> None:
    plan, traces = single_token()
    slo = Objective(1000 * SERVICE_S / 2, None, None)
    found = plan_capacity(
        plan, slo=slo, load_rps=3.0, price_per_hour=2.0, replications=2, requests=40, traces=traces, workers=1
    )
    (policy,) = found.policies
    assert policy.rate_rps.value == 0.0
    assert policy.needed is None
    assert policy.output_tokens_per_s.value is None
    assert policy.usd_per_million_output_tokens is None


def test_twice_the_replicas_carry_at_least_twice_the_load_and_are_saturated_at_exactly_twice() -> None:
    """Replicas share one stream: a stream dealt out in turn is smoother than Poisson, so each carries a bit more."""
    slo = Objective(1000 * 4 * SERVICE_S, None, None, attainment=0.95)

    def plan(replicas: int) -> CapacityFindings:
        setup, traces = single_token(replicas)
        return plan_capacity(setup, slo=slo, replications=3, requests=800 * replicas, traces=traces, workers=1)

    one, two = plan(1), plan(2)
    assert (one.replicas, two.replicas) == (1, 2)
    rates = [found.policies[0].rate_rps.value or 0.0 for found in (one, two)]  # per replica
    assert 1.0 <= rates[1] / rates[0] < 1.4
    saturations = [found.policies[0].saturation_rps.value for found in (one, two)]
    assert saturations[1] == pytest.approx(saturations[0], rel=0.02)


@pytest.fixture(scope="module")
def served() -> tuple[Scenario, TraceSet, CapacityFindings]:
    """A drafter that is always right against none, at prices where speculation must pay."""
    plan = scenario(
        3,
        batch=4,
        workload=POISSON,
        costs={
            "verifier": {"kind": "linear", "base_s": 0.02},
            "drafter": {"kind": "linear", "base_s": 0.001, "charged": "per_round"},
        },
        slo={"ttft_ms": 1000.0, "tpot_ms": 100.0},
        name="three tokens",
    )
    traces = traces_of([[40 - t for t in range(40)] for _ in range(6)], prompts=[5] * 6)
    found = plan_capacity(
        plan, load_rps=20.0, price_per_hour=3.6, replications=3, requests=300, traces=traces, workers=1
    )
    return plan, traces, found


def test_a_perfect_drafter_carries_more_and_the_ratio_is_paired(
    served: tuple[Scenario, TraceSet, CapacityFindings],
) -> None:
    found = served[2]
    without, drafted = found.policies
    assert [p.policy for p in found.policies] == ["no speculation", "three tokens"]
    assert found.objective == Objective(1000.0, 100.0, None, 0.99, "stated")
    assert without.ratio is None
    assert drafted.ratio is not None
    assert drafted.ratio.value is not None
    assert drafted.ratio.value > 1.5
    assert drafted.saturation_rps.value is not None
    assert without.saturation_rps.value is not None
    # A round commits four tokens for 21 ms instead of 20 ms for one; a prefill of 20 ms is there either way.
    rounds = (math.ceil(39 / 4) * 0.021 / 4, 39 * 0.02 / 4)
    longest = tuple(1 / (0.02 + r) for r in rounds), tuple(1 / (0.02 / 4 + r) for r in rounds)
    assert longest[0][0] * 0.98 < drafted.saturation_rps.value < longest[1][0] * 1.02
    assert longest[0][1] * 0.98 < without.saturation_rps.value < longest[1][1] * 1.02


def test_money_and_devices_follow_from_the_rate(served: tuple[Scenario, TraceSet, CapacityFindings]) -> None:
    found = served[2]
    for policy in found.policies:
        rate, needed = policy.rate_rps.value, policy.needed
        assert rate is not None
        assert needed is not None
        assert needed.replicas == math.ceil(20.0 / rate)
        assert needed.replicas_low <= needed.replicas
        assert needed.devices == needed.replicas
        # 3.6 dollars an hour are 0.001 a second, for rate x 40 tokens.
        price = policy.usd_per_million_output_tokens
        assert price is not None
        assert price.value == pytest.approx(0.001 / (rate * 40) * 1e6, rel=0.05)
        assert policy.joules_per_million_output_tokens is None  # stated prices tell none


def test_requests_in_the_system_agree_with_a_count_over_time(
    served: tuple[Scenario, TraceSet, CapacityFindings],
) -> None:
    """Little's law: the rate times the mean stay against the time average over the judged stretch of the same run."""
    plan, traces, found = served
    seen = probe(plan, 0.7 * (found.policies[1].saturation_rps.value or 0.0), 1000, found.objective, traces)
    rows = simulate(at_rate(plan, seen.rate_rps, 1000), traces).requests
    arrival, finish = rows["arrival_s"].to_numpy(), rows["finish_s"].to_numpy()
    times = np.linspace(arrival[200], arrival[900], 4001)
    inside = np.searchsorted(arrival, times, side="right") - np.searchsorted(np.sort(finish), times, side="right")
    assert seen.judged == 700
    assert seen.rate_rps * seen.mean_e2el_s == pytest.approx(float(inside.mean()), rel=0.08)


def test_attainment_falls_along_the_curve(served: tuple[Scenario, TraceSet, CapacityFindings]) -> None:
    for policy in served[2].policies:
        values = [point.attainment.value for point in policy.curve]
        assert len(values) == 4
        assert (values[0] or 0.0) > 0.99
        assert all(a >= b - 0.05 for a, b in itertools.pairwise(values))  # type: ignore[operator]


def test_findings_survive_json_and_do_not_depend_on_workers(
    served: tuple[Scenario, TraceSet, CapacityFindings],
) -> None:
    assert from_json(CapacityFindings, to_json(served[2]), "here") == served[2]
    plan, traces = single_token()
    one, two = (plan_capacity(plan, replications=2, requests=20, traces=traces, workers=n) for n in (1, 2))
    assert one == two


def test_the_run_length_is_doubled_until_the_rate_stands_still() -> None:
    plan, traces = single_token()
    slo = Objective(1000 * 20 * SERVICE_S, None, None, attainment=0.9)
    found = plan_capacity(plan, slo=slo, replications=2, traces=traces, workers=1)
    lengths = [trial.requests for trial in found.trials]
    assert lengths == [250 * 2**i for i in range(len(lengths))]
    assert found.stable
    assert found.requests_per_run == lengths[-1]
    a, b = found.trials[-2:]
    assert abs(a.rate_rps / b.rate_rps - 1) <= 0.031


def test_without_an_objective_one_is_assumed_and_says_so() -> None:
    plan, traces = single_token()
    found = plan_capacity(plan, replications=2, requests=60, traces=traces, workers=1)
    assert found.objective.source.startswith("assumed")
    assert found.objective.ttft_ms is not None
    # Almost idle, hardly anyone waits: the 99th percentile is between one service and two, and the limit twice that.
    assert 2 * 1000 * SERVICE_S <= found.objective.ttft_ms <= 4.2 * 1000 * SERVICE_S


def test_needs_are_whole_and_ordered() -> None:
    found = needed(10.0, Estimate(3.0, 2.4, 3.4, 100), 4)
    assert found is not None
    assert (found.replicas, found.replicas_low, found.replicas_high) == (4, 3, 5)
    assert (found.devices, found.devices_low, found.devices_high) == (16, 12, 20)
    assert needed(10.0, Estimate(0.0, 0.0, 0.0, 100), 4) is None
    unsure = needed(10.0, Estimate(3.0, 0.0, 6.0, 100), 1)
    assert unsure is not None
    assert unsure.replicas_high is None


def test_scenarios_of_the_plan_keep_what_is_served() -> None:
    plan = scenario(3, workload={**POISSON, "mix": {"chat": 1.0}}, placement={"kind": "remote", "round_trip_s": 0.01})
    assert plain(plan).stopping.policy == "none"
    assert plain(plan).placement is None
    assert plain(plan).drafter == plan.drafter
    assert saturated(plan).workload.kind == "closed"
    for changed in (saturated(plan), at_rate(plan, 2.0, 10)):
        assert changed.workload.mix == {"chat": 1.0}  # type: ignore[union-attr]
        assert changed.seed == plan.seed
    assert devices_per_replica(plan) == 2
    assert devices_per_replica(plain(plan)) == 1


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"workload": {"kind": "piecewise", "rates": [[0.0, 1.0]], "requests": 9}}, {}, "must be closed"),
        ({"slo": {"itl_ms": 50.0}}, {}, r"slo\.itl_ms"),
        ({}, {"load_rps": 0.0}, "load_rps: must be above 0"),
        ({}, {"price_per_hour": math.nan}, "price_per_hour: must be above 0"),
        ({}, {"requests": 5}, "at least 20, got 5"),
        ({}, {"replications": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"workload": POISSON, **changes}
    plan = scenario(2, **settings)
    traces = traces_of([[0, 0]])
    given: dict[str, Any] = {"replications": 2, "requests": 20, **options}
    with pytest.raises(ScenarioError, match=words):
        plan_capacity(plan, traces=traces, workers=1, **given)
