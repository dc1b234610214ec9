"""Engines that serve several drafters at once: what is conserved, what is charged, and who can never lose."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scenarios import DRAFT, LINEAR, random_runs
from several import COSTS, routed, several

from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator import RunResult, simulate

CHEAP = {"kind": "linear", "base_s": 0.0007, "per_token_s": 0.0001, "per_context_token_s": 0.000001}
RULES: dict[str, dict[str, Any]] = {
    "static": {"drafter": "b"},
    "by_domain": {"table": {"chat": "a"}, "default": "b"},
    "ucb": {},
    "thompson": {},
    "pak_ucb": {"features": "domain"},
    "oracle_request": {},
    "oracle_round": {},
    "merged": {},
    "confidence": {"probe_tokens": 2},
    "classifier": {"folds": 2},
}


def drawn(seed: int, *, own_state: bool = True, sampled: bool = False, number: int = 9) -> TraceSet:
    """Sequences of two drafters, in two domains, with prompts and signals."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 30, number).tolist()
    alphas = {"a": 0.8, "b": 0.5}
    runs = {
        name: [random_runs(rng, n, alpha=alpha, own_state=own_state) for n in lengths]
        for name, alpha in alphas.items()
    }
    prompts = [rng.integers(0, 50, int(rng.integers(3, 12))).tolist() for _ in lengths]
    chances = {name: [rng.random(n).tolist() for n in lengths] for name in alphas} if sampled else None
    proposals = {"b": [[n + int(rng.integers(0, 2)) for n in row] for row in runs["b"]]} if seed % 2 else None
    return several(
        runs,
        prompts=prompts,
        probabilities=chances,
        proposals=proposals,
        domains=("chat", "math"),
        felt={"a": 0.6, "b": 0.4},
    )


def rounds(result: RunResult) -> list[int]:
    by_id: list[int] = result.requests["rounds"].to_pylist()
    return by_id


@settings(max_examples=30)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["greedy", "sampled"]),
    st.sampled_from([0, 2, "oracle", "goodput", "confidence", "budget"]),
    st.booleans(),
    st.booleans(),
)
def test_one_drafter_for_all_is_that_drafter_alone(
    seed: int, mode: str, stopping: Any, paged: bool, longer: bool
) -> None:
    traces = drawn(seed, sampled=mode == "sampled")
    table: dict[str, Any] = {"policy": stopping} if isinstance(stopping, str) else {}
    if stopping == "goodput":
        table |= {"max_draft_tokens": 4}
    elif stopping == "confidence":
        table |= {"threshold": 0.5, "max_draft_tokens": 4}
    elif stopping == "budget":
        table |= {"estimate": "acceptance", "max_draft_tokens": 4}
    engine = {"max_num_seqs": 3, "num_gpu_blocks": 12, "block_size": 8} if paged else {"max_num_seqs": 3}
    workload: dict[str, Any] = {"kind": "poisson", "rate_rps": 4.0, "requests": 15, "order": "shuffled"}
    if longer:
        workload["lengths"] = {"kind": "drawn", "output": {"kind": "constant", "tokens": 33}}
    settings_: dict[str, Any] = {"engine": engine, "workload": workload, "seed": 5}
    choice = table or stopping
    try:
        alone = simulate(routed(None, choice, drafters=["b"], costs={**COSTS, "drafter": CHEAP}, **settings_), traces)
    except ReplayError as refused:
        if "none does: record longer ones" not in str(refused):
            raise
        reject()  # a draw without a rollout that goes on behind its first wrong token
    settings_["costs"] = {**COSTS, "drafters": {"b": CHEAP}}
    for rule in (
        {"policy": "static", "drafter": "b"},
        {"policy": "by_domain", "table": {"math": "b"}, "default": "b"},
    ):
        together = simulate(routed(rule, choice, **settings_), traces)
        assert together.requests.equals(alone.requests)
        assert together.iterations.equals(alone.iterations)


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize("seed", [3, 4])
def test_tokens_are_conserved_and_the_text_stays_as_it_is(policy: str, seed: int) -> None:
    traces = drawn(seed)
    result = simulate(routed({"policy": policy, **RULES[policy]}), traces)
    requests, iterations = result.requests, result.iterations
    assert requests["output_tokens"].to_pylist() == traces.sequences["output_tokens"].to_pylist()
    for name in ("drafted_tokens", "accepted_tokens"):
        assert sum(iterations[name].to_pylist()) == sum(requests[name].to_pylist())
    assert sum(iterations["emitted_tokens"].to_pylist()) == sum(requests["output_tokens"].to_pylist())
    # Every round of a request emits what was accepted and one more, but the last one may be cut by the end.
    emitted = np.array(requests["output_tokens"]) - 1
    assert (emitted <= np.array(requests["accepted_tokens"]) + np.array(requests["rounds"])).all()
    told = result.summary["drafter_routing"]
    assert told["policy"] == policy
    tally = told["drafters"].values()
    assert sum(part["rounds"] for part in tally) == sum(rounds(result))
    assert sum(part["accepted_tokens"] for part in tally) == sum(requests["accepted_tokens"].to_pylist())
    again = simulate(routed({"policy": policy, **RULES[policy]}), traces)
    assert again.requests.equals(requests)
    assert again.iterations.equals(iterations)
    assert again.summary == result.summary


