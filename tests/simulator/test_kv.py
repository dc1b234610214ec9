"""KV blocks: the pool against numbered blocks, conservation at every event, and what prefix caching finds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scenarios import random_runs, scenario, traces_of

import simulator.serving.engine
from calibration.common.errors import CostError, ScenarioError
from calibration.traces import DeviceInfo, Manifest
from calibration.traces.manifest import ModelInfo
from simulator import simulate
from simulator.scenario.fleet import EngineSettings
from simulator.serving.kv import BlockPool, block_bytes, chain, num_blocks
from simulator.serving.scheduler import Plan, Scheduler

BLOCKS = 12


class Pools(RuleBasedStateMachine):
    """A pool, and the same memory as a list of blocks that are really there, each with what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, caching=True)
        self.queue: list[int | None] = [None] * BLOCKS  # free blocks, the longest unused first, and their keys
        self.leases: list[tuple[list[int], int]] = []  # of each holder: keys, and private blocks

    def held(self) -> Counter[int]:
        return Counter(key for keys, _ in self.leases for key in keys)

    @precondition(lambda self: self.pool.free > 0)
    @rule(data=st.data(), keys=st.lists(st.integers(0, 5), unique=True, max_size=5))
    def start(self, data: st.DataObject, keys: list[int]) -> None:
        """A request comes: it leases the known beginning of its chain and takes private blocks for the rest."""
        names = chain(7, keys)
        held = self.held()
        known = 0
        while known < len(names) and (names[known] in held or names[known] in self.queue):
            known += 1
        assert self.pool.known(names) == known
        idle = sum(key in self.queue for key in names[:known])
        assert self.pool.idle(names[:known]) == idle
        if idle > self.pool.free:
            return
        self.pool.lease(names[:known])
        for key in names[:known]:
            if key in self.queue:
                self.queue.remove(key)
        private = data.draw(st.integers(0, self.pool.free))
        self.pool.take(private)
        del self.queue[:private]
        published = min(private, len(names) - known)
        held = self.held()
        self.pool.publish(names[known : known + published])
        for key in names[known : known + published]:
            # Known by now only if it stands behind a gap of its chain; its own block is free then.
            if key in self.queue:
                self.queue.remove(key)
                self.queue.append(None)
            elif key in held:
                self.queue.append(None)
        self.leases.append((names[: known + published], private - published))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        keys, private = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.pool.release(keys, private)
        self.queue += [None] * private
        held = self.held()
        self.queue += [key for key in reversed(keys) if key not in held]

    @precondition(lambda self: self.leases and self.pool.free > 0)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(1, self.pool.free))
        place = data.draw(st.integers(0, len(self.leases) - 1))
        self.pool.take(number)
        del self.queue[:number]
        keys, private = self.leases[place]
        self.leases[place] = (keys, private + number)

    @invariant()
    def blocks_are_conserved(self) -> None:
        shared = len(self.held())
        private = sum(number for _, number in self.leases)
        assert self.pool.shared == shared
        assert self.pool.used == shared + private
        assert self.pool.free == len(self.queue) == BLOCKS - shared - private

    @invariant()
    def the_same_content_is_known(self) -> None:
        for key in range(6):
            name = chain(7, [key])
            assert self.pool.known(name) == (name[0] in self.held() or name[0] in self.queue)

    def teardown(self) -> None:
        for keys, private in self.leases:
            self.pool.release(keys, private)
        assert self.pool.free == BLOCKS
        self.pool.take(BLOCKS)
        assert self.pool.known(chain(7, [0])) == 0


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=150, stateful_step_count=40)


class Watched(Scheduler):
    """A scheduler whose memory is counted anew, job by job, at every event."""

    seen = 0

    def check(self) -> None:
        live = self.decoding.live
        blocks = live[-1].tolist()
        running = [(job, held) for job, held in zip(self.decoding.jobs, blocks, strict=True)]
        running += [(job, job.blocks) for job in self.prefilling]
        shared = {key for job, _ in running for key in job.keys[: job.shared]}
        private = sum(held - job.shared for job, held in running)
        assert self.pool.shared == len(shared)
        assert self.pool.used == len(shared) + private
        assert 0 <= self.pool.free <= self.pool.total
        assert all(held >= job.shared for job, held in running)
        for _, _, _, job in self._waiting:
            assert job.blocks == job.shared == 0
        type(self).seen += 1

    def plan(self, future: Any) -> Plan:
        self.check()
        plan = super().plan(future)
        self.check()
        return plan

    def end(self, columns: list[int]) -> Any:
        jobs = super().end(columns)
        self.check()
        if not (self.prefilling or len(self.decoding)):
            assert self.pool.used == 0
        return jobs


