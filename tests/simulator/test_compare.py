"""Comparison on common random numbers: paired intervals, what shared luck saves, and the words for it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from scenarios import random_runs, scenario, traces_of

from calibration.common.errors import ReplicationWarning, ScenarioError
from calibration.traces import TraceSet
from simulator import Scenario, simulate
from simulator.experiments.compare import Contrast, compare, contrast
from simulator.experiments.replicate import Replications, replicate, replication_seeds

POISSON = {"kind": "poisson", "rate_rps": 2.0, "requests": 60, "order": "shuffled"}


def traces() -> TraceSet:
    rng = np.random.default_rng(0)
    return traces_of([random_runs(rng, int(n)) for n in rng.integers(5, 60, 30)])


def loaded(draft_tokens: int | None = 1, **settings: Any) -> Scenario:
    return scenario(draft_tokens, **{"workload": POISSON, "seed": 5, "name": f"draft {draft_tokens}", **settings})


def given(name: str, values: list[float], seeds: tuple[int, ...] | None = None) -> Replications:
    """Replications with one given number."""
    summaries = tuple({name: float(value)} for value in values)
    return Replications(loaded(), seeds or replication_seeds(0, len(values)), summaries)


def of(name: str, a: list[float], b: list[float]) -> Contrast:
    return contrast(given(name, a), given(name, b))[name]


def test_common_random_numbers_cut_the_variance_of_a_real_comparison() -> None:
    """Two draft lengths under Poisson arrivals; against runs of B on seeds of its own."""
    n = 24
    found = compare(loaded(1), loaded(3), replications=n, traces=traces(), workers=2)
    apart = replicate(loaded(3, seed=99), n, traces(), workers=2)
    for name in ("mean_e2el_ms", "mean_ttft_ms", "output_throughput"):
        paired = found.contrasts[0][name]
        a = np.array([run[name] for run in found.runs[0].results])
        independent = np.array([run[name] for run in apart.results]) - a
        assert paired.variance_reduction is not None
        assert paired.difference.sd is not None
        assert paired.variance_reduction > 3
        # 23 degrees of freedom each: the ratio of equal variances is below 2.01 in 19 of 20 cases.
        assert np.var(independent, ddof=1) / paired.difference.sd**2 > scipy.stats.f.ppf(0.999, n - 1, n - 1)


def test_every_scenario_runs_on_the_seeds_of_the_first() -> None:
    found = compare(loaded(1), loaded(3, seed=99), loaded(None), replications=3, traces=traces(), workers=1)
    assert found.labels == ("draft 1", "draft 3", "draft None")
    assert found.seeds == replication_seeds(5, 3)
    for run, length in zip(found.runs, (1, 3, None), strict=True):
        assert run.scenario.seed == 5
        for seed, summary in zip(found.seeds, run.summaries, strict=True):
            expected = simulate(loaded(length, seed=seed), traces()).summary
            assert summary["mean_e2el_ms"] == expected["mean_e2el_ms"]
            assert summary["seed"] == seed


def test_arrivals_are_common_to_all() -> None:
    short, long = (simulate(loaded(k), traces()).requests for k in (1, 5))
    assert short["arrival_s"].equals(long["arrival_s"])
    assert short["sequence_id"].equals(long["sequence_id"])


def test_intervals_are_those_of_paired_differences_and_log_ratios() -> None:
    rng = np.random.default_rng(2)
    a = rng.uniform(5, 9, 8)
    b = a * rng.uniform(1.05, 1.2, 8)
    found = of("mean_ttft_ms", a.tolist(), b.tolist())
    paired = scipy.stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(paired))
    logs = scipy.stats.ttest_1samp(np.log(b / a), 0).confidence_interval(0.95)
    assert found.ratio is not None
    assert found.ratio.mean == pytest.approx(scipy.stats.gmean(b / a))
    assert (found.ratio.low, found.ratio.high) == pytest.approx(tuple(np.exp(logs)))
    expected = (a.var(ddof=1) + b.var(ddof=1)) / (b - a).var(ddof=1)
    assert found.variance_reduction == pytest.approx(expected)


def test_scenarios_that_do_not_differ_look_so_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(4)
    told = 0
    for _ in range(2000):
        luck = rng.normal(50, 10, 6)
        found = of("mean_ttft_ms", (luck + rng.normal(0, 1, 6)).tolist(), (luck + rng.normal(0, 1, 6)).tolist())
        told += found.verdict != "cannot tell apart"
    assert abs(told / 2000 - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("output_throughput", "better", "worse"),
        ("request_goodput", "better", "worse"),
        ("slo_attainment_ttft", "better", "worse"),
        ("mean_ttft_ms", "worse", "better"),
        ("p99_e2el_ms", "worse", "better"),
        ("usd_per_million_output_tokens", "worse", "better"),
        ("joules_per_million_output_tokens", "worse", "better"),
        ("iterations", "higher", "lower"),
        ("std_itl_ms", "higher", "lower"),
        ("spec_decode_acceptance_length", "higher", "lower"),
    ],
)
def test_verdicts_fit_the_number(name: str, up: str, down: str) -> None:
    low, high = [10.0, 11.0, 12.0, 9.0], [14.1, 15.0, 16.0, 13.0]
    assert of(name, low, high).verdict == up
    assert of(name, high, low).verdict == down
    assert of(name, low, low).verdict == "equal"
    assert of(name, low, [12.0, 9.0, 13.0, 8.0]).verdict == "cannot tell apart"


def test_what_cannot_be_is_left_out() -> None:
    zero = of("idle_s", [0.0, 1.0, 2.0], [1.0, 2.0, 4.0])
    assert zero.ratio is None
    assert "ratio" not in zero.to_dict()
    steady = of("mean_ttft_ms", [1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert steady.variance_reduction is None
    assert steady.verdict == "worse"


def test_numbers_that_only_one_of_them_has_are_not_compared() -> None:
    found = compare(loaded(None), loaded(2), replications=2, traces=traces(), workers=1)
    assert "spec_decode_acceptance_rate" not in found.contrasts[0]
    assert "mean_ttft_ms" in found.contrasts[0]


def test_without_chance_there_is_a_difference_but_no_interval() -> None:
    closed = {"workload": {"kind": "closed", "concurrency": 2}}
    with pytest.warns(ReplicationWarning, match="'draft 1', 'draft 3'"):
        found = compare(loaded(1, **closed), loaded(3, **closed), replications=2, traces=traces(), workers=1)
    throughput = found.contrasts[0]["output_throughput"]
    assert throughput.difference.low is None
    assert throughput.ratio is not None
    assert throughput.ratio.low is None
    expected = [simulate(loaded(k, **closed), traces()).summary["output_throughput"] for k in (1, 3)]
    assert throughput.difference.mean == pytest.approx(expected[1] - expected[0])
    assert throughput.verdict == ("better" if expected[1] > expected[0] else "worse")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for workers in (1, 2, 4):
        found = compare(loaded(1), loaded(3), replications=3, traces=traces(), workers=workers)
        folder = found.write(tmp_path / str(workers))
        written.append({file.name: file.read_bytes() for file in sorted(folder.iterdir())})
    assert sorted(written[0]) == ["comparison.json", "runs.parquet", "scenario-0.toml", "scenario-1.toml"]
    assert written[0] == written[1] == written[2]


def test_the_folder_says_everything(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    same = loaded(3, name="draft 1")
    found = compare(
        loaded(1), same, replications=3, traces=traces(), workers=1, progress=lambda d, t: heard.append((d, t))
    )
    assert heard[-1] == (6, 6)
    folder = found.write(tmp_path / "out")
    data = json.loads((folder / "comparison.json").read_text())
    assert data["baseline"] == "draft 1 #1"
    table = pq.read_table(folder / "runs.parquet").to_pandas()
    wide = table.pivot_table(index="replication", columns="scenario", values="mean_tpot_ms")
    stated = data["against_baseline"]["draft 1 #2"]["mean_tpot_ms"]
    assert stated["difference"]["mean"] == pytest.approx((wide["draft 1 #2"] - wide["draft 1 #1"]).mean())
    assert stated["a"]["mean"] == pytest.approx(wide["draft 1 #1"].mean())
    settings = tomllib.loads((folder / "scenario-1.toml").read_text())
    assert settings["stopping"]["draft_tokens"] == 3
    assert set(data["scenarios"]) == {"draft 1 #1", "draft 1 #2"}


def test_mistakes_are_named() -> None:
    with pytest.raises(ScenarioError, match="compare: needs at least two scenarios, got 1"):
        compare(loaded(1), replications=3, traces=traces())
    with pytest.raises(ScenarioError, match="replications: must be at least 2"):
        compare(loaded(1), loaded(2), replications=1, traces=traces())
    with pytest.raises(ScenarioError, match="same seeds"):
        contrast(given("x", [1, 2], (1, 2)), given("x", [1, 2], (1, 3)))


def judged(rate_rps: float, **more: Any) -> dict[str, Contrast]:
    load = {**POISSON, "rate_rps": rate_rps, "requests": 200, **more}
    slow, fast = (loaded(k, workload=load, slo={"e2el_ms": 1e9}) for k in (None, 3))
    return compare(slow, fast, replications=4, traces=traces(), workers=1).contrasts[0]


def test_what_the_load_fixes_is_not_judged() -> None:
    """Far below saturation both give what arrives, and differ in latency; all requests meet their objectives."""
    found = judged(0.05)
    for name in ("request_throughput", "output_throughput", "request_goodput"):
        assert found[name].ratio is not None
        assert found[name].ratio.mean == pytest.approx(1, abs=0.02)
        assert found[name].verdict == "fixed by the load"
    assert found["mean_tpot_ms"].verdict in ("better", "worse")


def test_an_engine_that_does_not_keep_up_is_judged_by_its_throughput() -> None:
    for found in (judged(1e4), judged(50.0)):
        assert found["output_throughput"].verdict in ("better", "worse")


def test_closed_loops_and_different_loads_are_judged() -> None:
    closed = {"kind": "closed", "concurrency": 4, "requests": 40, "order": "shuffled"}
    a, b = (loaded(k, workload=closed) for k in (None, 3))
    assert compare(a, b, replications=4, traces=traces(), workers=1).contrasts[0]["output_throughput"].verdict != (
        "fixed by the load"
    )
    assert "latency_growth" not in simulate(a, traces()).summary
    a, b = (loaded(3, workload={**POISSON, "rate_rps": rate}) for rate in (0.05, 0.06))
    found = compare(a, b, replications=4, traces=traces(), workers=1).contrasts[0]
    assert found["output_throughput"].verdict == "better"


def test_latency_grows_where_arrivals_outrun_service() -> None:
    """Steps of 0.5 s, one request at a time: they are served slower than four a second, so that a queue grows."""
    costs = {"verifier": {"kind": "linear", "base_s": 0.5, "per_token_s": 0.0}}
    load = {"kind": "poisson", "rate_rps": 4.0, "requests": 200}
    given = scenario(None, workload=load, costs=costs, engine={"max_num_seqs": 1})
    run = simulate(given, traces_of([[0]] * 200))
    table = run.requests.to_pandas()
    service_s, arriving = run.summary["duration"] / 200, table["arrival_s"].max() - table["arrival_s"].min()
    assert run.summary["latency_growth"] == pytest.approx(199 / arriving * service_s - 1, rel=0.1)
    assert run.summary["latency_growth"] == pytest.approx(
        np.polyfit(table["arrival_s"], table["finish_s"] - table["arrival_s"], 1)[0]
    )