@pytest.mark.parametrize("policy", [name for name in RULES if name not in ("merged", "classifier", "confidence")])
def test_sampled_text_stays_as_it_is_too(policy: str) -> None:
    traces = drawn(8, sampled=True)
    result = simulate(routed({"policy": policy, **RULES[policy]}), traces)
    assert result.requests["output_tokens"].to_pylist() == traces.sequences["output_tokens"].to_pylist()
    assert result.summary["provenance"]["replay"] == "exact in distribution (sampled)"


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.one_of(st.integers(0, 5), st.just("oracle")), st.booleans(), st.booleans())
def test_oracles_never_take_more_rounds_than_any_drafter(seed: int, k: Any, own_state: bool, sampled: bool) -> None:
    traces = drawn(seed, own_state=own_state, sampled=sampled)
    singles = np.array([rounds(simulate(routed(None, k, drafters=[name]), traces)) for name in ("a", "b")])
    request = rounds(simulate(routed({"policy": "oracle_request"}, k), traces))
    every = rounds(simulate(routed({"policy": "oracle_round"}, k), traces))
    assert request == singles.min(axis=0).tolist()
    assert (np.array(every) <= request).all()


CHARGES: list[dict[str, Any]] = [
    CHEAP,
    {**CHEAP, "charged": "per_round"},
    {"kind": "fraction_of_verify", "fraction": 0.3},
    {**DRAFT, "base_s": 0.03},
]


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.one_of(st.integers(0, 5), st.just("oracle")),
    st.sampled_from(CHARGES),
    st.booleans(),
)
def test_alone_on_the_engine_oracles_of_time_never_take_longer_than_any_drafter(
    seed: int, k: Any, price: dict[str, Any], padded: bool
) -> None:
    """And what `oracle_request` takes is the lesser of the two, request by request."""
    traces = drawn(seed)
    engine = {"max_num_seqs": 1, **({"cudagraph_capture_sizes": [1, 2, 4, 8]} if padded else {})}
    spent = {}
    for name in ("a", "b"):
        costs = {**COSTS, "drafter": price if name == "b" else DRAFT}
        spent[name] = decoding(
            simulate(routed(None, k, drafters=[name], batch=1, engine=engine, costs=costs), traces)
        )
    costs = {**COSTS, "drafters": {"b": price}}
    for policy in ("oracle_request", "oracle_round"):
        rule = {"policy": policy, "by": "seconds"}
        spent[policy] = decoding(simulate(routed(rule, k, batch=1, engine=engine, costs=costs), traces))
    assert spent["oracle_request"] == pytest.approx(np.minimum(spent["a"], spent["b"]))
    assert (spent["oracle_round"] <= spent["oracle_request"] + 1e-9).all()


