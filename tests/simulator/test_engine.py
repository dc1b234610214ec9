"""The engine against an independent event loop written slot by slot, and against what must hold for any run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import DRAFT, LINEAR, random_runs, scenario, traces_of

from calibration.traces import TraceSet
from simulator import RunResult, simulate

COSTS = {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT}


# --- An engine in plain Python, from the description alone: no arrays, no SimPy, nothing shared with the package. ---


@dataclass
class Job:
    number: int
    prompt: int
    runs: Sequence[int]
    proposals: Sequence[int] | None
    arrival: float
    start: float = 0.0
    times: list[float] = field(default_factory=list)
    out: int = 0
    drafted: int = 0
    accepted: int = 0


def linear(cost: dict[str, Any], tokens: float, context: float) -> float:
    price: float = cost["base_s"] + cost["per_token_s"] * tokens + cost["per_context_token_s"] * context
    return price


def price_of_drafting(drafts: list[int], contexts: list[int], cost: dict[str, Any]) -> float:
    if cost.get("charged") == "per_round":
        return linear(cost, sum(drafts), sum(contexts))
    total = 0.0
    for step in range(max(drafts)):
        drafting = [i for i, draft in enumerate(drafts) if draft > step]
        total += linear(cost, len(drafting), sum(contexts[i] + step for i in drafting))
    return total


def plain_engine(jobs: list[Job], clients: int | None, slots: int, policy: int | str | None, costs: Any) -> list[Job]:
    """Serve `jobs` in order; `clients` = None means that they come at their arrival times."""
    todo, waiting, live, done = deque(jobs), deque[Job](), list[Job](), list[Job]()
    now = 0.0
    for _ in range(min(clients or 0, len(jobs))):
        waiting.append(todo.popleft())
    while todo or waiting or live:
        while clients is None and todo and todo[0].arrival <= now:
            waiting.append(todo.popleft())
        new = [waiting.popleft() for _ in range(min(slots - len(live), len(waiting)))]
        if new:
            for job in new:
                job.start = now
            now += linear(costs["verifier"], sum(job.prompt for job in new), 0) + costs["overhead_s"]
            advance = [1] * len(new)
            live += new
            working = new
        elif live:
            working = live
            contexts = [job.prompt + job.out for job in live]
            drafts, accepts = [], []
            for job in live:
                run = job.runs[job.out]
                want = 0 if policy is None else run if policy == "oracle" else int(policy)
                if job.proposals is not None:
                    want = min(want, job.proposals[job.out])
                drafts.append(want)
                accepts.append(min(run, want))
            runs = policy not in (None, 0)
            draft_s = price_of_drafting(drafts, contexts, costs["drafter"]) if runs else 0.0
            verify_s = linear(costs["verifier"], sum(drafts) + len(live), sum(contexts))
            now += draft_s + verify_s + costs["overhead_s"]
            advance = [min(n + 1, len(job.runs) - job.out) for n, job in zip(accepts, live, strict=True)]
            for job, draft, accept in zip(live, drafts, accepts, strict=True):
                job.drafted += draft
                job.accepted += accept
        else:
            now = todo[0].arrival
            continue
        for job, step in zip(working, advance, strict=True):
            job.out += step
            job.times.append(now)
        for job in [job for job in live if job.out == len(job.runs)]:
            live.remove(job)
            done.append(job)
            if clients is not None and todo:
                todo[0].arrival = now
                waiting.append(todo.popleft())
    return sorted(done, key=lambda job: job.number)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=9))
    own_state = draw(st.booleans())
    alpha = draw(st.sampled_from([0.2, 0.6, 0.9]))
    runs = [random_runs(rng, length, alpha=alpha, own_state=own_state) for length in lengths]
    proposals = None
    if draw(st.booleans()):
        proposals = [[n + int(rng.integers(0, 3)) for n in row] for row in runs]
    return {
        "runs": runs,
        "proposals": proposals,
        "prompts": [int(rng.integers(1, 60)) for _ in lengths],
        "policy": draw(st.sampled_from([None, 0, 1, 3, 7, "oracle"])),
        "slots": draw(st.integers(1, 6)),
        "clients": draw(st.one_of(st.none(), st.integers(1, 8))),
        "rate": draw(st.sampled_from([0.5, 5.0, 50.0])),
        "drafter": {**DRAFT, "charged": draw(st.sampled_from(["per_step", "per_round"]))},
    }


def run_case(case: dict[str, Any]) -> RunResult:
    traces = traces_of(case["runs"], prompts=case["prompts"], proposals=case["proposals"])
    workload: dict[str, Any] = {"kind": "closed", "concurrency": case["clients"]}
    workload |= {"stagger_s": 0.0, "include_startup": True}  # the plain loop knows neither
    if case["clients"] is None:
        workload = {"kind": "poisson", "rate_rps": case["rate"]}
    costs = {**COSTS, "drafter": case["drafter"]}
    return simulate(scenario(case["policy"], batch=case["slots"], workload=workload, costs=costs), traces)


@settings(max_examples=150)
@given(cases())
def test_it_does_what_a_plain_event_loop_does(case: dict[str, Any]) -> None:
    result = run_case(case)
    rows = result.requests.to_pylist()
    jobs = [
        Job(i, case["prompts"][i], run, case["proposals"] and case["proposals"][i], row["arrival_s"])
        for i, (run, row) in enumerate(zip(case["runs"], rows, strict=True))
    ]
    if case["clients"] is not None:
        for job in jobs:
            job.arrival = 0.0
    costs = {**COSTS, "drafter": case["drafter"]}
    expected = plain_engine(jobs, case["clients"], case["slots"], case["policy"], costs)
    gaps: list[float] = []
    for row, job in zip(rows, expected, strict=True):
        assert row["request_id"] == job.number
        assert row["output_tokens"] == len(job.runs) == job.out
        assert (row["rounds"], row["drafted_tokens"]) == (len(job.times) - 1, job.drafted)
        assert row["accepted_tokens"] == job.accepted
        times = (job.arrival, job.start, job.times[0], job.times[-1])
        assert [row[f"{name}_s"] for name in ("arrival", "start", "first_token", "finish")] == pytest.approx(times)
        gaps += [later - sooner for sooner, later in zip(job.times[:-1], job.times[1:], strict=True)]
    if gaps:
        summary = result.summary
        for name, value in (("mean", np.mean(gaps)), ("p95", np.percentile(gaps, 95)), ("std", np.std(gaps))):
            assert summary[f"{name}_itl_ms"] == pytest.approx(1000 * value, abs=1e-6)
    else:
        assert "mean_itl_ms" not in result.summary


@settings(max_examples=60)
@given(cases())
def test_what_holds_for_every_run(case: dict[str, Any]) -> None:
    result = run_case(case)
    requests, iterations = result.requests.to_pandas(), result.iterations.to_pandas()
    # Requests in = requests out, with the recorded lengths, whatever the policy.
    assert requests["sequence_id"].tolist() == [f"request-{i}" for i in range(len(case["runs"]))]
    assert requests["output_tokens"].tolist() == [len(run) for run in case["runs"]]
    # Tokens are conserved between the two tables.
    assert iterations["emitted_tokens"].sum() == requests["output_tokens"].sum()
    assert iterations["drafted_tokens"].sum() == requests["drafted_tokens"].sum()
    assert iterations["accepted_tokens"].sum() == requests["accepted_tokens"].sum()
    assert (requests["accepted_tokens"] <= requests["drafted_tokens"]).all()
    # Time never goes back; iterations do not overlap; nothing happens to a request out of order.
    assert (iterations["duration_s"] > 0).all()
    ends = iterations["start_s"] + iterations["duration_s"]
    assert (iterations["start_s"].to_numpy()[1:] >= ends.to_numpy()[:-1]).all()
    for sooner, later in (("arrival_s", "start_s"), ("start_s", "first_token_s"), ("first_token_s", "finish_s")):
        assert (requests[sooner] <= requests[later]).all()
    assert (iterations["active"] <= case["slots"]).all()
    # First come, first served.
    assert requests["start_s"].is_monotonic_increasing
    # Every second of the engine belongs to somebody.
    assert requests["engine_seconds"].sum() == pytest.approx(iterations["duration_s"].sum())
    parts = iterations[["draft_s", "verify_s", "overhead_s"]].sum(axis=1)
    assert parts.to_numpy() == pytest.approx(iterations["duration_s"].to_numpy())
    summary = result.summary
    busy = sum(summary[f"{part}_s"] for part in ("draft", "verify", "prefill", "overhead"))
    assert busy + summary["idle_s"] == pytest.approx(summary["duration"])


@settings(max_examples=25)
@given(cases())
def test_drafting_nothing_changes_no_token_and_no_time_but_that_of_drafting(case: dict[str, Any]) -> None:
    case["drafter"]["charged"] = "per_step"
    none, nothing = run_case({**case, "policy": None}), run_case({**case, "policy": 0})
    assert nothing.requests.equals(none.requests)
    assert nothing.iterations.equals(none.iterations)


def test_a_drafter_charged_by_the_round_is_paid_where_it_runs() -> None:
    """The oracle's drafter runs even where nothing will be accepted; a policy that asks for nothing lets it rest."""
    traces = traces_of([[0] * 11])
    costs = {**COSTS, "drafter": {**DRAFT, "charged": "per_round"}}
    none, zero, oracle = (simulate(scenario(policy, costs=costs), traces) for policy in (None, 0, "oracle"))
    contexts = sum(7 + t for t in range(1, 11))
    extra = 10 * DRAFT["base_s"] + contexts * DRAFT["per_context_token_s"]
    assert zero.summary["duration"] == none.summary["duration"]
    assert oracle.summary["duration"] - none.summary["duration"] == pytest.approx(extra)


