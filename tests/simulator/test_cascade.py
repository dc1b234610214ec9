"""Cascades under traffic: against simulate(), against hand-checked times, against the table itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from scenarios import DRAFT, LINEAR, random_runs, scenario, traces_of

from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator import simulate
from simulator.cascade import CascadeResult, ItemTable, load_cascade, parse_cascade, simulate_cascade

TRACES = traces_of([[0] * 4], prompts=[10])
FLAT = {"kind": "linear", "base_s": 0.1, "per_token_s": 0.01}
"""A step of n tokens: 0.1 + 0.01 n seconds."""


def table(
    correct: Sequence[Sequence[float]],
    confidence: Sequence[Sequence[float]] | None = None,
    *,
    prompts: Sequence[int] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    cost: Sequence[float] = (1.0, 4.0, 9.0),
    domains: Sequence[str] = ("chat",),
) -> ItemTable:
    """Items with a number per stage in each row of `correct`."""
    n, stages = len(correct), len(correct[0])
    return ItemTable(
        items=tuple(f"i{k}" for k in range(n)),
        domains=tuple(domains[k % len(domains)] for k in range(n)),
        stages=tuple(f"s{k}" for k in range(stages)),
        correct=tuple(map(tuple, correct)),
        prompt_tokens=tuple(prompts or [10] * n),
        output_tokens=tuple(map(tuple, outputs or [[3] * stages] * n)),
        cost=tuple(tuple(cost[:stages]) for _ in range(n)),
        signals={} if confidence is None else {"confidence": tuple(map(tuple, confidence))},
    )


def cascade(stages: int, policy: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """A cascade of stages s0, s1, ... with `FLAT` prices; `per_stage` gives tables of their own."""
    own = settings.pop("per_stage", [{}] * stages)
    data: dict[str, Any] = {
        "policy": policy or {"kind": "threshold", "threshold": 0.5},
        "workload": {"kind": "closed", "concurrency": 1},
        "stage": [{"name": f"s{k}", "costs": {"verifier": FLAT}, **own[k]} for k in range(stages)],
        **settings,
    }
    return parse_cascade(data)


def run(setup: Any, items: ItemTable, traces: Mapping[str, TraceSet] | None = None) -> CascadeResult:
    return simulate_cascade(setup, items=items, traces=traces or dict.fromkeys(setup.stages, TRACES))


def drawn(n: int, stages: int, seed: int = 0) -> ItemTable:
    """Items at random: correctness, confidence, and lengths."""
    rng = np.random.default_rng(seed)
    return table(
        rng.integers(0, 2, (n, stages)).tolist(),
        rng.random((n, stages)).tolist(),
        prompts=rng.integers(1, 60, n).tolist(),
        outputs=rng.integers(1, 20, (n, stages)).tolist(),
        cost=(1.0, 2.5, 7.0),
    )


TOGETHER = {"kind": "closed", "stagger_s": 0.0}
"""Clients that start at the same moment."""
POISSON = {"kind": "poisson", "rate_rps": 1.5, "requests": 120, "order": "shuffled"}


@pytest.mark.parametrize(
    "workload",
    [
        {**TOGETHER, "concurrency": 3, "requests": 25, "include_startup": True},
        {"kind": "poisson", "rate_rps": 2.0, "requests": 40},
    ],
)
@pytest.mark.parametrize("draft_tokens", [None, 3])
def test_one_stage_is_a_plain_simulation(workload: dict[str, Any], draft_tokens: int | None) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 40, 10).tolist()
    traces = traces_of(
        [random_runs(rng, n) for n in lengths], prompts=rng.integers(1, 90, 10).tolist(), domains=("chat", "code")
    )
    costs = {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT}
    plain = simulate(scenario(draft_tokens, batch=3, workload=workload, costs=costs), traces)
    sequences = traces.sequences
    items = table(
        [[1.0]] * 10,
        prompts=sequences["prompt_tokens"].to_pylist(),
        outputs=[[n] for n in sequences["output_tokens"].to_pylist()],
        domains=("chat", "code"),
    )
    stage = {"costs": costs, "engine": {"max_num_seqs": 3}, "drafter": {"name": "drafter"}}
    if draft_tokens is not None:
        stage["stopping"] = {"policy": "fixed", "draft_tokens": draft_tokens}
    setup = cascade(1, {"kind": "always", "stage": "s0"}, workload=workload, per_stage=[stage])
    found = run(setup, items, {"s0": traces})
    for name in ("arrival_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens"):
        assert found.requests[name].to_pylist() == plain.requests[name].to_pylist(), name
    assert found.requests["engine_s_s0"].to_pylist() == plain.requests["engine_seconds"].to_pylist()
    for name in ("duration", "request_throughput", "mean_ttft_ms", "p99_e2el_ms", "median_tpot_ms"):
        assert found.summary[name] == pytest.approx(plain.summary[name], rel=1e-12), name
    if draft_tokens is not None:
        accepted = plain.summary["spec_decode_accepted_tokens"]
        assert accepted > 0
        assert found.summary["stages"]["s0"]["spec_decode_accepted_tokens"] == accepted


def test_arrivals_at_the_very_end_of_a_step_are_as_in_a_plain_simulation() -> None:
    # Every step and every pause is a multiple of 1/4 s, so that they coincide all the time, and exactly.
    costs = {"verifier": {"kind": "linear", "base_s": 0.25, "per_token_s": 0.25}}
    load = {"kind": "closed", "concurrency": 5, "think_s": 0.25, "requests": 90}
    lengths, prompts = [3, 1, 6, 2, 4, 9, 5], [1, 4, 2, 7, 3, 1, 5]
    traces = traces_of([[0] * n for n in lengths], prompts=prompts)
    plain = simulate(
        scenario(None, batch=4, workload=load, costs=costs, replica=[{"name": "s0", "count": 2}]), traces
    )
    stage = {"costs": costs, "engine": {"max_num_seqs": 4}, "replicas": 2}
    setup = cascade(1, {"kind": "always", "stage": "s0"}, workload=load, per_stage=[stage])
    found = run(setup, table([[1.0]] * 7, prompts=prompts, outputs=[[n] for n in lengths]), {"s0": traces})
    for name in ("arrival_s", "first_token_s", "finish_s"):
        assert found.requests[name].to_pylist() == plain.requests[name].to_pylist(), name


def test_latency_of_two_stages_by_hand() -> None:
    # Prefill of 10 tokens 0.2 s, then two rounds of one token 0.11 s each: 0.42 s at each stage.
    found = run(cascade(2, workload={"kind": "closed", "concurrency": 1}), table([[0, 1]], [[0.1, 0.2]]))
    rows = found.requests.to_pylist()
    assert rows[0]["path"] == "s0;s1"
    assert rows[0]["first_token_s"] == pytest.approx(0.42 + 0.2)
    assert rows[0]["finish_s"] == pytest.approx(0.84)
    assert found.summary["busy_s_per_answer"] == pytest.approx(0.84)
    assert found.summary["replica_s_per_answer"] == pytest.approx(2 * 0.84)
    assert found.summary["stages"]["s0"]["utilisation"] == pytest.approx(0.5)


def test_stages_work_at_the_same_time() -> None:
    # Two clients, one request each; the first stage takes one at a time, so the second request starts there while
    # the first one is at the second stage: 0.42 + 0.42, and the other 0.42 behind it.
    one = {"engine": {"max_num_seqs": 1}}
    setup = cascade(2, workload={"kind": "closed", "concurrency": 2}, per_stage=[one, one])
    found = run(setup, table([[0, 1]] * 2, [[0.1, 0.2]] * 2))
    assert found.requests["finish_s"].to_pylist() == pytest.approx([0.84, 1.26])


def test_a_stage_takes_requests_in_batches() -> None:
    # Both are prefilled in one step of 20 tokens (0.3 s) and decode together (0.12 s a round) at either stage.
    setup = cascade(2, workload={**TOGETHER, "concurrency": 2})
    found = run(setup, table([[0, 1]] * 2, [[0.1, 0.2]] * 2))
    assert found.requests["finish_s"].to_pylist() == pytest.approx([1.08, 1.08])
    assert found.summary["stages"]["s1"]["mean_batch"] == 2


def test_mean_wait_before_the_second_stage_is_that_of_a_queue() -> None:
    # Single server, Poisson arrivals, constant service S = 0.42 s at both: M/D/1 at the first (Pollaczek-Khinchine
    # 1930), W = rho S / (2 (1 - rho)); departures of it are at least S apart, so that none waits at the second.
    one = {"engine": {"max_num_seqs": 1}}
    rate, service = 1.2, 0.42
    load = {"kind": "poisson", "rate_rps": rate, "requests": 10000}
    found = run(cascade(2, workload=load, per_stage=[one, one], seed=5), table([[0, 1]], [[0.1, 0.2]]))
    rho = rate * service
    expected = 2 * service + rho * service / (2 * (1 - rho))
    assert found.summary["mean_e2el_ms"] / 1000 == pytest.approx(expected, rel=0.02)
    assert found.summary["stages"]["s1"]["utilisation"] == pytest.approx(rho, rel=0.03)


@pytest.mark.parametrize(("threshold", "path"), [(0.0, "s0"), (1.01, "s0;s1;s2")])
def test_thresholds_beyond_all_confidence(threshold: float, path: str) -> None:
    items = drawn(30, 3)
    found = run(cascade(3, {"kind": "threshold", "threshold": threshold}, workload=POISSON), items)
    assert set(found.requests["path"].to_pylist()) == {path}
    assert found.summary["handovers_per_answer"] == path.count(";")
    assert found.summary["stages"]["s2"]["ran"] == (1.0 if ";" in path else 0.0)


def test_quality_cost_and_usage_are_the_counterfactual_of_the_table() -> None:
    items = drawn(40, 3, seed=8)
    policy = {"kind": "threshold", "threshold": [0.7, 0.4]}
    found = run(cascade(3, policy, workload={"kind": "closed", "concurrency": 5, "requests": 80}), items)
    confidence = np.array(items.signals["confidence"])
    stop = np.where(confidence[:, 0] >= 0.7, 0, np.where(confidence[:, 1] >= 0.4, 1, 2))
    correct = np.array(items.correct)[np.arange(40), stop]
    assert found.summary["quality"] == pytest.approx(correct.mean())
    assert found.summary["table_cost_per_answer"] == pytest.approx(np.cumsum((1.0, 2.5, 7.0))[stop].mean())
    for stage in range(3):
        told = found.summary["stages"][f"s{stage}"]
        assert told["answered"] == pytest.approx((stop == stage).mean())
        assert told["ran"] == pytest.approx((stop >= stage).mean())
    assert 0 < (stop == 1).sum() < 40
    # Every item came twice, so that the interval is that of 40 independent items.
    half = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 40)
    assert found.summary["quality_95"] == pytest.approx([correct.mean() - half, correct.mean() + half], abs=1e-4)


def test_a_signal_equal_to_the_threshold_stops() -> None:
    found = run(cascade(2, {"kind": "threshold", "threshold": 0.5}), table([[0, 1]] * 2, [[0.5, 1], [0.499, 1]]))
    assert found.requests["path"].to_pylist() == ["s0", "s0;s1"]
    policy = {"kind": "threshold", "threshold": 0.5, "stop": "at_most"}
    found = run(cascade(2, policy), table([[0, 1]] * 2, [[0.5, 1], [0.501, 1]]))
    assert found.requests["path"].to_pylist() == ["s0", "s0;s1"]


def test_low_signals_may_stop_a_request() -> None:
    items = drawn(20, 2)
    policy = {"kind": "threshold", "threshold": 0.5, "stop": "at_most"}
    found = run(cascade(2, policy, workload=POISSON), items)
    low = {name for name, row in zip(items.items, items.signals["confidence"], strict=True) if row[0] <= 0.5}
    stopped = found.requests.filter(pc.equal(found.requests["path"], "s0"))
    assert set(stopped["item"].to_pylist()) == low
    assert 0 < len(low) < 20


KV = {"format": "weights", "layers": 8, "bytes_per_token": 1000.0}


def kv(bandwidth_gb_s: float, latency_s: float, layers: tuple[int, int] = (8, 8), hidden: float | None = None) -> Any:
    how = {"kind": "kv", "bandwidth_gb_s": bandwidth_gb_s, "latency_s": latency_s}
    if hidden is not None:
        how["hidden_bytes_per_token"] = hidden
    tables = [{"kv": KV | {"layers": n, "bytes_per_token": 125.0 * n}} for n in layers]
    return cascade(2, {"kind": "threshold", "threshold": 2.0}, handover=how, per_stage=tables)


def test_kv_handover_takes_the_prefill_away_and_adds_the_link() -> None:
    items = table([[0, 1]], [[0, 0]], prompts=[500])
    anew = run(cascade(2, {"kind": "threshold", "threshold": 2.0}), items)
    moved = run(kv(0.001, 0.25), items)
    seconds = 500 * 1000.0 / 1e6 + 0.25
    # 500 prompt tokens are a step of 0.1 + 5.0 s; what is left of it is a step of one token.
    assert moved.requests["transfer_s"].to_pylist() == pytest.approx([seconds])
    assert moved.requests["transfer_bytes"].to_pylist() == [500_000.0]
    gone = anew.requests["finish_s"][0].as_py() - moved.requests["finish_s"][0].as_py()
    assert gone == pytest.approx((0.1 + 5.0) - (0.1 + 0.01) - seconds)


def test_a_deeper_stage_computes_only_its_own_layers_of_the_prompt() -> None:
    items = table([[0, 1]], [[0, 0]], prompts=[300])
    moved = run(kv(1.0, 0.0, layers=(6, 8), hidden=64.0), items)
    # A quarter of the layers is left: a prefill of 75 tokens. Bytes: KV of 6 layers, and the states behind them.
    assert moved.requests["transfer_bytes"].to_pylist() == [300 * (6 * 125.0 + 64.0)]
    assert moved.requests["engine_s_s1"].to_pylist() == pytest.approx([(0.1 + 0.75) + 2 * 0.11])


def test_carried_memory_counts_and_is_lost_in_a_preemption() -> None:
    # 40 prompt tokens of 2 requests take 3 blocks of 16 each, and 4 beyond 48 tokens: 7 are too few for both.
    items = table([[0, 1]] * 2, [[0, 0]] * 2, prompts=[40, 40], outputs=[[1, 20], [1, 20]])
    how = {"kind": "kv", "bandwidth_gb_s": 1.0}
    tables = [{"kv": KV}, {"kv": KV, "engine": {"num_gpu_blocks": 7}}]
    load = {**TOGETHER, "concurrency": 2}
    setup = cascade(2, {"kind": "threshold", "threshold": 2.0}, handover=how, per_stage=tables, workload=load)
    found = run(setup, items)
    # One token of each; 8 rounds of both; 11 of the first alone; 49 tokens of the second anew; 10 rounds of it.
    by_hand = 0.12 + 8 * 0.12 + 11 * 0.11 + (0.1 + 0.49) + 10 * 0.11
    assert found.requests["engine_s_s1"].to_numpy().sum() == pytest.approx(by_hand)


@pytest.mark.parametrize("load", [POISSON, {"kind": "closed", "concurrency": 7, "requests": 90, "think_s": 0.3}])
def test_every_request_ends_once_and_time_adds_up(load: dict[str, Any]) -> None:
    items = drawn(25, 3, seed=2)
    two = {"replicas": 2, "engine": {"max_num_seqs": 2}, "routing": {"policy": "least_loaded"}}
    found = run(cascade(3, workload=load, per_stage=[two, {}, two]), items)
    rows = found.requests.to_pylist()
    assert sorted(row["request_id"] for row in rows) == list(range(load["requests"]))
    assert all(row["arrival_s"] < row["first_token_s"] <= row["finish_s"] for row in rows)
    for name, told in found.summary["stages"].items():
        ran = [row for row in rows if name in row["path"].split(";")]
        assert all((row[f"engine_s_{name}"] > 0) == (row in ran) for row in rows)
        busy = told["utilisation"] * told["replicas"] * found.summary["duration"]
        assert busy == pytest.approx(sum(row[f"engine_s_{name}"] for row in rows))


def test_same_seed_same_bytes(tmp_path: Any) -> None:
    items = drawn(25, 3)
    setup = cascade(3, workload=POISSON, seed=4)
    folders = [run(setup, items).write(tmp_path / name) for name in "ab"]
    for name in ("scenario.toml", "summary.json", "requests.parquet"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    other = run(cascade(3, workload=POISSON, seed=5), items)
    assert other.requests["arrival_s"].to_pylist() != run(setup, items).requests["arrival_s"].to_pylist()


def test_money_is_that_of_all_replicas_for_the_whole_time() -> None:
    priced = [{"usd_per_hour": 3600.0, "replicas": 2}, {"usd_per_hour": 7200.0}]
    found = run(cascade(2, per_stage=priced), table([[0, 1]], [[0.1, 0.2]]))
    assert found.summary["usd_per_answer"] == pytest.approx(0.84 * (2 * 1 + 2))


def test_goodput_counts_answers_that_keep_every_objective() -> None:
    setup = cascade(2, slo={"ttft_ms": 700.0, "e2el_ms": 500.0})
    found = run(setup, table([[1, 1], [0, 1]], [[0.9, 0.2], [0.1, 0.2]]))
    # 0.42 s at the first stage alone; 0.84 s, first token after 0.62 s, through both.
    assert found.summary["slo_attainment_ttft"] == 1.0
    assert found.summary["slo_attainment_e2el"] == 0.5
    assert found.summary["request_goodput"] == pytest.approx(1 / 1.26)


FILE = """
item,domain,stage,correct,cost,confidence,margin,item_prompt_tokens
a,x,s0,0,1,0.2,0.1,10
a,x,s1,1,2,0.9,0.1,10
b,x,s0,1,1,0.8,0.1,12
b,x,s1,1,2,0.9,,12
""".lstrip()
TOML = """
[traces]
bundled = "smollm2-135m-cpu-greedy"
[items]
path = "items.csv"
[workload]
kind = "closed"
concurrency = 1
[policy]
kind = "threshold"
threshold = 0.5
[[stage]]
name = "s0"
output_tokens = 3
[stage.costs.verifier]
kind = "linear"
base_s = 0.1
per_token_s = 0.01
[[stage]]
name = "s1"
output_tokens = 4
[stage.costs.verifier]
kind = "linear"
base_s = 0.2
per_token_s = 0.02
""".lstrip()


def folder_with(tmp_path: Any, items: str = FILE, toml: str = TOML) -> Any:
    (tmp_path / "items.csv").write_text(items)
    (tmp_path / "cascade.toml").write_text(toml)
    return tmp_path / "cascade.toml"


def test_a_scenario_from_files(tmp_path: Any) -> None:
    found = simulate_cascade(load_cascade(folder_with(tmp_path)))
    assert found.requests["path"].to_pylist() == ["s0;s1", "s0"]
    assert found.summary["quality"] == 1.0
    assert found.summary["table_cost_per_answer"] == 2.0
    written = json.loads((found.write(tmp_path / "out") / "summary.json").read_text())
    assert written["provenance"]["items"]["count"] == 2
    again = load_cascade(tmp_path / "out" / "scenario.toml")
    assert again.hash == found.scenario.hash
    assert simulate_cascade(again).requests == found.requests


def test_stages_may_be_given_per_item(tmp_path: Any) -> None:
    toml = TOML.replace('kind = "threshold"\nthreshold = 0.5', 'kind = "assigned"\npath = "plan.csv"')
    place = folder_with(tmp_path, toml=toml)
    (tmp_path / "plan.csv").write_text("item,stages\nb,s0;s1\na,s1\n")
    found = simulate_cascade(load_cascade(place))
    assert found.requests["path"].to_pylist() == ["s1", "s0;s1"]
    (tmp_path / "plan.csv").write_text("item,stages\na,s0;s9\n")
    with pytest.raises(ScenarioError, match=r"plan.csv: row 2, column 'stages': must be stages .*, got 's9'"):
        simulate_cascade(load_cascade(place))
    (tmp_path / "plan.csv").write_text("item,stages\na,s0\n")
    with pytest.raises(ScenarioError, match=r"plan.csv: must have a row of item 'b'"):
        simulate_cascade(load_cascade(place))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a,x,s1,1", "a,x,s1,1.5", r"items.csv: row 3, column 'correct': must be a number from 0 to 1, got '1.5'"),
        ("a,x,s1,1,2,0.9,0.1,10\n", "", r"items.csv: must have a row of item 'a' for stage 's1'"),
        ("b,x,s0,1,1,0.8,0.1,12", "b,x,s0,1,1,0.8,0.1,x", r"row 4, column 'item_prompt_tokens': must be a whole num"),
        ("b,x,s0,1,1,0.8", "b,x,s0,1,1,", r"must be known where a request may stop, got no 'confidence' of item 'b'"),
        ("confidence", "confidenc", r"must have a column 'confidence'; did you mean 'confidenc'"),
        ("a,x,s1", "a,x,s0", r"row 3, column 'item': must be once for stage 's0', got 'a'"),
    ],
)
def test_faults_in_the_table_are_told_with_their_place(tmp_path: Any, old: str, new: str, message: str) -> None:
    place = folder_with(tmp_path, items=FILE.replace(old, new))
    with pytest.raises(ScenarioError, match=message):
        simulate_cascade(load_cascade(place))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("concurrency = 1", "concurrency = 1\nmix = {x = 0.0}", r"workload.mix: must have a weight above zero"),
        (
            "concurrency = 1",
            "concurrency = 1\nmix = {y = 1.0}",
            r"workload.mix: no sequence of it is served, got 'y'",
        ),
        ('name = "s1"', 'name = "s0"', r"stage: must have a name of its own each, got s0, s0"),
        ("concurrency = 1", "concurrency = 0", r"workload.concurrency: must be >= 1, got 0"),
        ("threshold = 0.5", "threshold = [0.5, 0.6]", r"policy.threshold: must be one number, or one for each of 1"),
        (
            'kind = "threshold"\nthreshold = 0.5',
            'kind = "always"\nstage = "s2"',
            r"policy.stage: must be a stage, got",
        ),
        (
            "output_tokens = 4",
            "usd_per_hour = 2.0",
            r"stage: usd_per_hour: must be given for every stage or none, got",
        ),
        ("output_tokens = 4", "output_tokens = 4\nspeed = 2", r"stage\[1\].speed: no such key"),
        (
            "output_tokens = 4",
            'stopping = {policy = "fixed", draft_tokens = 3}',
            r"stage\[1\].drafter: must be given",
        ),
        (
            "output_tokens = 4",
            "engine = {enable_chunked_prefill = true}",
            r"stage\[1\].engine.max_num_batched_tokens",
        ),
    ],
)
def test_faults_in_the_scenario_are_told_with_their_place(tmp_path: Any, old: str, new: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        simulate_cascade(load_cascade(folder_with(tmp_path, toml=TOML.replace(old, new))))


def test_all_faults_are_told_at_once(tmp_path: Any) -> None:
    toml = TOML.replace('name = "s1"', 'name = "s0"').replace("threshold = 0.5", "threshold = [0.5, 0.6]")
    with pytest.raises(ScenarioError) as fault:
        load_cascade(folder_with(tmp_path, toml=toml))
    lines = str(fault.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{tmp_path / 'cascade.toml'}: ") for line in lines)


def test_kv_of_other_weights_is_refused() -> None:
    how = {"kind": "kv", "bandwidth_gb_s": 1.0}
    with pytest.raises(ScenarioError, match=r"handover.kind: 'kv' needs stages of one format.*, got weights, others"):
        cascade(2, handover=how, per_stage=[{"kv": KV}, {"kv": KV | {"format": "others"}}])
    with pytest.raises(ScenarioError, match=r"'kv' needs \[stage.kv\] at every stage, got none at s1"):
        cascade(2, handover=how, per_stage=[{"kv": KV}, {}])
    with pytest.raises(ScenarioError, match=r"hidden_bytes_per_token: must be given where stages differ in layers"):
        cascade(2, handover=how, per_stage=[{"kv": KV}, {"kv": KV | {"layers": 9}}])