@settings(max_examples=80)
@given(
    st.integers(0, 2**32),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 2, "oracle"]),
    st.sampled_from([1, 4, 16]),
)
def test_blocks_are_conserved_at_every_event(
    seed: int, chunked: bool, caching: bool, swap: bool, policy: int | str | None, size: int
) -> None:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 50, 5).tolist()
    runs = [random_runs(rng, int(n)) for n in rng.integers(1, 30, 5)]
    least = max(-(-(p + len(r) + 2) // size) for p, r in zip(prompts, runs, strict=True))
    engine = {
        "max_num_seqs": 4,
        "num_gpu_blocks": int(least * rng.uniform(1, 2.5)),
        "block_size": size,
        "enable_prefix_caching": caching,
        **({"enable_chunked_prefill": True, "max_num_batched_tokens": 30} if chunked else {}),
        **({"preemption_mode": "swap", "swap_bandwidth_gb_s": 1.0, "kv_bytes_per_token": 100.0} if swap else {}),
    }
    plan = scenario(policy, workload={"concurrency": 6, "requests": 15}, engine=engine)
    before, Watched.seen = simulator.serving.engine.Scheduler, 0
    simulator.serving.engine.Scheduler = Watched  # type: ignore[misc]
    try:
        result = simulate(plan, traces_of(runs, prompts=prompts))
    finally:
        simulator.serving.engine.Scheduler = before  # type: ignore[misc]
    assert Watched.seen > 30
    assert result.summary["completed"] == 15


# --- prefix caching


def test_a_repeated_prompt_is_not_computed_again() -> None:
    """All full blocks but the one with the last token: that one gives the first output token."""
    engine = {"max_num_seqs": 1, "enable_prefix_caching": True, "block_size": 8}
    traces = traces_of([[0] * 5, [0] * 5], prompts=[40, 43])
    result = simulate(scenario(1, batch=1, workload={"requests": 6}, engine=engine), traces)
    assert result.requests["cached_tokens"].to_pylist() == [0, 0, 32, 40, 32, 40]
    prefill = [row for row in result.iterations.to_pylist() if row["kind"] == "prefill"]
    assert [row["prefill_tokens"] for row in prefill] == [40, 43, 8, 3, 8, 3]
    assert [row["context_tokens"] for row in prefill] == [0, 0, 32, 40, 32, 40]
    summary = result.summary
    assert summary["prefix_cache_queries"] == 3 * 83
    assert summary["prefix_cache_hits"] == 144
    assert summary["prefix_cache_hit_rate"] == pytest.approx(144 / 249)


def test_the_least_recently_used_prompt_is_forgotten_first_and_from_its_end() -> None:
    """Memory for 8 blocks of 8: prompt A (5 blocks), then B (5): B takes the 3 unused ones and the end of A."""
    engine = {"max_num_seqs": 1, "enable_prefix_caching": True, "block_size": 8, "num_gpu_blocks": 8}
    traces = traces_of([[0], [0]], prompts=[40, 40])
    requests = simulate(scenario(None, batch=1, workload={"requests": 4}, engine=engine), traces).requests
    # A again: its first three blocks are left, until then; B again: A's new blocks took its last two.
    assert requests["cached_tokens"].to_pylist() == [0, 0, 24, 24]


def mooncake(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / "trace.jsonl")


def test_prefix_hashes_of_a_trace_are_found_again(tmp_path: Path) -> None:
    """Against a plain set of everything that was ever sent: without a limit nothing is forgotten."""
    rng = np.random.default_rng(1)
    rows, paths = [], [[]]
    for i in range(30):
        parent = paths[int(rng.integers(len(paths)))]
        ids = parent + [100 * i + j for j in range(int(rng.integers(1, 4)))]
        paths.append(ids)
        rows.append(
            {
                "timestamp": 1000 * i,
                "input_length": 512 * len(ids) - int(rng.integers(0, 512)),
                "output_length": 3,
                "hash_ids": ids,
            }
        )
    workload = {"kind": "trace", "format": "mooncake", "path": mooncake(tmp_path, rows)}
    engine = {"max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 64}
    result = simulate(scenario(None, workload=workload, engine=engine), traces_of([[0] * 3]))
    known: set[tuple[int, ...]] = set()
    expected = []
    for row in rows:
        blocks = [(*row["hash_ids"][: b // 8 + 1], b % 8) for b in range(row["input_length"] // 64)]
        most = (row["input_length"] - 1) // 64
        hits = next((b for b in range(most) if blocks[b] not in known), most)
        expected.append(64 * hits)
        known |= set(blocks)
    assert result.requests["cached_tokens"].to_pylist() == expected
    assert sum(expected) > 0
    engine["block_size"] = 48
    with pytest.raises(ScenarioError, match="block_size: must divide the 512 tokens of a prefix hash, got 48"):
        simulate(scenario(None, workload=workload, engine=engine), traces_of([[0] * 3]))


def test_drawn_prompts_share_nothing() -> None:
    workload = {"kind": "poisson", "rate_rps": 5.0, "requests": 20}
    lengths = {"lengths": {"kind": "drawn", "prompt": {"kind": "constant", "tokens": 64}}}
    engine = {"max_num_seqs": 4, "enable_prefix_caching": True}
    traces = traces_of([[0] * 3], prompts=[64])
    own = simulate(scenario(None, workload={**workload, **lengths}, engine=engine), traces)
    same = simulate(scenario(None, workload=workload, engine=engine), traces)
    assert own.summary["prefix_cache_hits"] == 0
    assert same.summary["prefix_cache_hits"] == 19 * 48


def test_a_chain_stands_for_all_that_came_before() -> None:
    assert chain(0, [1, 2, 3])[:2] == chain(0, [1, 2])
    assert chain(0, [1, 2])[1] != chain(0, [5, 2])[1]
    assert chain(1, [1])[0] != chain(0, [1])[0]
    assert all(0 <= key < 1 << 63 for key in chain(0, range(1000)))


# --- size of the memory


LLAMA = ModelInfo(
    name="llama", parameters=8_030_000_000, layers=32, hidden_size=4096, heads=32, kv_heads=8, dtype="bfloat16"
)


def described(**changes: Any) -> Manifest:
    plain = manifest(drafters=("eagle", "lookup"))
    heads = {"parameters": 250_000_000, "layers": 1, "hidden_size": 4096, "heads": 32, "kv_heads": 8}
    drafters = (
        plain.drafters[0].model_copy(update={"paradigm": "eagle", "dtype": "bfloat16", **heads}),
        plain.drafters[1].model_copy(update={"paradigm": "prompt-lookup"}),
    )
    device = DeviceInfo(name="H100", kind="cuda", memory_bytes=80_000_000_000)
    return plain.model_copy(update={"verifier": LLAMA, "drafters": drafters, "device": device, **changes})


def test_blocks_follow_from_memory_weights_and_shapes() -> None:
    """Llama-3.1-8B: 2 * 32 * 8 * 128 * 2 = 131,072 bytes a token; an EAGLE head of one layer adds 4,096."""
    engine = EngineSettings(gpu_memory_utilization=0.9)
    assert block_bytes(engine, described(), None) == 16 * 131_072
    assert block_bytes(engine, described(), "lookup") == 16 * 131_072
    assert block_bytes(engine, described(), "eagle") == 16 * (131_072 + 4_096)
    weights = 2 * 8.03e9
    assert num_blocks(engine, described(), None) == int((0.9 * 80e9 - weights) / (16 * 131_072))
    assert num_blocks(engine, described(), "eagle") == int((0.9 * 80e9 - weights - 5e8) / (16 * 135_168))
    two = EngineSettings(gpu_memory_utilization=0.9, tensor_parallel_size=2)
    assert num_blocks(two, described(), None) == int((1.8 * 80e9 - weights) / (16 * 131_072))
    stated = EngineSettings(gpu_memory_utilization=0.5, kv_bytes_per_token=1e6, block_size=32)
    assert num_blocks(stated, described(), None) == int((40e9 - weights) / 32e6)
    assert num_blocks(EngineSettings(), described(), None) is None
    assert num_blocks(EngineSettings(num_gpu_blocks=7), described(), None) == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"device": DeviceInfo(name="x", kind="cuda")},
            "device.memory_bytes is unknown in manifest.json; give num_gpu_",
        ),
        ({"verifier": ModelInfo(name="v")}, "parameters of 'v' is unknown in manifest.json; give num_gpu_blocks"),
        (
            {"verifier": LLAMA.model_copy(update={"kv_heads": None})},
            "kv_heads of 'llama' is unknown in manifest.json; give kv_bytes_per_token",
        ),
        (
            {"verifier": LLAMA.model_copy(update={"dtype": "q4"})},
            "dtype of 'llama' must be one of float32, .* got 'q4'",
        ),
        (
            {"device": DeviceInfo(name="x", kind="cuda", memory_bytes=16_000_000_000)},
            "must leave memory for KV blocks, got 14.4 GB for weights of 16.06 GB",
        ),
    ],
)
def test_what_is_not_known_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CostError, match=words):
        num_blocks(EngineSettings(gpu_memory_utilization=0.9), described(**changes), None)
