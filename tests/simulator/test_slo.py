"""Goodput under objectives and the price of tokens, against sums over the tables of the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scenarios import random_runs, scenario, traces_of

from calibration.common.errors import ScenarioError
from simulator import RunResult, parse_scenario, simulate

POISSON = {"kind": "poisson", "rate_rps": 4.0, "requests": 60, "order": "shuffled"}


def run(draft_tokens: int | None = 2, **settings: Any) -> RunResult:
    rng = np.random.default_rng(3)
    traces = traces_of([random_runs(rng, int(n)) for n in rng.integers(1, 40, 25)])
    return simulate(scenario(draft_tokens, batch=3, workload=POISSON, **settings), traces)


def milliseconds(result: RunResult) -> pd.DataFrame:
    """Each request's latencies; its longest gap from the decode rounds between its first token and its end.

    That is exact without speculation and with it: a slot emits at least one token in every round.
    """
    table, iterations = result.requests.to_pandas(), result.iterations.to_pandas()
    ends = (iterations.start_s + iterations.duration_s)[iterations.kind == "decode"].to_numpy()
    longest = []
    for row in table.itertuples():
        mine = ends[(ends > row.first_token_s) & (ends <= row.finish_s)]
        longest.append(max(np.diff(np.concatenate(([row.first_token_s], mine))), default=0.0))
    tpot = (table.finish_s - table.first_token_s) / (table.output_tokens - 1).clip(lower=1)
    latency = {"ttft": table.first_token_s - table.arrival_s, "tpot": tpot, "e2el": table.finish_s - table.arrival_s}
    return pd.DataFrame({**latency, "itl": np.array(longest)}) * 1000


def test_nothing_is_said_without_objectives() -> None:
    summary = run().summary
    assert not [name for name in summary if "goodput" in name or "slo" in name or "usd" in name]


@pytest.mark.parametrize(
    "names", [("ttft",), ("tpot",), ("itl",), ("e2el",), ("ttft", "itl"), ("tpot", "e2el", "itl")]
)
def test_goodput_counts_requests_that_keep_all_objectives(names: tuple[str, ...]) -> None:
    latency = milliseconds(run())
    limits = {name: float(latency[name].quantile(0.6)) for name in names}
    result = run(slo={f"{name}_ms": limit for name, limit in limits.items()})
    each = {name: latency[name] <= limit + 1e-9 for name, limit in limits.items()}
    good = np.logical_and.reduce(list(each.values()))
    summary = result.summary
    assert 0 < good.sum() < len(good)
    assert summary["slo_attainment"] == pytest.approx(good.mean())
    assert summary["request_goodput"] == pytest.approx(good.sum() / summary["duration"])
    for name, kept in each.items():
        assert summary[f"slo_attainment_{name}"] == pytest.approx(kept.mean())
    assert {name for name in summary if name.startswith("slo_attainment_")} == {f"slo_attainment_{n}" for n in names}


def test_objectives_do_not_change_the_run() -> None:
    assert run(slo={"ttft_ms": 1.0}).requests.equals(run().requests)


def test_one_output_token_keeps_any_pace() -> None:
    """vLLM counts a TPOT of 0 where there is only one token."""
    result = simulate(scenario(slo={"tpot_ms": 1e-6, "itl_ms": 1e-6}), traces_of([[0]] * 5))
    assert result.summary["slo_attainment"] == 1.0


def test_warm_up_is_left_out_of_goodput() -> None:
    result = run(slo={"e2el_ms": 1500.0}, measure={"warmup_requests": 20})
    table = result.requests.to_pandas().sort_values(["finish_s", "request_id"]).iloc[20:]
    good = ((table.finish_s - table.arrival_s) * 1000 <= 1500).sum()
    assert result.summary["request_goodput"] == pytest.approx(good / result.summary["duration"])


def test_the_price_of_tokens_is_that_of_the_time_they_took() -> None:
    summary = run(
        costs={"usd_per_hour": 7.2, "verifier": {"kind": "linear", "base_s": 0.02}}, draft_tokens=None
    ).summary
    hours = summary["duration"] / 3600
    assert summary["usd_per_million_output_tokens"] == pytest.approx(
        7.2 * hours / (summary["total_output_tokens"] / 1e6)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"slo": {}}, "slo: must state at least one of ttft_ms, tpot_ms, itl_ms, e2el_ms"),
        ({"slo": {"ttft": 3.0}}, "slo.ttft: no such key; did you mean 'ttft_ms'"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms: must be > 0, got 0"),
        ({"slo": {"ttft_ms": "fast"}}, "slo.ttft_ms: must be a number, got 'fast'"),
        ({"costs": {"usd_per_hour": -1.0}}, "costs.usd_per_hour: must be > 0, got -1.0"),
    ],
)
def test_faults_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        parse_scenario({"workload": {"kind": "closed", "concurrency": 1}, **data})


def test_sections_left_out_do_not_change_the_hash() -> None:
    plain = scenario(1)
    assert "slo" not in plain.to_toml()
    assert plain.hash != scenario(1, slo={"ttft_ms": 1.0}).hash
