"""Warm-up removal: MSER-5 against its definition and against queues whose answer is known; windows of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenarios import random_runs, scenario, traces_of

from calibration.common.errors import ConvergenceWarning, ScenarioError
from simulator import RunResult, parse_scenario, simulate
from simulator.results.result import mser


def run(**settings: Any) -> RunResult:
    """Sixteen requests of different lengths, two at a time."""
    rng = np.random.default_rng(3)
    traces = traces_of([random_runs(rng, 5 + 3 * i) for i in range(16)])
    return simulate(scenario(2, batch=2, **settings), traces)


@given(st.lists(st.floats(0, 1000), min_size=10, max_size=83))
def test_mser_is_the_least_of_its_scores(values: list[float]) -> None:
    means = [sum(values[5 * j : 5 * j + 5]) / 5 for j in range(len(values) // 5)]
    scores = []
    for d in range(len(means) // 2 + 1):
        kept = means[d:]
        middle = sum(kept) / len(kept)
        scores.append(sum((z - middle) ** 2 for z in kept) / len(kept) ** 2)
    chosen = mser(np.array(values))
    assert chosen % 5 == 0
    scale = max(values) ** 2
    assert scores[chosen // 5] <= min(scores) + 1e-9 * max(scale, 1.0)


def test_mser_cuts_a_step_where_it_is() -> None:
    rng = np.random.default_rng(1)
    series = np.concatenate((np.full(60, 50.0), np.zeros(400))) + rng.normal(size=460)
    assert mser(series) == 60
    assert mser(series[60:]) <= 50


def test_mser_mends_the_mean_wait_of_a_queue_that_starts_full() -> None:
    """M/M/1, service rate 1, arrival rate 0.5: wait in queue rho / (mu - lambda) = 1; it starts with 60 waiting."""
    rng = np.random.default_rng(7)
    raw, cut = [], []
    for _ in range(60):
        gaps, service = rng.exponential(2.0, 2000), rng.exponential(1.0, 2000)
        waits = np.empty(2000)
        wait = 60.0
        for i in range(2000):
            waits[i] = wait
            wait = max(0.0, wait + service[i] - gaps[i])
        raw.append(waits.mean())
        cut.append(waits[mser(waits) :].mean())
    error = np.std(cut, ddof=1) / math.sqrt(len(cut))
    assert np.mean(raw) > 1.5
    assert abs(np.mean(cut) - 1.0) < 4 * error
    assert error < 0.1


def test_warmup_gives_the_engine_behind_a_burst_the_mean_time_of_m_g_1(tmp_path: Path) -> None:
    """Pollaczek and Khinchine: E[W] = rate E[S^2] / (2 (1 - load)), plus E[S]; 30 requests wait at the start."""
    rate, step_s, lengths = 2.0, 0.1, np.array([1, 2, 7])
    service = step_s * lengths
    expected = rate * (service**2).mean() / (2 * (1 - rate * service.mean())) + service.mean()
    raw, cut = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        times = np.concatenate((np.zeros(30), np.cumsum(rng.exponential(1 / rate, 2000))))
        rows = [
            f"{time!r},1,{tokens}" for time, tokens in zip(times.tolist(), rng.choice(lengths, 2030), strict=True)
        ]
        file = tmp_path / f"{seed}.csv"
        file.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
        for found, measure in ((raw, None), (cut, {"warmup": "auto"})):
            queue = scenario(
                batch=1,
                workload={"kind": "csv", "path": str(file)},
                costs={"verifier": {"kind": "linear", "base_s": step_s}},
                measure=measure,
            )
            found.append(simulate(queue, traces_of([[0] * n for n in lengths])).summary["mean_e2el_ms"] / 1000)
    error = np.std(cut, ddof=1) / math.sqrt(len(cut))
    assert error < 0.1 * expected, "the test would accept anything"
    assert abs(np.mean(cut) - expected) < 3 * error
    assert np.mean(raw) - expected > 3 * error


def test_without_a_section_everything_is_measured_and_nothing_said() -> None:
    summary = run().summary
    assert summary["completed"] == 16
    assert not [name for name in summary if "warmup" in name]


@pytest.mark.parametrize("removed", [0, 1, 5, 15])
def test_requests_are_left_out_in_order_of_their_ends(removed: int) -> None:
    summary = run(measure={"warmup_requests": removed}).summary
    table = run().requests.to_pandas().sort_values(["finish_s", "request_id"])
    kept = table.iloc[removed:]
    began = table.arrival_s.min() if removed == 0 else table.finish_s.iloc[removed - 1]
    assert summary["completed"] == 16 - removed
    assert summary["warmup_requests_removed"] == removed
    assert summary["warmup_method"] == "requests"
    assert summary["warmup_removed_s"] == pytest.approx(began - table.arrival_s.min())
    assert summary["duration"] == pytest.approx(table.finish_s.max() - began)
    assert summary["output_throughput"] == pytest.approx(kept.output_tokens.sum() / summary["duration"])
    assert summary["mean_e2el_ms"] == pytest.approx(1000 * (kept.finish_s - kept.arrival_s).mean())
    assert summary["p99_ttft_ms"] == pytest.approx(1000 * (kept.first_token_s - kept.arrival_s).quantile(0.99))


def test_gaps_between_tokens_of_warm_up_requests_are_left_out() -> None:
    """Without speculation the gaps of a request add up to its time after the first token."""
    rng = np.random.default_rng(3)
    traces = traces_of([random_runs(rng, 5 + 3 * i) for i in range(16)])
    result = simulate(scenario(batch=2, measure={"warmup_requests": 6}), traces)
    kept = result.requests.to_pandas().sort_values(["finish_s", "request_id"]).iloc[6:]
    total_ms = 1000 * (kept.finish_s - kept.first_token_s).sum()
    assert result.summary["mean_itl_ms"] == pytest.approx(total_ms / (kept.output_tokens - 1).sum())


def test_the_first_seconds_are_left_out() -> None:
    table = run().requests.to_pandas()
    cut = float(table.finish_s.median())
    result = run(measure={"warmup_s": cut}).summary
    assert result["completed"] == int((table.finish_s > cut).sum())
    assert result["duration"] == pytest.approx(table.finish_s.max() - cut)
    iterations = run().iterations.to_pandas()
    emitted = iterations.emitted_tokens[iterations.start_s + iterations.duration_s > cut].sum()
    assert result["engine_output_throughput"] == pytest.approx(emitted / result["duration"])


def test_time_shares_and_acceptance_cover_the_whole_run() -> None:
    whole, part = run().summary, run(measure={"warmup_requests": 8}).summary
    for name in ("draft_s", "verify_s", "idle_s", "spec_decode_acceptance_rate", "iterations"):
        assert part[name] == whole[name]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({"warmup_requests": 16}, r"measure.warmup_requests: must leave some of the 16 counted .* got 16"),
        ({"warmup_s": 1e6}, r"measure.warmup_s: must leave some of the 16 counted requests.* got 1000000.0"),
    ],
)
def test_a_warm_up_that_leaves_nothing_is_refused(measure: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        run(measure=measure)


def test_mser_needs_ten_requests() -> None:
    with pytest.raises(ScenarioError, match=r"'auto' needs at least 10 counted requests, got 3"):
        simulate(scenario(measure={"warmup": "auto"}), traces_of([[0, 0]] * 3))


def test_a_load_that_never_settles_is_warned_of() -> None:
    """One slot, everything there at once: each request waits for one more than the one before."""
    growing = scenario(batch=1, workload={"kind": "poisson", "rate_rps": 1e6}, measure={"warmup": "auto"})
    with pytest.warns(ConvergenceWarning, match="no steady state in the first half of 60 requests"):
        summary = simulate(growing, traces_of([[0] * 5] * 60)).summary
    assert summary["warmup_requests_removed"] == 30


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "measure: must have exactly one of warmup_requests, warmup_s, warmup, got none"),
        ({"warmup_s": 1.0, "warmup": "auto"}, "must have exactly one of .* got warmup_s, warmup"),
        ({"warmup": "mser"}, "measure.warmup: must be one of auto"),
        ({"warmup_request": 3}, "measure.warmup_request: no such key; did you mean 'warmup_requests'"),
        ({"warmup_requests": -1}, "measure.warmup_requests: must be >= 0, got -1"),
    ],
)
def test_faults_of_the_section_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        parse_scenario({"workload": {"kind": "closed", "concurrency": 1}, "measure": section})
