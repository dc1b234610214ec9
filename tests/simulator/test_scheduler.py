"""The scheduler against one written request by request with real block ids, and against what must always hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import random_runs, scenario, traces_of

from calibration.common.errors import ScenarioError
from simulator import RunResult, simulate

VERIFY = {"kind": "linear", "base_s": 0.02, "per_token_s": 0.001, "per_context_token_s": 0.00001}
DRAFT = {"kind": "linear", "base_s": 0.003, "per_token_s": 0.0002, "per_context_token_s": 0.0, "charged": "per_round"}
COSTS = {"overhead_s": 0.002, "verifier": VERIFY, "drafter": DRAFT}
BYTES_PER_TOKEN = 1000.0
SWAP_GB_S = 0.001


# --- A scheduler in plain Python, after vLLM's description: one request after the other, blocks with numbers. ---


@dataclass
class Job:
    number: int
    prompt: int
    runs: Sequence[int]
    arrival: float
    out: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    swapped: bool = False
    times: list[float] = field(default_factory=list)
    start: float | None = None
    preemptions: int = 0

    @property
    def context(self) -> int:
        return self.prompt + self.out


@dataclass
class Plain:
    """See the test: `k` draft tokens (None: no speculation), everything else as in ``[engine]``."""

    jobs: list[Job]
    k: int | None
    slots: int
    size: int
    budget: int | None
    chunked: bool
    threshold: int | None
    total: int
    swap: bool
    now: float = 0.0

    def run(self) -> list[Job]:
        self.ahead = self.k or 0
        self.free = list(range(self.total))
        self.todo, self.queue = sorted(self.jobs, key=lambda j: (j.arrival, j.number)), []
        self.prefilling: list[Job] = []
        self.decoding: list[Job] = []
        while self.todo or self.queue or self.prefilling or self.decoding:
            while self.todo and self.todo[0].arrival <= self.now:
                self.queue.append(self.todo.pop(0))
            self.swap_s = 0.0
            chunks = self.plan()
            if not chunks and not self.decoding:
                self.now = self.todo[0].arrival
                continue
            self.step(chunks, self.decoding if self.chunked or not chunks else [])
            assert len(self.free) + sum(len(j.blocks) for j in self.jobs) == self.total
        return self.jobs

    def grow(self, job: Job, tokens: int) -> bool:
        need = -(-tokens // self.size) - len(job.blocks)
        if need > len(self.free):
            return False
        for _ in range(need):
            job.blocks.append(self.free.pop())
        return True

    def preempt(self) -> Job:
        computed = self.prefilling[-1].computed if self.prefilling else self.decoding[-1].context - 1
        job = (self.prefilling or self.decoding).pop()
        job.preemptions += 1
        if self.swap and job.out and computed == job.context - 1:
            job.swapped = True
            self.swap_s += self.copy_s(job)
        self.free += job.blocks
        job.blocks, job.computed = [], 0
        self.queue.insert(0, job)
        self.queue.sort(key=lambda j: (j.preemptions == 0, j.arrival, j.number))
        return job

    def copy_s(self, job: Job) -> float:
        return -(-(job.context - 1) // self.size) * self.size * BYTES_PER_TOKEN / (SWAP_GB_S * 1e9)

    def reserve(self) -> bool:
        preempted = False
        for job in list(self.decoding):
            while job in self.decoding and not self.grow(job, job.context + self.ahead):
                self.preempt()
                preempted = True
        return preempted

    def plan(self) -> list[tuple[Job, int]]:
        chunks: list[tuple[Job, int]] = []
        if not self.chunked:
            self.admit(chunks, self.budget)
            if not chunks:
                self.reserve()
            return chunks
        stopped = self.reserve()
        assert self.budget is not None
        budget = self.budget - (1 + self.ahead) * len(self.decoding)
        for job in list(self.prefilling):
            tokens = min(job.context - job.computed, max(budget, 0), self.threshold or 10**9)
            if tokens == 0:
                continue
            ahead = self.ahead if job.computed + tokens == job.context else 0
            while job in self.prefilling and not self.grow(job, job.computed + tokens + ahead):
                self.preempt()
            if job not in self.prefilling:
                stopped = True
                break
            chunks.append((job, tokens))
            budget -= tokens
        if not stopped:
            self.admit(chunks, budget)
        return chunks

    def admit(self, chunks: list[tuple[Job, int]], budget: int | None) -> None:
        while (
            self.queue and len(self.decoding) + len(self.prefilling) < self.slots and (budget is None or budget > 0)
        ):
            job = self.queue[0]
            if job.swapped:
                if not self.grow(job, job.context + self.ahead):
                    return
                job.swapped = False
                job.computed = job.context - 1
                self.swap_s += self.copy_s(job)
                self.decoding.append(self.queue.pop(0))
                continue
            tokens = job.context
            if self.chunked:
                assert budget is not None
                tokens = min(tokens, budget, self.threshold or 10**9)
            elif budget is not None and tokens > budget:
                return
            if not self.grow(job, tokens + (self.ahead if tokens == job.context else 0)):
                return
            chunks.append((job, tokens))
            self.prefilling.append(self.queue.pop(0))
            budget = None if budget is None else budget - tokens

    def step(self, chunks: list[tuple[Job, int]], decoding: list[Job]) -> None:
        start, decoding = self.now, list(decoding)
        verify, draft = VERIFY, DRAFT
        seconds = COSTS["overhead_s"] + verify["base_s"] + self.swap_s  # type: ignore[operator]
        contexts = sum(job.context for job in decoding)
        drafts = (self.k or 0) * len(decoding)
        if decoding:
            seconds += verify["per_token_s"] * (len(decoding) + drafts) + verify["per_context_token_s"] * contexts
            if self.k is not None:
                seconds += draft["base_s"] + draft["per_token_s"] * drafts
        tokens, cached = sum(n for _, n in chunks), sum(job.computed for job, _ in chunks)
        seconds += verify["per_token_s"] * tokens + verify["per_context_token_s"] * cached
        self.now += seconds
        for job in decoding:
            step = min(job.runs[job.out], self.k or 0, len(job.runs) - job.out) + 1
            job.out = min(job.out + step, len(job.runs))
            job.times.append(self.now)
        for job, n in chunks:
            job.start = start if job.start is None else job.start
            job.computed += n
            if job.computed == job.context:
                self.prefilling.remove(job)
                self.decoding.append(job)
                job.out += 1
                job.times.append(self.now)
        for job in list(self.decoding):
            if job.out == len(job.runs):
                self.decoding.remove(job)
                self.free += job.blocks
                job.blocks = []


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    number = draw(st.integers(1, 9))
    k = draw(st.sampled_from([None, 1, 3]))
    size = draw(st.sampled_from([1, 3, 16]))
    prompts = rng.integers(1, 60, number)
    runs = [random_runs(rng, int(rng.integers(1, 40)), own_state=True) for _ in range(number)]
    largest = max(-(-(int(p) + len(r) + (k or 0)) // size) for p, r in zip(prompts, runs, strict=True))
    slots = draw(st.integers(1, 6))
    chunked = draw(st.booleans())
    whole = max(int(p) + len(r) for p, r in zip(prompts, runs, strict=True))
    budget = draw(st.integers(slots, 80)) if chunked else draw(st.sampled_from([None, whole, 2 * whole]))
    return {
        "prompts": prompts.tolist(),
        "runs": runs,
        "k": k,
        "rate": draw(st.sampled_from([1.0, 10.0, 100.0])),
        "slots": slots,
        "size": size,
        "chunked": chunked,
        "budget": max(budget, slots) if budget is not None else None,
        "threshold": draw(st.sampled_from([None, 7])) if chunked else None,
        "total": largest + draw(st.integers(0, 2 * largest)),
        "swap": draw(st.booleans()),
    }


def engine_of(case: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "max_num_seqs": case["slots"],
        "max_num_batched_tokens": case["budget"],
        "enable_chunked_prefill": case["chunked"],
        "long_prefill_token_threshold": case["threshold"],
        "block_size": case["size"],
        "num_gpu_blocks": case["total"],
        "preemption_mode": "swap" if case["swap"] else "recompute",
    }
    if case["swap"]:
        keys |= {"swap_bandwidth_gb_s": SWAP_GB_S, "kv_bytes_per_token": BYTES_PER_TOKEN}
    return {key: value for key, value in keys.items() if value is not None}


def run_case(case: dict[str, Any], **engine: Any) -> RunResult:
    return simulate(
        scenario(
            case["k"],
            workload={"kind": "poisson", "rate_rps": case["rate"]},
            costs=COSTS,
            engine=engine_of(case) | engine,
        ),
        traces_of(case["runs"], prompts=case["prompts"]),
    )


@settings(max_examples=200)
@given(cases())
def test_it_schedules_as_a_plain_scheduler_with_numbered_blocks(case: dict[str, Any]) -> None:
    result = run_case(case)
    rows = result.requests.to_pylist()
    jobs = [
        Job(i, case["prompts"][i], run, row["arrival_s"])
        for i, (run, row) in enumerate(zip(case["runs"], rows, strict=True))
    ]
    keys = ("k", "slots", "size", "budget", "chunked", "threshold", "total", "swap")
    gaps: list[float] = []
    for row, job in zip(rows, Plain(jobs, **{key: case[key] for key in keys}).run(), strict=True):
        times = (job.start, job.times[0], job.times[-1])
        assert [row[f"{name}_s"] for name in ("start", "first_token", "finish")] == pytest.approx(times)
        assert row["preemptions"] == job.preemptions
        assert row["output_tokens"] == job.out
        gaps += np.diff(job.times).tolist()
    assert result.summary["num_preemptions"] == sum(job.preemptions for job in jobs)
    if gaps:
        assert result.summary["mean_itl_ms"] == pytest.approx(1000 * np.mean(gaps))
        assert result.summary["p99_itl_ms"] == pytest.approx(1000 * np.percentile(gaps, 99))


@settings(max_examples=100)
@given(cases(), st.booleans())
def test_what_holds_for_every_run(case: dict[str, Any], caching: bool) -> None:
    result = run_case(case, enable_prefix_caching=caching)
    requests, iterations = result.requests.to_pandas(), result.iterations.to_pandas()
    summary = result.summary
    # Requests in = requests out, with their recorded lengths: no policy and no lack of memory changes a text.
    assert requests["output_tokens"].tolist() == [len(run) for run in case["runs"]]
    assert iterations["emitted_tokens"].sum() == requests["output_tokens"].sum()
    # What is computed: every prompt but what was cached, and what was lost.
    computed = requests["prompt_tokens"].sum() - requests["cached_tokens"].sum()
    if not case["swap"] and not caching:
        anew = iterations["prefill_tokens"].sum() - computed
        # A recomputation also computes the last token, which was emitted but was not yet in memory.
        assert 0 <= anew - summary["recomputed_tokens"] <= summary["num_preemptions"]
    # Memory: never more than there is, and something is held whenever something runs.
    assert (iterations["kv_blocks"] <= case["total"]).all()
    assert (iterations["kv_blocks"] > 0).all()
    assert (iterations["active"] <= case["slots"]).all()
    if case["chunked"]:
        tokens = iterations["prefill_tokens"] + (iterations["emitted_tokens"] > 0) * 0
        assert (tokens <= case["budget"]).all()
    # Every second belongs to somebody, and to some part of the work.
    assert requests["engine_seconds"].sum() == pytest.approx(iterations["duration_s"].sum())
    busy = sum(summary.get(f"{part}_s", 0.0) for part in ("draft", "verify", "prefill", "overhead", "swap"))
    assert busy + summary["idle_s"] == pytest.approx(summary["duration"])
    ends = (iterations["start_s"] + iterations["duration_s"]).to_numpy()
    assert (iterations["start_s"].to_numpy()[1:] >= ends[:-1]).all()
    for sooner, later in (("arrival_s", "start_s"), ("start_s", "first_token_s"), ("first_token_s", "finish_s")):
        assert (requests[sooner] <= requests[later]).all()


def test_without_limits_chunked_prefill_computes_the_same_tokens_in_fewer_steps() -> None:
    rng = np.random.default_rng(0)
    traces = traces_of([random_runs(rng, 40) for _ in range(12)], prompts=[200] * 12)
    load = {"kind": "poisson", "rate_rps": 8.0}
    plain = simulate(scenario(2, batch=8, workload=load), traces)
    engine = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_chunked_prefill": True}
    chunked = simulate(scenario(2, batch=8, workload=load, engine=engine), traces)
    for result in (plain, chunked):
        assert result.iterations["prefill_tokens"].to_numpy().sum() == 12 * 200
    kinds = set(chunked.iterations["kind"].to_pylist())
    assert kinds == {"prefill", "mixed", "decode"}
    # That is what it is for: no decode waits for a whole prompt.
    assert chunked.summary["p99_itl_ms"] < plain.summary["p99_itl_ms"]


def test_a_mixed_step_costs_what_both_parts_cost_with_one_base() -> None:
    traces = traces_of([[0] * 30, [0] * 3], prompts=[10, 64])
    engine = {"max_num_seqs": 2, "max_num_batched_tokens": 18, "enable_chunked_prefill": True}
    result = simulate(scenario(1, workload={"concurrency": 2}, costs=COSTS, engine=engine), traces)
    rows = [row for row in result.iterations.to_pylist() if row["kind"] == "mixed"]
    # The first step computes the first prompt and 8 tokens of the second one; then 16 fit beside the decode.
    assert [row["prefill_tokens"] for row in rows] == [16, 16, 16, 8]
    for step, row in enumerate(rows):
        context = 11 + step
        assert row["context_tokens"] == context + 8 + 16 * step
        verify_s = 0.02 + 0.001 * (2 + row["prefill_tokens"]) + 0.00001 * row["context_tokens"]
        assert row["verify_s"] == pytest.approx(verify_s)
        assert row["prefill_s"] == pytest.approx(0.001 * row["prefill_tokens"] + 0.00001 * (8 + 16 * step))
        assert row["duration_s"] == pytest.approx(verify_s + 0.003 + 0.0002 + 0.002)


def test_rejected_tokens_give_their_slots_back() -> None:
    """Blocks always cover the committed tokens and K more, whatever was drafted in vain before."""
    traces = traces_of([[0] * 60], prompts=[5])
    for k in (0, 3, 7):
        result = simulate(
            scenario(k, batch=1, engine={"max_num_seqs": 1, "num_gpu_blocks": 40, "block_size": 4}), traces
        )
        decode = [row for row in result.iterations.to_pylist() if row["kind"] == "decode"]
        assert [row["kv_blocks"] for row in decode] == [-(-(5 + t + k) // 4) for t in range(1, 60)]
        assert result.summary["peak_kv_cache_usage"] == pytest.approx(decode[-1]["kv_blocks"] / 40)


def test_the_oracle_reserves_what_it_drafts() -> None:
    traces = traces_of([[3, 2, 1, 0] * 5], prompts=[5])
    result = simulate(
        scenario("oracle", batch=1, engine={"max_num_seqs": 1, "num_gpu_blocks": 9, "block_size": 4}), traces
    )
    decode = [row for row in result.iterations.to_pylist() if row["kind"] == "decode"]
    contexts = np.cumsum([6] + [row["emitted_tokens"] for row in decode])[:-1]
    drafted = [row["drafted_tokens"] for row in decode]
    assert [row["kv_blocks"] for row in decode] == [
        max(-(-(c + d) // 4) for c, d in zip(contexts[: i + 1], drafted[: i + 1], strict=True))
        for i in range(len(decode))
    ]


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"num_gpu_blocks": 2}, r"must hold at least 3 blocks of 16 tokens for request 0 \(30 \+ 12 tokens"),
        (
            {"max_num_batched_tokens": 29},
            "max_num_batched_tokens: must be at least 30, the longest prefill of request 0",
        ),
        (
            {"max_num_batched_tokens": 40, "num_gpu_blocks": 9},
            "max_num_batched_tokens: must be at least 41, the longest prefill of request 0",
        ),
    ],
)
def test_what_can_never_run_is_refused(engine: dict[str, int], words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        simulate(scenario(2, engine={"max_num_seqs": 4, **engine}), traces_of([[0] * 12], prompts=[30]))


def test_captured_sizes_pad_the_verified_tokens() -> None:
    traces = traces_of([[0] * 10])
    sizes = [8, 1, 4]
    engine = {"max_num_seqs": 4, "cudagraph_capture_sizes": sizes}
    for k, padded in ((0, 1), (1, 4), (3, 4), (4, 8), (7, 8), (8, 9)):
        result = simulate(scenario(k, batch=1, costs=COSTS, engine=engine), traces)
        rows = [row for row in result.iterations.to_pylist() if row["kind"] == "decode"]
        expected = [0.02 + 0.001 * padded + 0.00001 * row["context_tokens"] for row in rows]
        assert [row["verify_s"] for row in rows] == pytest.approx(expected)
    assert result.summary["costs"]["cudagraph_capture_sizes"] == [1, 4, 8]


def test_tensor_parallelism_divides_stated_costs_and_says_so() -> None:
    traces = traces_of([[0] * 10])
    alone = simulate(scenario(2, batch=1, costs=COSTS), traces)
    engine = {"max_num_seqs": 4, "tensor_parallel_size": 4, "all_reduce_s": 0.001}
    spread = simulate(scenario(2, batch=1, costs=COSTS, engine=engine), traces)
    one, four = (result.iterations["verify_s"].to_numpy() for result in (alone, spread))
    assert four == pytest.approx(one / 4 + 0.001)
    assert spread.iterations["draft_s"].equals(alone.iterations["draft_s"])
    assert spread.summary["costs"]["verify"]["sharding"] == "assumed linear"