def decoding(result: RunResult) -> np.ndarray:
    """Seconds from the first token to the last."""
    return np.asarray(result.requests["finish_s"].to_numpy() - result.requests["first_token_s"].to_numpy())


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 5))
def test_a_merged_draft_accepts_no_less_than_any_of_its_parts(seed: int, k: int) -> None:
    """Drafters that see tokens alone: then a round that comes further never takes more rounds to the end."""
    traces = drawn(seed - seed % 2, own_state=False)
    merged = rounds(simulate(routed({"policy": "merged"}, k), traces))
    for name in ("a", "b"):
        assert (np.array(merged) <= rounds(simulate(routed(None, k, drafters=[name]), traces))).all()
    assert merged == rounds(simulate(routed({"policy": "oracle_round"}, k), traces))


def linear(cost: dict[str, Any], tokens: float, context: float) -> float:
    price: float = cost["base_s"] + cost["per_token_s"] * tokens + cost["per_context_token_s"] * context
    return price


def lock_step(cost: dict[str, Any], drafts: list[int], contexts: list[int]) -> float:
    total = 0.0
    for step in range(max(drafts, default=0)):
        drafting = [i for i, draft in enumerate(drafts) if draft > step]
        total += linear(cost, len(drafting), sum(contexts[i] + step for i in drafting))
    return total


def test_each_drafter_drafts_in_lock_step_for_its_own_slots() -> None:
    """Four requests begin together; the first round is worked out by hand."""
    runs = {"a": [[2] * 8 + [0]] * 4, "b": [[1] * 8 + [0]] * 4}
    traces = several(runs, domains=("chat", "math", "math"), prompts=[[1]] * 4)
    costs = {**COSTS, "drafters": {"b": CHEAP}}
    rule = {"policy": "by_domain", "table": {"chat": "a", "math": "b"}}
    result = simulate(routed(rule, 3, costs=costs), traces)
    row = result.iterations.to_pylist()[1]
    contexts = [2] * 4  # a prompt token and the first output token
    draft_s = lock_step(DRAFT, [3, 3], contexts[:2]) + lock_step(CHEAP, [3, 3], contexts[:2])
    verify_s = linear(LINEAR, 4 + 12, 8)
    assert (row["draft_s"], row["verify_s"]) == pytest.approx((draft_s, verify_s))
    assert (row["drafted_tokens"], row["accepted_tokens"], row["emitted_tokens"]) == (12, 2 + 1 + 1 + 2, 10)
    assert result.summary["costs"]["draft"]["b"]["base_s"] == CHEAP["base_s"]


@pytest.mark.parametrize(("domains", "drafts"), [(("chat", "math", "math"), True), (("math", "chat", "chat"), False)])
def test_a_policy_that_weighs_prices_sees_those_of_the_drafter_with_most_slots(
    domains: tuple[str, ...], drafts: bool
) -> None:
    """Drafter a is too dear to draft at all, b all but free; three slots are served."""
    traces = several({name: [[1, 0] * 4] * 3 for name in ("a", "b")}, domains=domains, prompts=[[1]] * 3)
    dear = {"kind": "linear", "base_s": 10, "per_token_s": 1, "per_context_token_s": 0}
    rule = {"policy": "by_domain", "table": {"chat": "a", "math": "b"}}
    goodput = {"policy": "goodput", "max_draft_tokens": 3, "start_acceptance": 0.9}
    costs = {**COSTS, "drafters": {"a": dear, "b": CHEAP}}
    row = simulate(routed(rule, goodput, batch=3, costs=costs), traces).iterations.to_pylist()[1]
    assert (row["drafted_tokens"] > 0) == drafts


