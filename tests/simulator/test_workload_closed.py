"""Closed loops with think time: operational laws and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import scenario, traces_of
from scipy import stats

from simulator import RunResult, Scenario, simulate
from simulator.playback.replay import select_sequences
from simulator.scenario.workload import DEFAULT_STAGGER_S
from simulator.workload import ClosedSource, make_source

CONSTANT = {"overhead_s": 0.0, "verifier": {"kind": "linear", "base_s": 0.01}}
"""Every iteration takes 10 ms, so a request of T tokens that is served alone takes T * 10 ms."""


def run(traces: Any, batch: int, **load: Any) -> Any:
    return simulate(scenario(None, batch=batch, workload=load, costs=CONSTANT), traces)


def test_interactive_law_with_constant_times() -> None:
    """N clients that think Z, served S one at a time: once they are staggered nobody waits, X = N / (S + Z)."""
    traces = traces_of([[0] * 20] * 5)
    service, think, clients = 0.2, 2.0, 8
    result = run(traces, 1, concurrency=clients, requests=808, think_s=think)
    requests = result.requests.to_pandas()
    late = requests[requests["request_id"] >= 2 * clients]
    assert (late["finish_s"] - late["arrival_s"]).to_numpy() == pytest.approx(service, rel=1e-9)
    finish = np.sort(late["finish_s"].to_numpy())
    assert (len(finish) - clients) / (finish[-1] - finish[clients - 1]) == pytest.approx(
        clients / (service + think), rel=1e-6
    )


def test_interactive_law_holds_for_random_times() -> None:
    """X = N / (R + Z) is an operational identity; the ends of the run are what is left of an error."""
    lengths = np.random.default_rng(2).integers(2, 60, 200).tolist()
    traces = traces_of([[0] * n for n in lengths])
    clients, think = 6, 1.5
    load = {"concurrency": clients, "requests": 8000, "think_s": think, "think_law": "exponential"}
    result = run(traces, 2, **load, keep_full=True)
    counted = result.requests.to_pandas().query("counted")
    response = (counted["finish_s"] - counted["arrival_s"]).mean()
    assert counted["finish_s"].max() > 1000
    throughput = len(counted) / counted["finish_s"].max()
    # Standard error: the mean of 8,000 exponential think times.
    assert throughput == pytest.approx(
        clients / (response + think), rel=3.5 * think / (response + think) / math.sqrt(8000)
    )


def test_machine_repair_model() -> None:
    """M/M/1 with N thinking clients: idle with p0 = 1 / sum_n N! / (N-n)! (S/Z)^n, X = (1 - p0) / S.

    Service is geometric in tokens of 10 ms with mean 100, exponential but for the grain of a token.
    """
    rng = np.random.default_rng(4)
    lengths = rng.geometric(1 / 100, 4000)
    traces = iid_traces(0.5, rng, sequences=1, output_tokens=2)
    service, think, clients = 0.01 * lengths.mean(), 3.0, 4
    traces = traces_of([[0] * int(n) for n in lengths])
    load = {"concurrency": clients, "requests": 4000, "think_s": think, "think_law": "exponential"}
    result = run(traces, 1, **load, keep_full=True)
    counted = result.requests.to_pandas().query("counted")
    terms = [math.perm(clients, n) * (service / think) ** n for n in range(clients + 1)]
    expected = (1 - 1 / sum(terms)) / service
    assert len(counted) / counted["finish_s"].max() == pytest.approx(expected, rel=0.03)


def closed(seed: int = 0, **load: Any) -> ClosedSource:
    sequences = select_sequences(iid_traces(0.5, np.random.default_rng(0), sequences=5, output_tokens=8))
    settings_ = {"kind": "closed", **load}
    source = make_source(Scenario.model_validate({"seed": seed, "workload": settings_}), sequences)
    assert isinstance(source, ClosedSource)
    return source


def test_think_times_are_exponential_and_belong_to_the_request() -> None:
    source = closed(concurrency=1, requests=4000, think_s=2.0, think_law="exponential")
    thought, now = [], 0.0
    for _ in range(4000):
        (request,) = source.admit(source.next_arrival_s, 1)
        thought.append(request.arrival_s - now)
        now = request.arrival_s + 0.5
        source.end(request, now)
    assert source.done
    assert stats.kstest(thought, stats.expon(scale=2.0).cdf).pvalue > 0.01
    # Four clients: the same k-th think time, whoever the client is.
    several = closed(concurrency=4, requests=4000, think_s=2.0, think_law="exponential")
    starts = [thought[client] + client * DEFAULT_STAGGER_S for client in range(4)]
    assert sorted(r.arrival_s for r in several.admit(math.inf, 4)) == pytest.approx(sorted(starts))


@settings(max_examples=60)
@given(
    clients=st.integers(1, 6),
    requests=st.integers(1, 40),
    think_s=st.sampled_from([0.0, 0.3, 2.0]),
    law=st.sampled_from(["constant", "exponential"]),
    keep_full=st.booleans(),
    work=st.lists(st.floats(0.01, 3), min_size=1, max_size=9),
)
def test_clients_have_one_request_at_a_time(
    clients: int, requests: int, think_s: float, law: str, keep_full: bool, work: list[float]
) -> None:
    source = closed(concurrency=clients, requests=requests, think_s=think_s, think_law=law, keep_full=keep_full)
    busy: dict[str, Any] = {}
    ended, now, turn = 0, 0.0, 0
    while not source.done:
        for request in source.admit(now, 3):
            assert request.client is not None
            assert request.client not in busy
            assert request.arrival_s <= now
            busy[request.client] = (now + work[turn % len(work)], request)
            turn += 1
        coming = min((end for end, _ in busy.values()), default=math.inf)
        if coming == math.inf or (len(busy) < clients and source.next_arrival_s < coming):
            now = max(now, source.next_arrival_s)
            continue
        name = min(busy, key=lambda client: busy[client][0])
        now, request = busy.pop(name)
        source.end(request, now)
        ended += request.counted
    assert ended == requests
    assert len(busy) + source.waiting(math.inf) <= (clients if keep_full else 0)


def test_without_thinking_nothing_has_changed() -> None:
    traces = iid_traces(0.5, np.random.default_rng(1), sequences=10, output_tokens=20)
    plain = simulate(scenario(2, workload={"concurrency": 3}), traces)
    thinking = simulate(scenario(2, workload={"concurrency": 3, "think_s": 0.0}), traces)
    assert thinking.requests.equals(plain.requests)
    assert thinking.iterations.equals(plain.iterations)


def started(**load: Any) -> RunResult:
    """Four clients, 12 requests, on an engine with room for all."""
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=12, output_tokens=30)
    return simulate(scenario(None, batch=4, workload={"concurrency": 4, **load}), traces)


def test_the_first_request_is_prefilled_alone_unless_all_start_at_once() -> None:
    apart, together = started(stagger_s=None), started(stagger_s=0.0)
    assert sorted(apart.requests["arrival_s"].to_pylist())[:4] == pytest.approx([0.0, 0.001, 0.002, 0.003])
    assert apart.iterations["emitted_tokens"][0].as_py() == 1
    assert apart.iterations["kind"][0].as_py() == together.iterations["kind"][0].as_py() == "prefill"
    assert together.iterations["emitted_tokens"][0].as_py() == 4
    assert started(stagger_s=0.25).requests["arrival_s"].to_pylist()[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("load", [{"keep_full": True}, {"copies": 4, "requests": 12}])
def test_an_engine_in_full_swing_starts_at_once(load: dict[str, Any]) -> None:
    run = started(**load)
    assert sorted(run.requests["arrival_s"].to_pylist())[:4] == [0.0] * 4
    assert "startup_requests" not in run.summary


def test_latencies_leave_out_the_first_request_of_every_client() -> None:
    run = started()
    table = run.requests.to_pandas()
    later = table[table["request_id"] >= 4]
    ttft_ms = 1000 * (later["first_token_s"] - later["arrival_s"])
    e2el_ms = 1000 * (later["finish_s"] - later["arrival_s"])
    assert run.summary["startup_requests"] == 4
    assert run.summary["mean_ttft_ms"] == pytest.approx(ttft_ms.mean())
    assert run.summary["p99_e2el_ms"] == pytest.approx(np.percentile(e2el_ms, 99))
    whole = started(include_startup=True)
    assert "startup_requests" not in whole.summary
    assert whole.summary["mean_ttft_ms"] == pytest.approx(1000 * (table["first_token_s"] - table["arrival_s"]).mean())
    for name in ("completed", "output_throughput", "total_output_tokens", "duration"):
        assert run.summary[name] == whole.summary[name]
    assert run.requests.equals(whole.requests)


def test_the_start_up_stays_where_little_else_was_measured() -> None:
    few = started(requests=7)  # four of the start, three later
    assert few.summary["startup_requests"] == 0
    table = few.requests.to_pandas()
    assert few.summary["mean_ttft_ms"] == pytest.approx(1000 * (table["first_token_s"] - table["arrival_s"]).mean())
    assert started(requests=8).summary["startup_requests"] == 4
    chosen = simulate(
        scenario(None, batch=4, workload={"concurrency": 4}, measure={"warmup_requests": 2}),
        iid_traces(0.5, np.random.default_rng(0), sequences=12, output_tokens=30),
    )
    assert chosen.summary["warmup_requests_removed"] == 2
    assert "startup_requests" not in chosen.summary
