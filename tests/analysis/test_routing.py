"""Routers between drafters: plays on tables are what the simulator does, and known answers on made-up traffic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from request_tables import PRICES, table_of, two_kinds
from scenarios import random_runs
from several import several

from analysis.common.bootstrap import ClusterBootstrap
from analysis.common.records import from_json, to_json
from analysis.routing.compare import (
    ALWAYS,
    LABEL,
    MERGED,
    ORACLES,
    Contest,
    alike,
    bandits,
    bounds_together,
    judged_batches,
    play,
    policy_rows,
    verdict,
    write_assigned,
)
from analysis.routing.findings import RoutingFindings
from analysis.routing.served import RequestTable, Server, cheap_prices, own_prices
from analysis.routing.study import RoutingSettings, study_routing
from calibration.common.errors import CostError, ReplayError
from calibration.traces import bundled
from calibration.traces.traceset import subset


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(two_kinds(), ("a", "b"), PRICES)


@pytest.fixture(scope="module")
def table(server: Server) -> RequestTable:
    return server.table(4)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("ucb", {"policy": "ucb"}),
        ("ucb c=0.1", {"policy": "ucb", "exploration": 0.1}),
        ("thompson", {"policy": "thompson"}),
        ("pak_ucb", {"policy": "pak_ucb", "features": "domain"}),
        ("ucb c=0.1, last 12", {"policy": "ucb", "exploration": 0.1, "window": 12}),
    ],
)
def test_a_bandit_played_on_the_table_is_the_simulators(
    server: Server, table: RequestTable, name: str, rule: dict[str, Any]
) -> None:
    order = list(range(len(table.ids)))
    arms = play(bandits(table, 12)[name](0), table, order)
    assert len(set(arms.tolist())) == 2
    np.testing.assert_allclose(table.seconds[order, arms], server.serve(rule, 4).seconds, rtol=1e-9)


def test_a_table_of_choices_is_what_assigned_serves(server: Server, table: RequestTable, tmp_path: Path) -> None:
    chosen = np.random.default_rng(3).integers(0, 2, len(table.ids))
    write_assigned(tmp_path / "choices.csv", table.ids, [table.drafters[arm] for arm in chosen.tolist()])
    served = server.serve({"policy": "assigned", "path": "choices.csv"}, 4, folder=tmp_path)
    np.testing.assert_allclose(table.seconds[np.arange(len(chosen)), chosen], served.seconds, rtol=1e-12)
    oracle = server.serve({"policy": "oracle_request", "by": "seconds"}, 4)
    np.testing.assert_allclose(table.seconds.min(axis=1), oracle.seconds, rtol=1e-9)


def test_routing_wins_by_construction_and_the_classifier_finds_out() -> None:
    settings = RoutingSettings(
        lengths=(2, 4), batches=(), orders=3, growth_requests=60, drift_requests=50, online_lengths=(2, 4), draws=300
    )
    found = study_routing(two_kinds(), prices=[PRICES], settings=settings)
    assert found.classifier is not None
    assert found.classifier.accuracy.value == 1.0
    assert (found.classifier.accuracy.low or 0) < 1.0  # twenty prompts a kind do not prove perfection
    (routing,) = found.prices
    mixed = routing.row("calibrated classifier")
    assert mixed.verdict == "beats it"
    assert mixed.speedup == routing.row(LABEL).speedup  # its domains are all right, so are its choices
    assert mixed.regret.value == pytest.approx(0.0, abs=0.02)
    for domain in ("code", "chat"):
        # On one domain alone its best drafter cannot be beaten by a choice between drafters.
        assert routing.row("calibrated classifier", domain).verdict != "beats it"
        assert routing.row("calibrated classifier", domain).best_single == ("a" if domain == "code" else "b")
    assert routing.row(ORACLES[0]).regret.value == 0.0
    assert all(
        (row.regret.value or 0) > -1e-9
        for row in routing.rows
        if row.policy not in (ORACLES[1], "confidence", MERGED)
    )
    assert routing.row(ORACLES[1]).speedup.value >= routing.row(ORACLES[0]).speedup.value  # type: ignore[operator]
    assert from_json(RoutingFindings, to_json(found), "routing.json") == found


def test_regret_of_the_best_single_drafter_grows_in_a_straight_line() -> None:
    from analysis.routing.compare import regret_growth

    # a loses 1 s on chat, b loses 3 s on code: a is best alone, and its regret is half a second a request.
    table = table_of({"code": (1.0, 4.0), "chat": (2.0, 1.0)}, 10)
    points = regret_growth(table, 80, 5, 4, seed=0)
    still = [point.regret_s.value for point in points if point.policy == ALWAYS + "a"]
    assert still == [pytest.approx(10.0), pytest.approx(20.0), pytest.approx(30.0), pytest.approx(40.0)]
    learned = [p.regret_s.value for p in points if p.policy == "pak_ucb"]
    assert learned[-1] - learned[-2] < learned[0]  # it sees the label, and learns whom to ask


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1.01, 1.2, "beats it"), (0.8, 0.99, "loses to it"), (0.9, 1.1, "cannot tell apart")],
)
def test_verdicts(low: float, high: float, words: str) -> None:
    from analysis.common.bootstrap import Estimate

    assert verdict(Estimate(1.0, low, high, 9)) == words


def drawn_seconds(
    rng: np.random.Generator, table: RequestTable, routers: int, faster: float = 1.0
) -> dict[str, np.ndarray]:
    """Seconds of each drafter, and of `routers` that choose at random; router 0 takes `faster` times as long."""
    requests, drafters = table.seconds.shape
    found = {ALWAYS + name: table.seconds[:, i] for i, name in enumerate(table.drafters)}
    for router in range(routers):
        chosen = table.seconds[np.arange(requests), rng.integers(drafters, size=requests)]
        found[f"router {router}"] = chosen * (faster if router == 0 else 1.0)
    found[ORACLES[0]] = table.seconds.min(axis=1)
    found[ORACLES[1]] = 0.9 * found[ORACLES[0]]
    return found


def noisy_table(rng: np.random.Generator, requests: int) -> RequestTable:
    """Three drafters that are equally fast, but for noise of each request and drafter; two domains."""
    kinds = {"code": (1.0, 1.0, 1.0), "chat": (2.0, 2.0, 2.0)}
    table = table_of(kinds, requests // 2)
    noise = np.exp(rng.normal(0, 0.3, table.seconds.shape) + rng.normal(0, 0.3, (len(table.ids), 1)))
    return dataclasses.replace(table, seconds=table.seconds * noise, plain_s=1.5 * table.plain_s * noise[:, 0])


def test_where_no_router_is_better_at_most_one_study_in_twenty_says_so() -> None:
    """Eight routers that choose at random among equal drafters: on three traffics, and in batches of two sizes."""
    rng, repeats = np.random.default_rng(41), 150
    mixed = domains = batched = left_out = 0
    for _ in range(repeats):
        table = noisy_table(rng, 60)
        seconds = drawn_seconds(rng, table, 8)
        bootstrap = ClusterBootstrap(table.domains, rng, draws=300)
        rows = [r for r in policy_rows(table, seconds, bootstrap, ()) if not r.oracle]
        mixed += any(r.verdict == "beats it" for r in rows if r.domain is None)
        domains += any(r.verdict == "beats it" for r in rows if r.domain is not None)
        played = {batch: (table.plain_s, drawn_seconds(rng, table, 8)) for batch in (4, 8)}
        judged = judged_batches(table.drafters, played, bootstrap, 1)
        batched += any(r.verdict == "beats it" for r in judged if not r.oracle)
        left_out += len(alike(seconds, bootstrap)) < 11
    for wrong in (mixed, domains, batched):
        assert wrong / repeats <= 0.05
    assert left_out / repeats <= 0.05 + 0.054  # nominal 5%; 3 binomial standard errors


def test_at_the_boundary_where_one_drafter_is_best_and_routers_equal_it() -> None:
    """On chat one drafter is far faster and all routers take it; on code all are alike and chosen at random."""
    rng, repeats, wrong = np.random.default_rng(44), 200, 0
    plain = table_of({"code": (1.0, 1.0, 1.0), "chat": (2.0, 6.0, 6.0)}, 36)
    code = np.asarray(plain.domains) == "code"
    for _ in range(repeats):
        table = dataclasses.replace(plain, seconds=plain.seconds * rng.normal(1, 0.15, plain.seconds.shape))
        seconds = drawn_seconds(rng, table, 0)
        for router in range(8):
            arms = np.where(code, rng.integers(3, size=len(code)), 0)
            seconds[f"router {router}"] = table.seconds[np.arange(len(code)), arms]
        bootstrap = ClusterBootstrap(table.domains, rng, draws=300)
        rows = policy_rows(table, seconds, bootstrap, ())
        wrong += any(r.verdict == "beats it" for r in rows if r.domain is None and not r.oracle)
    assert 0 < wrong / repeats <= 0.05


def test_a_single_order_has_no_interval_and_is_refused() -> None:
    with pytest.raises(ReplayError, match="orders must be at least 2, got 1"):
        RoutingSettings(orders=1)


def test_a_router_that_is_faster_is_found_to_beat_the_best_drafter() -> None:
    """Power: a fifth less time on 120 requests, five standard errors, is shown in 8 of 10 studies."""
    rng, repeats, found = np.random.default_rng(42), 40, 0
    for _ in range(repeats):
        table = noisy_table(rng, 120)
        bootstrap = ClusterBootstrap(table.domains, rng, draws=300)
        seconds = drawn_seconds(rng, table, 4, faster=0.8)
        rows = {r.policy: r for r in policy_rows(table, seconds, bootstrap, ()) if r.domain is None}
        row = rows["router 0"]
        found += row.verdict == "beats it"
        assert row.against_together.low < row.against_single.low
        assert row.against_together.value == row.against_single.value
        assert "router 0" in alike(seconds, bootstrap)
    assert found / repeats >= 0.8


def test_bounds_against_the_best_hold_for_whichever_reference_that_is() -> None:
    """Two references that swap places: to beat the best, both must be beaten; to lose to it, one suffices."""
    rng = np.random.default_rng(43)
    slow, fast = np.exp(rng.normal(1, 0.01, 40)), np.exp(rng.normal(0, 0.01, 40))
    between = np.exp(rng.normal(0.5, 0.01, 40))
    bootstrap = ClusterBootstrap(["a"] * 40, rng, draws=300)
    (one, both) = bounds_together([Contest({"x": between}, [slow]), Contest({"x": between}, [slow, fast])], bootstrap)
    assert one["x"][0] > 1
    assert both["x"][1] < 1


def test_larger_batches_replay_choices_through_the_simulator() -> None:
    settings = RoutingSettings(
        lengths=(4,), batches=(4,), orders=2, growth_requests=40, drift_requests=30, online_lengths=(4,), draws=200
    )
    found = study_routing(two_kinds(20), prices=[PRICES], settings=settings)
    rows = {row.policy: row for row in found.prices[0].batches}
    assert rows[LABEL].verdict == "beats it"
    assert rows[LABEL].batch == 4
    single = max(rows[ALWAYS + name].speedup.value or 0 for name in "ab")
    best = next(row for name, row in rows.items() if name.startswith(ALWAYS) and row.speedup.value == single)
    assert best.against_single.value == pytest.approx(1.0)


def test_bundled_traces_end_to_end() -> None:
    """With cheap drafts no drafter is best everywhere, and merging in the free one beats the best one alone."""
    whole = bundled("smollm2-135m-cpu-greedy")
    kept = [
        name
        for name, domain in zip(*(whole.sequences[c].to_pylist() for c in ("sequence_id", "domain")), strict=True)
        if domain in ("code", "grounded", "science")
    ]
    names = ("prompt-lookup", "skip-13-17")
    settings = RoutingSettings(
        lengths=(8,), batches=(), orders=2, growth_requests=36, drift_requests=50, online_lengths=(4,), draws=300
    )
    prices = [cheap_prices(whole, names)]
    found = study_routing(subset(whole, kept), drafters=names, prices=prices, settings=settings)
    assert found.classifier is not None
    assert 0.6 < (found.classifier.accuracy.value or 0) < 1.0
    (routing,) = found.prices
    assert routing.row(ORACLES[1]).verdict == "beats it"
    assert routing.row(MERGED).verdict == "beats it"
    by_request = routing.row(ORACLES[0])  # 36 requests show this for a choice made before, not for all at once
    assert (by_request.against_single.low or 0) > 1
    assert by_request.verdict == "cannot tell apart"
    assert routing.row("calibrated classifier", "science").best_single == "skip-13-17"
    assert routing.row("calibrated classifier", "grounded").best_single == "prompt-lookup"
    assert routing.drift is not None
    assert routing.online is not None


def test_what_cannot_be_routed_is_refused() -> None:
    traces = two_kinds(4)
    with pytest.raises(ReplayError, match="drafters: not in the TraceSet, got 'c'"):
        study_routing(traces, drafters=("a", "c"), prices=[PRICES])
    with pytest.raises(ReplayError, match="routing needs at least two, got a"):
        study_routing(traces, drafters=("a",), prices=[PRICES])
    with pytest.raises(CostError, match="must hold timings or state costs"):
        own_prices(traces)


def test_prompts_without_ids_leave_no_classifier() -> None:
    rng = np.random.default_rng(2)
    runs = {name: [random_runs(rng, 20) for _ in range(8)] for name in ("a", "b")}
    settings = RoutingSettings(
        lengths=(2,), batches=(), orders=2, growth_requests=16, drift_requests=30, online_lengths=(2,), draws=100
    )
    found = study_routing(several(runs, domains=("x", "y")), prices=[PRICES], settings=settings)
    assert found.classifier is None
    assert found.without_classifier == "prompts were recorded without their token ids"
    assert {row.policy for row in found.prices[0].rows} >= {ALWAYS + "a", "ucb", *ORACLES}
    assert LABEL not in {row.policy for row in found.prices[0].rows}