def test_a_merged_draft_pays_for_both_drafts_and_verifies_their_union() -> None:
    # The first round: runs 3 and 1 of drafts of 4: the union has 4 + 4 - 1 nodes, as they share one token for sure.
    runs = {"a": [[0, 3, 0, 0, 0, 1, 0, 0]], "b": [[0, 1, 0, 0, 0, 3, 2, 1]]}
    traces = several(runs, prompts=[[1]])
    result = simulate(routed({"policy": "merged"}, 4, batch=1, costs={**COSTS, "drafters": {"b": CHEAP}}), traces)
    first, second = result.iterations.to_pylist()[1:3]
    assert (first["drafted_tokens"], first["accepted_tokens"], first["emitted_tokens"]) == (7, 3, 4)
    assert first["draft_s"] == pytest.approx(lock_step(DRAFT, [4], [2]) + lock_step(CHEAP, [4], [2]))
    assert first["verify_s"] == pytest.approx(linear(LINEAR, 8, 2))
    assert (second["accepted_tokens"], second["emitted_tokens"]) == (3, 3)
    assert rounds(result) == [2]


def test_confidence_keeps_the_surer_drafter_and_pays_for_both() -> None:
    runs = {"a": [[0] + [3, 2, 1, 0] * 3], "b": [[0] + [0] * 12]}
    traces = several(runs, prompts=[[1]], felt={"a": 0.9, "b": 0.8})
    result = simulate(routed({"policy": "confidence", "probe_tokens": 1}, 3, batch=1), traces)
    alone = simulate(routed(None, 3, drafters=["a"], batch=1), traces)
    assert rounds(result) == rounds(alone)
    first, single = result.iterations.to_pylist()[1], alone.iterations.to_pylist()[1]
    assert first["draft_s"] == pytest.approx(lock_step(DRAFT, [3], [2]) + lock_step(DRAFT, [1], [2]))
    assert (first["verify_s"], first["drafted_tokens"]) == (single["verify_s"], single["drafted_tokens"])
    whole = simulate(routed({"policy": "confidence"}, 3, batch=1), traces).iterations.to_pylist()[1]
    assert whole["draft_s"] == pytest.approx(2 * lock_step(DRAFT, [3], [2]))


def test_confidence_that_tells_nothing_chooses_as_told() -> None:
    """The drafter that is worse but surer of itself is the one that is kept."""
    traces = several({"a": [[3] * 18 + [0] * 3] * 3, "b": [[0] * 21] * 3}, felt={"a": 0.3, "b": 0.9})
    result = simulate(routed({"policy": "confidence"}), traces)
    assert result.summary["drafter_routing"]["drafters"]["a"]["rounds"] == 0
    assert rounds(result) == rounds(simulate(routed(None, 3, drafters=["b"]), traces))


def test_specialists_merged_accept_more_than_routed_and_routed_more_than_either_alone() -> None:
    """The order that TAPS reports, for two specialists that are surer of themselves on their own domain."""
    rng = np.random.default_rng(5)
    pairs = {"a": (0.85, 0.4), "b": (0.4, 0.85)}
    runs = {name: [random_runs(rng, 60, alpha=pair[i % 2]) for i in range(30)] for name, pair in pairs.items()}
    felt = {name: [pair[i % 2] for i in range(30)] for name, pair in pairs.items()}
    traces = several(runs, domains=("chat", "math"), felt=felt)
    merged, by_confidence = (
        sum(rounds(simulate(routed(rule, 5), traces)))
        for rule in ({"policy": "merged"}, {"policy": "confidence", "probe_tokens": 1})
    )
    singles = [sum(rounds(simulate(routed(None, 5, drafters=[name]), traces))) for name in ("a", "b")]
    assert merged < by_confidence < 0.85 * min(singles)