def test_a_fraction_of_verification_is_charged_every_round() -> None:
    costs = {**COSTS, "drafter": {"kind": "fraction_of_verify", "fraction": 0.25}}
    result = simulate(scenario(2, costs=costs), traces_of([[1, 0] * 10, [0] * 20]))
    assert result.summary["draft_s"] == pytest.approx(0.25 * result.summary["verify_s"])


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_at_batch_one_no_fixed_length_beats_the_oracle_when_drafting_is_cheap(alpha: float, k: int) -> None:
    """A token drafted and accepted saves a verifier step; with bits the oracle drafts only such tokens.

    So it wins wherever a draft step costs less than a verifier step's base (here 3 ms against 22 ms).
    """
    traces = iid_traces(alpha, np.random.default_rng(3), sequences=10, output_tokens=80)
    times = [simulate(scenario(policy, batch=1), traces).requests["finish_s"].to_numpy() for policy in ("oracle", k)]
    assert (np.diff(times[0], prepend=0) <= np.diff(times[1], prepend=0) + 1e-12).all()


def test_the_oracle_wastes_nothing() -> None:
    traces = iid_traces(0.6, np.random.default_rng(4), sequences=6, output_tokens=50)
    oracle, fixed = simulate(scenario("oracle"), traces), simulate(scenario(3), traces)
    assert oracle.summary["spec_decode_acceptance_rate"] == 100
    assert oracle.iterations["drafted_tokens"].equals(oracle.iterations["accepted_tokens"])
    assert (oracle.requests["rounds"].to_numpy() <= fixed.requests["rounds"].to_numpy()).all()


