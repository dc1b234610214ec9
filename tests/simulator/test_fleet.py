"""Several replicas: what is routed where, what a failure leaves, and who waits for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import random_runs, scenario, traces_of

from calibration.common.errors import ReplayError, ScenarioError
from calibration.traces import TraceSet
from simulator import RunResult, Scenario, parse_scenario, simulate

TIMES = ("arrival_s", "start_s", "first_token_s", "finish_s")
VERIFY = {"kind": "linear", "base_s": 0.02, "per_token_s": 0.001}


def small(number: int = 12, seed: int = 0, **settings_: Any) -> TraceSet:
    rng = np.random.default_rng(seed)
    return traces_of([random_runs(rng, int(n)) for n in rng.integers(1, 40, number)], **settings_)


def csv_load(folder: Path, rows: list[tuple[float, int, int]]) -> dict[str, Any]:
    file = folder / f"arrivals-{len(list(folder.iterdir()))}.csv"
    lines = ["arrival_s,prompt_tokens,output_tokens", *(f"{t!r},{p},{o}" for t, p, o in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"kind": "csv", "path": str(file)}


# --- routing


@pytest.mark.parametrize("draft", [None, 2])
def test_a_fleet_of_one_is_an_engine(draft: int | None) -> None:
    workload = {"kind": "poisson", "rate_rps": 6.0, "requests": 60}
    alone = simulate(scenario(draft, workload=workload), small())
    fleet = simulate(scenario(draft, workload=workload, replica=[{"name": "only"}]), small())
    for name in (*TIMES, "engine_seconds"):
        assert fleet.requests[name].to_numpy() == pytest.approx(alone.requests[name].to_numpy())
    assert set(fleet.requests["replica"].to_pylist()) == {"only"}
    assert "replicas" not in alone.summary
    assert fleet.summary["replicas"]["only"]["completed"] == 60
    for name, value in alone.summary.items():
        if isinstance(value, float):
            assert fleet.summary[name] == pytest.approx(value, abs=1e-9)


def test_each_replica_serves_its_share_as_if_it_were_alone(tmp_path: Path) -> None:
    """Round robin of independent arrivals: two replicas are two engines with every second request each."""
    rng = np.random.default_rng(2)
    traces = traces_of([random_runs(rng, 30)], prompts=[20])
    rows = [
        (float(t), int(p), int(o))
        for t, p, o in zip(
            np.cumsum(rng.exponential(0.05, 40)), rng.integers(1, 50, 40), rng.integers(1, 31, 40), strict=True
        )
    ]
    pair = [
        {"name": "fast", "max_num_seqs": 6},
        {"name": "slow", "max_num_seqs": 2, "costs": {"verifier": {**VERIFY, "base_s": 0.08}, "drafter": VERIFY}},
    ]
    both = simulate(scenario(2, workload=csv_load(tmp_path, rows), replica=pair), traces)
    assert both.requests["replica"].to_pylist() == ["fast", "slow"] * 20
    for number, replica in enumerate(pair):
        costs = {"costs": replica["costs"]} if "costs" in replica else {}
        own = scenario(
            2, workload=csv_load(tmp_path, rows[number::2]), engine={"max_num_seqs": replica["max_num_seqs"]}, **costs
        )
        alone = simulate(own, traces)
        mine = both.requests.slice(0).to_pandas().iloc[number::2]
        for name in (*TIMES, "rounds", "accepted_tokens", "engine_seconds"):
            assert mine[name].to_numpy() == pytest.approx(alone.requests[name].to_numpy())
        rounds = both.iterations.to_pandas().query("replica == @replica['name']")
        assert rounds["duration_s"].to_numpy() == pytest.approx(alone.iterations["duration_s"].to_numpy())
        told = both.summary["replicas"][replica["name"]]
        assert told["costs"] == alone.summary["costs"]
        assert told["completed"] == 20
        assert told["emitted_tokens"] == alone.summary["total_output_tokens"]
        assert told["busy_s"] == pytest.approx(float(alone.iterations["duration_s"].to_numpy().sum()))


def test_the_least_loaded_one_gets_the_request(tmp_path: Path) -> None:
    """Long prompts first: by requests they alternate, by tokens the small ones go to the other replica."""
    traces = traces_of([[0] * 50], prompts=[10])
    rows = [(0.0, 1000, 50), (0.001, 10, 50), (0.002, 10, 50), (0.003, 10, 50), (0.004, 10, 50)]
    expected = {"requests": ["a-0", "a-1", "a-0", "a-1", "a-0"], "tokens": ["a-0", "a-1", "a-1", "a-1", "a-1"]}
    for by, names in expected.items():
        fleet = {"replica": [{"name": "a", "count": 2}], "routing": {"replica": {"policy": "least_loaded", "by": by}}}
        result = simulate(scenario(None, batch=8, workload=csv_load(tmp_path, rows), **fleet), traces)
        assert result.requests["replica"].to_pylist() == names


def test_two_choices_are_much_better_than_turns_where_sizes_differ() -> None:
    """Long and short requests at 80% load: knowing loads shortens the queue, and two choices get most of it."""
    runs = [[0] * n for n in (2, 2, 2, 60)]
    load = {"kind": "poisson", "rate_rps": 11.0, "requests": 3000, "order": "shuffled"}
    costs = {"verifier": {"kind": "linear", "base_s": 0.02}}
    waits = {}
    for policy in ("round_robin", "power_of_two_choices", "least_loaded"):
        fleet = {"replica": [{"name": "a", "count": 4}], "routing": {"replica": {"policy": policy}}}
        r = simulate(scenario(None, batch=1, workload=load, costs=costs, **fleet), traces_of(runs)).requests
        waits[policy] = float(np.mean(r["start_s"].to_numpy() - r["arrival_s"].to_numpy()))
    assert waits["least_loaded"] < waits["power_of_two_choices"] < 0.7 * waits["round_robin"]


def test_prefix_affinity_finds_what_round_robin_spreads() -> None:
    """Six prompts, memory for about two of them on each of three replicas."""
    traces = traces_of([[0] * 4] * 6, prompts=[256] * 6)
    load = {"kind": "poisson", "rate_rps": 2.0, "requests": 300, "order": "shuffled"}
    engine = {"max_num_seqs": 4, "enable_prefix_caching": True, "num_gpu_blocks": 40}
    rate = {}
    for policy in ("round_robin", "prefix_affinity"):
        fleet = {"replica": [{"name": "a", "count": 3}], "routing": {"replica": {"policy": policy}}}
        result = simulate(scenario(None, workload=load, engine=engine, **fleet), traces)
        rate[policy] = result.summary["prefix_cache_hit_rate"]
        assert min(part["completed"] for part in result.summary["replicas"].values()) > 0
    assert rate["prefix_affinity"] > 0.65
    assert rate["prefix_affinity"] > rate["round_robin"] + 0.2


def test_a_fleet_out_of_balance_is_balanced_whatever_the_prefix() -> None:
    traces = traces_of([[0] * 200], prompts=[256])
    load = {"kind": "poisson", "rate_rps": 200.0, "requests": 40}
    engine = {"max_num_seqs": 4, "enable_prefix_caching": True}
    counts = []
    for balance in (5, 1000):
        fleet = {
            "replica": [{"name": "a", "count": 2}],
            "routing": {"replica": {"policy": "prefix_affinity", "balance_requests": balance}},
        }
        result = simulate(scenario(None, workload=load, engine=engine, **fleet), traces)
        counts.append(sorted(part["completed"] for part in result.summary["replicas"].values()))
    # Nobody ends while they arrive: the first 6 to one, the next to the other, and now both have the prefix; without
    # the rule all follow the first one.
    assert counts == [[20, 20], [0, 40]]


def clients_load(folder: Path, clients: int) -> dict[str, Any]:
    rows = ["client,t_s,rate_rps,dist,a", *(f"c{i},0,2.0,exponential,1" for i in range(clients))]
    (folder / "clients.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"kind": "clients", "path": str(folder / "clients.csv"), "duration_s": 20.0}


def test_a_client_stays_with_its_replica_while_that_is_up(tmp_path: Path) -> None:
    traces = traces_of([[0] * 3], prompts=[10])
    homes = []
    for failures in ({}, {"failures": [[8.0, 12.0]]}):
        fleet = {
            "replica": [{"name": "a", **failures}, {"name": "b"}, {"name": "c"}],
            "routing": {"replica": {"policy": "session_hash"}},
        }
        plan = scenario(None, batch=8, workload=clients_load(tmp_path, 30), **fleet)
        homes.append((simulate(plan, traces), sources_of(plan, traces)))
    (calm, clients), (broken, _) = homes
    home: dict[str, set[str]] = {}
    for client, replica in zip(clients, calm.requests["replica"].to_pylist(), strict=True):
        home.setdefault(client, set()).add(replica)
    assert all(len(replicas) == 1 for replicas in home.values())
    assert len({min(replicas) for replicas in home.values()}) == 3
    moved = 0
    rows = broken.requests.to_pylist()
    for client, row in zip(clients, rows, strict=True):
        away = row["replica"] not in home[client]
        moved += away
        # Only clients of the failed one move, and only while it is down (or when they were on it as it failed).
        assert not away or (home[client] == {"a"} and row["finish_s"] > 8.0 and row["arrival_s"] < 12.0)
    assert moved > 0


def sources_of(plan: Scenario, traces: TraceSet) -> list[str]:
    """The clients of all requests, in order."""
    from simulator.playback.replay import select_sequences
    from simulator.workload import make_source

    source = make_source(plan, select_sequences(traces, drafter="drafter"))
    return [str(request.client) for request in source.admit(1e9, 10**9)]


# --- failure


@st.composite
def outages(draw: st.DrawFn) -> list[list[float]]:
    times = sorted(draw(st.lists(st.floats(0, 6), min_size=2, max_size=6, unique=True)))
    return [[times[i], times[i + 1]] for i in range(0, len(times) - 1, 2)]


@settings(max_examples=80)
@given(
    st.integers(0, 2**32),
    st.lists(st.one_of(st.none(), outages()), min_size=1, max_size=3),
    st.sampled_from(["round_robin", "least_loaded", "power_of_two_choices", "session_hash", "prefix_affinity"]),
    st.sampled_from([None, 3, "oracle"]),
    st.sampled_from([None, 40, 4]),
    st.booleans(),
)
def test_no_request_is_lost_and_no_token_is_emitted_twice(
    seed: int,
    failures: list[list[list[float]] | None],
    policy: str,
    draft: int | str | None,
    blocks: int | None,
    closed: bool,
) -> None:
    traces = small(seed=seed, prompts=[15] * 12)
    replicas = [{"name": f"r{i}", **({"failures": f} if f else {})} for i, f in enumerate(failures)]
    engine: dict[str, Any] = {"max_num_seqs": 3, "enable_prefix_caching": True}
    if blocks is not None:
        engine |= {"num_gpu_blocks": max(blocks, 5)}
    workload = (
        {"kind": "closed", "concurrency": 7} if closed else {"kind": "poisson", "rate_rps": 8.0, "requests": 30}
    )
    fleet = {"replica": replicas, "routing": {"replica": {"policy": policy}}}
    result = simulate(scenario(draft, workload=workload, engine=engine, **fleet), traces)
    requests, iterations = result.requests.to_pandas(), result.iterations.to_pandas()
    lengths = dict(
        zip(traces.sequences["sequence_id"].to_pylist(), traces.sequences["output_tokens"].to_pylist(), strict=True)
    )
    assert requests["request_id"].tolist() == list(range(12 if closed else 30))
    assert requests["output_tokens"].tolist() == [lengths[name] for name in requests["sequence_id"]]
    # Emitted tokens stay emitted: none is lost, none comes twice, whatever fails.
    assert iterations["emitted_tokens"].sum() == requests["output_tokens"].sum()
    assert result.summary["requeued_requests"] == requests["requeues"].sum()
    for sooner, later in (("arrival_s", "start_s"), ("start_s", "first_token_s"), ("first_token_s", "finish_s")):
        assert (requests[sooner] <= requests[later]).all()
    assert iterations["start_s"].is_monotonic_increasing
    for replica in replicas:
        mine = iterations[iterations["replica"] == replica["name"]]
        starts, ends = mine["start_s"].to_numpy(), (mine["start_s"] + mine["duration_s"]).to_numpy()
        assert (starts[1:] >= ends[:-1] - 1e-12).all()
        for fails_s, back_s in replica.get("failures", ()):
            assert ((ends <= fails_s + 1e-9) | (starts >= back_s - 1e-9)).all()
    busy = sum(result.summary[f"{part}_s"] for part in ("draft", "verify", "prefill", "overhead"))
    assert busy == pytest.approx(iterations["duration_s"].sum())
    parts = result.summary["replicas"]
    assert sum(part["completed"] for part in parts.values()) == len(requests)
    assert sum(part["emitted_tokens"] for part in parts.values()) == requests["output_tokens"].sum()


def test_a_failure_by_hand(tmp_path: Path) -> None:
    """One request, 10 + 5 tokens; steps of 1 s. Fails at 2.5 s: two tokens are out, the third is lost on the way.

    Back at 4 s: one step computes prompt and both tokens and emits the third.
    """
    traces = traces_of([[0] * 5], prompts=[10])
    costs = {"verifier": {"kind": "linear", "base_s": 1.0}}
    plan = scenario(
        None, batch=1, workload=csv_load(tmp_path, [(0.0, 10, 5)]), costs=costs, replica=[{"failures": [[2.5, 4.0]]}]
    )
    result = simulate(plan, traces)
    row = result.requests.to_pylist()[0]
    assert [row[name] for name in TIMES] == [0.0, 0.0, 1.0, 7.0]
    assert (row["requeues"], row["preemptions"]) == (1, 0)
    kinds = [(r["kind"], r["start_s"], r["prefill_tokens"]) for r in result.iterations.to_pylist()]
    assert kinds == [
        ("prefill", 0.0, 10),
        ("decode", 1.0, 0),
        ("prefill", 4.0, 12),
        ("decode", 5.0, 0),
        ("decode", 6.0, 0),
    ]
    # Gaps between emissions: 1 s each but for the one with the failure in it (2 s to 5 s).
    assert result.summary["mean_itl_ms"] == pytest.approx(1000 * (1 + 3 + 1 + 1) / 4)
    assert result.summary["idle_s"] == pytest.approx(2.0)
    assert result.summary["requeued_requests"] == 1


def test_luck_does_not_depend_on_the_replica() -> None:
    """Sampled traces: a request accepts the same, wherever it is served and however often it starts anew."""
    rng = np.random.default_rng(3)
    traces = traces_of([[0] * 40] * 10, probabilities=rng.random((10, 40)).tolist())
    load = {"kind": "poisson", "rate_rps": 5.0}
    calm = simulate(scenario(3, workload=load), traces)
    fleet = {"replica": [{"name": "a", "count": 3}], "routing": {"replica": {"policy": "power_of_two_choices"}}}
    spread = simulate(scenario(3, workload=load, **fleet), traces)
    for name in ("rounds", "drafted_tokens", "accepted_tokens"):
        assert spread.requests[name].equals(calm.requests[name])


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    fleet = {
        "replica": [{"name": "a", "count": 2, "failures": [[1.0, 2.0]]}, {"name": "b"}],
        "routing": {"replica": {"policy": "power_of_two_choices"}},
    }
    load = {"kind": "poisson", "rate_rps": 9.0, "requests": 50}
    runs = [simulate(scenario(2, workload=load, seed=seed, **fleet), small()) for seed in (1, 1, 2)]
    assert runs[0].requests.equals(runs[1].requests)
    assert runs[0].iterations.equals(runs[1].iterations)
    assert runs[0].summary == runs[1].summary
    assert not runs[0].requests.equals(runs[2].requests)


def test_a_replica_with_a_drafter_of_its_own() -> None:
    rng = np.random.default_rng(0)
    traces = iid_traces(0.7, rng, sequences=10, output_tokens=60, drafters=("drafter", "other"))
    fleet = {
        "replica": [
            {"name": "a"},
            {"name": "b", "drafter": {"name": "other"}},
            {"name": "c", "stopping": {"policy": "none"}},
        ]
    }
    mixed = simulate(
        scenario(3, workload={"kind": "poisson", "rate_rps": 2.0, "requests": 30}, **fleet), traces
    ).requests
    for place, drafter, draft in (("a", "drafter", 3), ("b", "other", 3), ("c", "drafter", None)):
        plan = scenario(draft, workload={"requests": 10}, drafter={"name": drafter})
        alone = dict(
            zip(*(simulate(plan, traces).requests[c].to_pylist() for c in ("sequence_id", "rounds")), strict=True)
        )
        mine = [row for row in mixed.to_pylist() if row["replica"] == place]
        assert len(mine) == 10
        assert [row["rounds"] for row in mine] == [alone[row["sequence_id"]] for row in mine]


def test_a_replica_asks_for_a_drafter_that_was_recorded() -> None:
    plan = scenario(3, replica=[{"name": "a"}, {"name": "b", "drafter": {"name": "draftr"}}])
    words = r"replica\[1\].drafter.name: not in the TraceSet, got 'draftr'; did you mean 'drafter'"
    with pytest.raises(ScenarioError, match=words):
        simulate(plan, small())


def test_traces_of_another_device_must_hold_the_same_texts(tmp_path: Path) -> None:
    traces = small()
    same, other = small().write(tmp_path / "same"), small(seed=5).write(tmp_path / "other")
    plan = scenario(2, replica=[{"name": "a"}, {"name": "b", "traces": {"path": str(same)}}])
    assert simulate(plan, traces).summary["completed"] == 12
    plan = scenario(2, replica=[{"name": "a"}, {"name": "b", "traces": {"path": str(other)}}])
    with pytest.raises(ReplayError, match="replica 'b': traces: must hold sequence 'request-0' with"):
        simulate(plan, traces)


# --- order of admission


def served_order(
    folder: Path, batching: dict[str, Any], rows: list[tuple[float, int, int]], **workload: Any
) -> list[int]:
    """In which order one slot serves: the requests by their start."""
    traces = traces_of([[0] * n for n in (1, 2, 3, 4, 5, 6, 7, 8)], domains=("x", "y"), prompts=[5] * 8)
    load = {**csv_load(folder, rows), **workload}
    requests = simulate(scenario(None, batch=1, workload=load, batching=batching), traces).requests
    return [int(i) for i in np.argsort(requests["start_s"].to_numpy())]


def test_orders_of_admission(tmp_path: Path) -> None:
    """Six requests at once behind a first one; sequences of domain x have 1, 3, 5, 7 tokens, of y 2, 4, 6, 8."""
    rows = [(0.0, 5, 8)] + [(0.001 * i, 5, n) for i, n in enumerate((7, 2, 5, 4, 1, 6), start=1)]
    assert served_order(tmp_path, {"policy": "fcfs"}, rows) == [0, 1, 2, 3, 4, 5, 6]
    assert served_order(tmp_path, {"policy": "oracle_shortest"}, rows) == [0, 5, 2, 4, 3, 6, 1]
    # The prediction is the mean of the domain, x: 4, y: 5; the true lengths play no part.
    assert served_order(tmp_path, {"policy": "shortest_predicted_first"}, rows) == [0, 1, 3, 5, 2, 4, 6]
    assert served_order(tmp_path, {"policy": "deadline"}, rows) == [0, 1, 2, 3, 4, 5, 6]


def classed(
    batching: dict[str, Any], seed: int, classes: dict[str, Any], rate: float = 5.0
) -> tuple[RunResult, list[Any]]:
    """300 requests of 10 steps of 20 ms (capacity 5 a second) in service classes."""
    load = {"kind": "poisson", "rate_rps": rate, "requests": 300, "classes": classes}
    plan = scenario(
        None,
        batch=1,
        workload=load,
        batching=batching,
        seed=seed,
        costs={"verifier": {"kind": "linear", "base_s": 0.02}},
    )
    traces = traces_of([[0] * 10], prompts=[5])
    from simulator.playback.replay import select_sequences
    from simulator.workload import make_source

    source = make_source(plan, select_sequences(traces, drafter="drafter"))
    return simulate(plan, traces), source.admit(1e9, 10**9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("batching", "key"),
    [
        ({"policy": "deadline"}, lambda r: r.deadline_s),
        ({"policy": "deadline", "default_s": 2.0}, lambda r: min(r.deadline_s, r.arrival_s + 2.0)),
        ({"policy": "priority"}, lambda r: r.priority),
    ],
)
def test_whoever_starts_is_the_first_of_those_who_wait(batching: dict[str, Any], key: Any, seed: int) -> None:
    classes = {"urgent": {"priority": -1, "deadline_s": 1.0}, "plain": {"weight": 2.0}}
    result, requests = classed(batching, seed, classes)
    start, arrival = (result.requests[name].to_numpy() for name in ("start_s", "arrival_s"))
    for i, request in enumerate(requests):
        waited = [r for j, r in enumerate(requests) if arrival[j] <= start[i] and start[j] > start[i]]
        assert all((key(request), request.id) < (key(r), r.id) for r in waited)


def test_ageing_keeps_the_last_class_from_starving() -> None:
    """Overload by 60%, mostly of the first class: without ageing the others wait until it is over."""
    classes = {"first": {"priority": 0, "weight": 9.0}, "last": {"priority": 1}}
    waits = []
    for ageing in ({}, {"ageing_s": 2.0}):
        result, requests = classed({"policy": "priority", **ageing}, 0, classes, rate=8.0)
        wait = result.requests["start_s"].to_numpy() - result.requests["arrival_s"].to_numpy()
        last = np.array([r.priority == 1 for r in requests])
        waits.append((wait[last].mean(), wait[~last].mean()))
    (never, first), (aged, first_aged) = waits
    assert never > first + 10
    # A class is worth two seconds of waiting, neither more nor less.
    assert aged - first_aged == pytest.approx(2.0, abs=1.0)


def test_a_scenario_of_a_fleet_survives_its_file(tmp_path: Path) -> None:
    fleet = {
        "replica": [
            {"name": "a", "count": 2, "failures": [[1.0, 2.0]], "costs": {"verifier": VERIFY, "drafter": VERIFY}},
            {"name": "b", "max_num_seqs": 2, "stopping": {"policy": "fixed", "draft_tokens": 1}},
        ],
        "routing": {"replica": {"policy": "least_loaded"}},
        "batching": {"policy": "priority", "ageing_s": 3.0},
        "engine": {"max_num_seqs": 4, "num_gpu_blocks": 50, "cudagraph_capture_sizes": [1, 8]},
    }
    plan = scenario(2, **fleet)
    result = simulate(plan, small())
    again = RunResult.read(result.write(tmp_path / "run"))
    assert again.scenario.model_dump() == plan.model_dump()
    assert again.scenario.hash == plan.hash == result.scenario_hash
    assert simulate(again.scenario, small()).requests.equals(result.requests)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"routing": {"replica": {"policy": "least_loaded"}}}, r"routing.replica: needs \[\[replica\]\] tables"),
        ({"replica": [{"nme": "a"}]}, r"replica\[0\].nme: no such key; did you mean 'name'"),
        ({"replica": [{"name": "a"}, {"name": "a"}]}, "replica: must have a name of its own each, got a, a"),
        ({"replica": [{"failures": [[2.0, 1.0]]}]}, r"replica\[0\].failures: must be pairs \[fails at, is back at\]"),
        ({"replica": [{"max_num_seqs": 0}]}, r"replica\[0\].max_num_seqs: must be >= 1, got 0"),
        ({"replica": [{"preemption_mode": "swap"}]}, r"replica\[0\].preemption_mode: needs num_gpu_blocks"),
        ({"replica": [{"costs": {"usd_per_hour": 1.0}}]}, r"replica\[0\].costs.usd_per_hour: must be in \[costs\]"),
        (
            {"replica": [{}], "routing": {"replica": {"policy": "prefix_affinity"}}},
            r"replica\[0\].enable_prefix_caching: must be true for routing by prefix_affinity",
        ),
        (
            {"replica": [{}], "routing": {"replica": {"policy": "round_robbin"}}},
            "routing.replica.policy: no such policy, got 'round_robbin'; did you mean 'round_robin'",
        ),
        ({"batching": {"policy": "fifo"}}, "batching.policy: no such policy, got 'fifo'"),
        ({"engine": {"num_gpu_blocks": 5, "gpu_memory_utilization": 0.9}}, "engine.num_gpu_blocks: must be left out"),
        ({"engine": {"enable_chunked_prefill": True}}, "engine.max_num_batched_tokens: must be given where"),
        (
            {"engine": {"max_num_batched_tokens": 100}},
            "engine.max_num_batched_tokens: must be at least max_num_seqs = 256",
        ),
        ({"engine": {"all_reduce_s": 0.1}}, "engine.all_reduce_s: needs tensor_parallel_size of at least 2"),
        (
            {"engine": {"num_gpu_blocks": 9, "swap_bandwidth_gb_s": 1.0}},
            "engine.swap_bandwidth_gb_s: must be given exactly",
        ),
        ({"engine": {"block_size": 8}}, "engine.block_size: needs num_gpu_blocks"),
        (
            {"engine": {"long_prefill_token_threshold": 8}},
            "engine.long_prefill_token_threshold: needs enable_chunked",
        ),
        ({"engine": {"num_gpu_blocks": 9, "kv_bytes_per_token": 8.0}}, "engine.kv_bytes_per_token: needs gpu_memory"),
    ],
)
def test_faults_are_told_with_their_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        parse_scenario({"workload": {"kind": "poisson", "rate_rps": 1.0}, **change})