def test_a_request_keeps_its_drafter_through_preemption() -> None:
    """So its rounds are those of one drafter, whatever memory does."""
    traces = drawn(12, number=12)
    swap = {"preemption_mode": "swap", "swap_bandwidth_gb_s": 1.0, "kv_bytes_per_token": 1000}
    engine = {"max_num_seqs": 6, "num_gpu_blocks": 14, "block_size": 4, **swap}
    result = simulate(routed({"policy": "ucb"}, 2, engine=engine, workload={"concurrency": 6}), traces)
    assert sum(result.requests["preemptions"].to_pylist()) > 0
    singles = np.array([rounds(simulate(routed(None, 2, drafters=[name], batch=1), traces)) for name in ("a", "b")])
    assert all(n in singles[:, i] for i, n in enumerate(rounds(result)))
    assert result.requests["output_tokens"].to_pylist() == traces.sequences["output_tokens"].to_pylist()


@pytest.mark.parametrize("policy", RULES)
@pytest.mark.parametrize("stopping", [2, "oracle"])
def test_no_memory_is_lost_and_none_is_written_that_was_not_taken(policy: str, stopping: Any) -> None:
    traces = drawn(12, number=12)
    engine = {"max_num_seqs": 6, "num_gpu_blocks": 18, "block_size": 4}
    scenario = routed({"policy": policy, **RULES[policy]}, stopping, engine=engine, workload={"concurrency": 6})
    result = simulate(scenario, traces)
    assert result.requests["output_tokens"].to_pylist() == traces.sequences["output_tokens"].to_pylist()
    blocks = result.iterations["kv_blocks"].to_numpy()
    assert blocks.max() <= 18
    decode = result.iterations.to_pandas().query("kind == 'decode'")
    # Everything that is cached, and everything drafted that stays, has its place.
    written = decode["context_tokens"] + decode["accepted_tokens"]
    assert (decode["kv_blocks"] * 4 >= written).all()


def test_a_merged_draft_keeps_room_for_all_its_parts() -> None:
    traces = several({"a": [[0] * 9], "b": [[0] * 9]}, prompts=[[1] * 6])
    engine = {"max_num_seqs": 1, "num_gpu_blocks": 50, "block_size": 1}
    for policy, ahead in (("merged", 6), ("oracle_round", 3)):
        result = simulate(routed({"policy": policy}, 3, engine=engine), traces)
        assert result.iterations.to_pylist()[1]["kv_blocks"] == 7 + ahead


def test_replicas_route_for_themselves_and_share_what_was_compiled() -> None:
    traces = drawn(6, number=20)
    fleet: dict[str, Any] = {"replica": [{"name": "x", "count": 2}, {"name": "own", "drafter": {"name": "b"}}]}
    result = simulate(routed({"policy": "ucb"}, 2, batch=2, workload={"concurrency": 6}, **fleet), traces)
    told = result.summary["drafter_routing"]
    assert set(told) == {"x-0", "x-1"}
    by_replica: dict[str, int] = defaultdict(int)
    for row in result.requests.to_pylist():
        by_replica[row["replica"]] += row["rounds"]
    for name, part in told.items():
        assert sum(drafter["rounds"] for drafter in part["drafters"].values()) == by_replica[name]
    assert result.requests["output_tokens"].to_pylist() == traces.sequences["output_tokens"].to_pylist()


def test_only_sequences_that_all_drafters_were_recorded_on_are_served() -> None:
    traces = drawn(2)
    keep = [row for row in traces.positions.to_pylist() if (row["drafter"], row["sequence_id"]) != ("b", "request-3")]
    fewer = TraceSet.build(
        traces.manifest,
        {
            "sequences": traces.sequences,
            "positions": type(traces.positions).from_pylist(keep, traces.positions.schema),
        },
    )
    for k in (2, None):
        result = simulate(routed({"policy": "static", "drafter": "a"}, k), fewer)
        assert "request-3" not in result.requests["sequence_id"].to_pylist()
        assert result.requests.num_rows == 8
