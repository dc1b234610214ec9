"""Queueing laws of one replica and of several, at the limits where they are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from scenarios import scenario, traces_of

from simulator import RunResult, simulate


def agrees(values: list[float], expected: float, slack: float = 0.0) -> bool:
    """Whether the mean of independent values lies within three standard errors (and `slack`) of what is expected."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return bool(abs(np.mean(values) - expected) <= 3 * error + slack)


@pytest.mark.parametrize(("tokens", "weights"), [([40], [1.0]), ([16, 160], [5.0, 1.0])])
def test_processor_sharing_does_not_care_for_the_law_of_lengths(tokens: list[int], weights: list[float]) -> None:
    """T(x) = x / (1 - rho): each of n requests gets 1/n of a verifier whose step costs one unit per request.

    Mean 40 tokens either way. A step is a quantum and no true sharing: an arrival waits for the step under way, half
    a step on average, and joins later rounds; that bias is below one round, 1 / (1 - rho) tokens.
    """
    token_s, load = 0.01, 0.6
    costs = {"verifier": {"kind": "linear", "base_s": 0.0, "per_token_s": token_s}}
    lengths = {"kind": "drawn", "output": {"kind": "pmf", "tokens": tokens, "weights": weights}}
    arrivals = {"kind": "poisson", "rate_rps": load / (40 * token_s), "requests": 800, "lengths": lengths}
    traces = traces_of([[0] * 160], prompts=[1])
    stays: dict[int, list[float]] = {x: [] for x in tokens}
    for seed in range(6):
        plan = scenario(None, batch=256, seed=seed, drafter=None, workload=arrivals, costs=costs)
        requests = simulate(plan, traces).requests.to_pandas()
        stay = (requests["finish_s"] - requests["arrival_s"]) / token_s
        for x in tokens:
            stays[x].append(float(stay[requests["output_tokens"] == x].mean()))
    for x in tokens:
        assert agrees(stays[x], x / (1 - load), slack=1 / (1 - load))
        assert np.std(stays[x], ddof=1) / np.sqrt(6) < 0.1 * x / (1 - load), "the test would accept anything"


@pytest.mark.parametrize("replicas", [1, 3])
def test_saturation_throughput(replicas: int) -> None:
    """B_max * E[tokens per round] / T_iter(B_max), less the time that prefills take from it, for each replica."""
    a, k, batch, tokens = 0.7, 3, 16, 120
    base_s, token_s, overhead_s, prompt = 0.02, 0.0005, 0.002, 30
    traces = iid_traces(a, np.random.default_rng(0), sequences=60, output_tokens=tokens, prompt_tokens=prompt)
    costs = {
        "overhead_s": overhead_s,
        "verifier": {"kind": "linear", "base_s": base_s, "per_token_s": token_s},
        "drafter": {"kind": "linear", "base_s": 0.004, "charged": "per_round"},
    }
    clients = {"kind": "closed", "concurrency": 2 * batch * replicas, "requests": 480 * replicas, "keep_full": True}
    fleet = {"replica": [{"count": replicas}], "routing": {"replica": {"policy": "least_loaded"}}}
    result = simulate(scenario(k, batch=batch, workload=clients, costs=costs, **fleet), traces)
    decode = [row for row in result.iterations.to_pylist() if row["kind"] == "decode"]
    assert np.mean([row["active"] for row in decode]) > batch - 0.01
    iteration_s = base_s + 0.004 + overhead_s + token_s * batch * (k + 1)
    per_round = (1 - a ** (k + 1)) / (1 - a)
    prefills = result.summary["iterations"] - len(decode)
    prefill_s = prefills * (base_s + overhead_s) / replicas + token_s * prompt * result.requests.num_rows / replicas
    rounds = result.requests.num_rows * (tokens - 1) / per_round / (batch * replicas)
    expected = result.requests.num_rows * tokens / (rounds * iteration_s + prefill_s)
    assert result.summary["engine_output_throughput"] == pytest.approx(expected, rel=0.03)


def test_a_closed_system_serves_clients_over_response_and_think_time() -> None:
    """X = N / (R + Z), the interactive response time law, over a fleet with failures."""
    traces = iid_traces(0.5, np.random.default_rng(1), sequences=30, output_tokens=30)
    load = {"kind": "closed", "concurrency": 12, "requests": 1500, "think_s": 0.8, "think_law": "exponential"}
    fleet = {"replica": [{"name": "a", "count": 2, "failures": [[20.0, 30.0]]}, {"name": "b"}]}
    result = simulate(scenario(2, workload=load, **fleet), traces)
    stay = result.requests["finish_s"].to_numpy() - result.requests["arrival_s"].to_numpy()
    expected = 12 / (float(stay.mean()) + 0.8)
    assert result.summary["request_throughput"] == pytest.approx(expected, rel=0.04)


def present(run: RunResult, rate: float, began: float, ended: float) -> float:
    """Mean number in the system, as the iterations saw it: who is worked on, who waits, and who came meanwhile."""
    rows = run.iterations.to_pandas()
    rows = rows[(rows["start_s"] >= began) & (rows["start_s"] < ended)]
    return float((rows["duration_s"] * (rows["active"] + rows["waiting"] + rate * rows["duration_s"] / 2)).sum()) / (
        ended - began
    )


def test_littles_law_on_windows_of_a_fleet() -> None:
    """L = lambda * W on stable windows, three replicas with chunked prefill, L observed at the iterations."""
    traces = iid_traces(0.6, np.random.default_rng(2), sequences=40, output_tokens=25, prompt_tokens=40)
    engine = {"max_num_seqs": 6, "max_num_batched_tokens": 1000, "enable_chunked_prefill": True}
    costs: dict[str, Any] = {
        "verifier": {"kind": "linear", "base_s": 0.03, "per_token_s": 0.0005},
        "drafter": {"kind": "linear", "base_s": 0.002},
    }
    rate, differences = 20.0, []
    for seed in range(6):
        load = {"kind": "poisson", "rate_rps": rate, "requests": 1800, "order": "shuffled"}
        plan = scenario(2, workload=load, engine=engine, costs=costs, seed=seed, replica=[{"count": 3}])
        run = simulate(plan, traces)
        requests = run.requests.to_pandas()
        for began in (20.0, 50.0):
            window = requests[(requests["arrival_s"] >= began) & (requests["arrival_s"] < began + 30)]
            stay = float((window["finish_s"] - window["arrival_s"]).mean())
            observed = present(run, rate / 3, began, began + 30)
            differences.append(observed - len(window) / 30 * stay)
            assert observed > 3
    assert agrees(differences, 0.0)
    assert np.std(differences, ddof=1) < 0.5