def test_a_busy_engine_is_full_and_first_tokens_come_first() -> None:
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=30, output_tokens=40)
    result = simulate(scenario(2, batch=4, workload={"concurrency": 6, "stagger_s": 0.0}), traces)
    iterations = result.iterations.to_pandas()
    decode = iterations[iterations["kind"] == "decode"].reset_index()
    # Six clients on four slots: full, and two waiting, until fewer than six requests are left.
    assert (decode["active"][: len(decode) // 2] == 4).all()
    assert (decode["waiting"][: len(decode) // 2] == 2).all()
    # Whoever is admitted is prefilled before anyone decodes on: never a free slot beside a queue in a decode round.
    assert ((decode["active"] == 4) | (decode["waiting"] == 0)).all()
    assert iterations.loc[0, ["kind", "active", "emitted_tokens", "context_tokens"]].tolist() == ["prefill", 4, 4, 0]
    # Six prompts of 50 tokens, of which four start: context counts prompts and the first tokens.
    assert iterations.loc[1, "context_tokens"] == 4 * 51


def test_progress_counts_to_the_end() -> None:
    heard: list[tuple[int, int]] = []
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=12, output_tokens=20)
    simulate(scenario(2), traces, progress=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (12, 12)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_one_token_answers_end_with_their_prefill() -> None:
    traces: TraceSet = traces_of([[0], [0], [0]])
    result = simulate(scenario(2, batch=2), traces)
    assert result.iterations["kind"].to_pylist() == ["prefill", "prefill"]
    assert "mean_tpot_ms" not in result.summary
    assert "spec_decode_acceptance_rate" not in result.summary
    assert result.summary["spec_decode_num_drafts"] == 0
