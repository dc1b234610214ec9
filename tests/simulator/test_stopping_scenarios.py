"""Stopping policies as a user names them: the scenario's table, whole simulations, and facts that must come out."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
from builders import felt_traces, iid_traces
from scenarios import scenario

from calibration.common import plugins
from calibration.common.arrays import Ints
from calibration.common.errors import ReplayError, ScenarioError
from calibration.traces import TraceSet, make_table
from simulator import RunResult, Scenario, parse_scenario, simulate
from simulator.rounds.protocols import Round
from simulator.stopping import Fixed, OraclePolicy, Policy

H100: dict[str, Any] = {
    "overhead_s": 1.207e-3,
    "verifier": {"kind": "linear", "base_s": 5.886e-3, "per_token_s": 21.0e-6, "per_context_token_s": 0.0393e-6},
    "drafter": {"kind": "linear", "base_s": 2.135e-3, "per_token_s": 0.84e-6, "per_context_token_s": 0.0024e-6},
}
"""Published with the EAGLE traces of Llama-3.1-8B."""
H100["drafter"]["charged"] = "per_round"

TABLES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "fixed", "draft_tokens": 3},
    {"policy": "by_batch", "table": [[1, 2, 4], [3, 8, 1]]},
    {"policy": "heuristic", "start_tokens": 5},
    {"policy": "confidence", "threshold": 0.5},
    {"policy": "adaedl"},
    {"policy": "specdec++"},
    {"policy": "specdec++", "coefficients": [0.1, 0.7, -0.3], "threshold": 0.6},
    {"policy": "moving_average", "tiers": {"1": {"candidate_steps": [1, 3]}, "3": {"candidate_steps": [0, 2]}}},
    {"policy": "goodput", "probe_rounds": 20},
    {"policy": "per_request", "max_draft_tokens": 5},
    {"policy": "budget"},
    {"policy": "budget", "tokens_per_request": 1.5},
    {"policy": "budget", "estimate": "confidence", "max_draft_tokens": 4},
    {"policy": "oracle"},
    {"policy": "oracle_cost"},
    {"policy": "tree", "shape": {"kind": "chain", "depth": 3}},
    {"policy": "tree", "shape": {"kind": "k_ary", "branching": 2, "depth": 2}},
    {"policy": "tree", "shape": {"kind": "paths", "paths": [[0], [1], [0, 0]]}},
    {"policy": "tree", "shape": {"kind": "parents", "parents": [-1, -1, 0], "ranks": [0, 1, 0]}},
    {"policy": "tree", "shape": {"kind": "sequoia", "nodes": 9, "depth": 4}},
    {"policy": "tree", "shape": {"kind": "sequoia", "nodes": 5, "depth": 4, "acceptance": [0.6, 0.2]}},
    {"policy": "tree", "shape": {"kind": "dynamic", "total_tokens": 8, "depth": 3, "top_k": 3}},
]


def named(stopping: Mapping[str, Any], batch: int = 4, **others: Any) -> Scenario:
    data = scenario(None, batch=batch, **others).model_dump(exclude_none=True)
    return parse_scenario({**data, "stopping": dict(stopping)})


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table['policy']}-{len(str(table))}")
def test_every_policy_serves_every_request_and_no_policy_changes_the_text(table: dict[str, Any]) -> None:
    traces, _ = felt_traces(np.random.default_rng(1))
    chosen = named(table)
    result = simulate(chosen, traces)
    assert result.requests["output_tokens"].to_pylist() == [60] * 6
    assert sum(result.iterations["emitted_tokens"].to_pylist()) == 360
    assert result.requests.equals(simulate(chosen, traces).requests)
    reads = table["policy"] in ("confidence", "adaedl", "specdec++") or "estimate" in table
    assert ("signal_steps" in result.summary) == reads
    if reads:
        assert 0 < result.summary["estimated_signal_steps"] < result.summary["signal_steps"]
    again = parse_scenario(tomllib.loads(chosen.to_toml()))
    assert again.stopping == chosen.stopping
    assert again.hash == chosen.hash


def fault_of(stopping: Mapping[str, Any], **others: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        named(stopping, **others)
    return str(caught.value)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"policy": "by_batch", "table": [[2, 4, 3]]}, "from 1 on: expected one from 1"),
        ({"policy": "by_batch", "table": [[1, 4, 3], [6, 8, 1]]}, "expected one from 5"),
        ({"policy": "by_batch", "table": [[1, 4, 3], [5, 4, 1]]}, r"not [5, 4, 1]"),
        ({"policy": "by_batch", "table": [[1, 4, -1]]}, "K >= 0"),
        ({"policy": "by_batch", "table": []}, "stopping.table"),
        ({"policy": "heuristic", "start_tokens": 9, "max_draft_tokens": 8}, "at most max_draft_tokens = 8"),
        ({"policy": "specdec++", "min_draft_tokens": 9, "max_draft_tokens": 8}, "at most max_draft_tokens = 8"),
        ({"policy": "confidence", "threshold": 1.5}, "stopping.threshold"),
        ({"policy": "confidense"}, "did you mean 'confidence'"),
        ({"policy": "goodput", "decay": 1.0}, "stopping.decay"),
        ({"policy": "moving_average", "tiers": {"x": {"candidate_steps": [1]}}}, "batch sizes from 1 on, not 'x'"),
        ({"policy": "tree", "shape": {"kind": "chain"}}, "stopping.shape.depth: must be given"),
        ({"policy": "tree", "shape": {"kind": "chian", "depth": 2}}, "did you mean 'chain'"),
    ],
)
def test_faults_are_named(table: dict[str, Any], fault: str) -> None:
    assert fault in fault_of(table)


def test_every_policy_that_drafts_needs_a_drafter() -> None:
    assert "drafter: must be given for policy 'goodput'" in fault_of({"policy": "goodput"}, drafter=None)


def test_what_the_recording_lacks_is_said() -> None:
    bare = iid_traces(0.5, np.random.default_rng(0), sequences=4, output_tokens=20)
    with pytest.raises(ReplayError, match="'drafter_confidence'"):
        simulate(named({"policy": "confidence"}), bare)
    with pytest.raises(ReplayError, match="'emitted_rank'"):
        simulate(named({"policy": "tree", "shape": {"kind": "chain", "depth": 2}}), bare)


# --- third parties


class Alternating(Policy):
    """Drafts a and b in turn."""

    def __init__(self, settings: Mapping[str, Any], max_num_seqs: int) -> None:
        self._lengths = [int(settings["a"]), int(settings["b"])]
        self.longest_draft = max(self._lengths)

    def draft_tokens(self, round_: Round) -> Ints:
        self._lengths.reverse()
        return np.full(round_.active, self._lengths[0], dtype=np.int64)


class Bare:
    """No subclass of `Policy`: it has what a policy must have and nothing else."""

    longest_draft = 3

    def __init__(self, settings: Mapping[str, Any], max_num_seqs: int) -> None:
        self._give = settings.get("give", "lengths")

    def draft_tokens(self, round_: Round) -> Any:
        full = np.full(round_.active, 3)
        wrong = {
            "list": full.tolist(),
            "floats": full * 1.0,
            "shape": full[:, None],
            "long": full + 4,
            "negative": -full,
        }
        return wrong.get(self._give, full)


class Endless(Bare):
    """An ordinary policy that does not say how far it may go."""

    longest_draft = None  # type: ignore[assignment]


class Peeking(Policy):
    """Reads what no engine knows."""

    longest_draft = 4

    def __init__(self, settings: Mapping[str, Any], max_num_seqs: int) -> None:
        pass

    def draft_tokens(self, round_: Round) -> Ints:
        return round_.future_run_length  # type: ignore[attr-defined]


class Foreseeing(OraclePolicy):
    """Half of what will be accepted, or, `greedy`, one token more than that."""

    def __init__(self, settings: Mapping[str, Any], max_num_seqs: int) -> None:
        self._greedy = bool(settings.get("greedy"))

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        return run_length + 1 if self._greedy else run_length // 2


def no_policy(settings: Mapping[str, Any], max_num_seqs: int) -> int:
    return 3


GROUP = "paceline.stopping"


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "alternating": Alternating,
        "bare": Bare,
        "broken": no_policy,
        "endless": Endless,
        "foreseeing": Foreseeing,
        "peeking": Peeking,
    }
    points = [EntryPoint(name, f"fake:{name}", GROUP) for name in made]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.setattr(EntryPoint, "load", lambda point: made[point.name])


@pytest.mark.usefixtures("_installed")
def test_a_plugin_is_found_by_name_and_gets_its_settings() -> None:
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=4, output_tokens=20)
    chosen = named({"policy": "plugin:alternating", "settings": {"a": 4, "b": 1}}, batch=1)
    result = simulate(chosen, traces)
    drafted = [
        d for d, k in zip(*(result.iterations[c].to_pylist() for c in ("drafted_tokens", "kind")), strict=True)
    ]
    assert set(drafted) == {0, 1, 4}
    again = parse_scenario(tomllib.loads(chosen.to_toml()))
    assert again.hash == chosen.hash
    with pytest.raises(ScenarioError, match="'alternatin'; did you mean 'alternating'"):
        simulate(named({"policy": "plugin:alternatin"}), traces)
    with pytest.raises(ScenarioError, match=r"does not take them \('a'\)"):
        simulate(named({"policy": "plugin:alternating"}), traces)
    with pytest.raises(ScenarioError, match="it has no draft_tokens, longest_draft"):
        simulate(named({"policy": "plugin:broken"}), traces)


@pytest.mark.usefixtures("_installed")
def test_a_plugin_that_is_no_subclass_has_the_defaults_of_a_policy() -> None:
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=4, output_tokens=20)
    own = simulate(named({"policy": "fixed", "draft_tokens": 3}), traces)
    bare = simulate(named({"policy": "plugin:bare"}), traces)
    assert bare.iterations.equals(own.iterations)
    assert "oracle" not in bare.summary["provenance"]


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("give", "got"),
    [
        ("list", "got list"),
        ("floats", r"got float64 of shape \(4,\)"),
        ("shape", r"got int64 of shape \(4, 1\)"),
        ("long", "all >= 0 and at most its longest_draft of 3, got 7"),
        ("negative", "all >= 0 .*, got -3"),
    ],
)
def test_what_a_plugin_gives_is_checked(give: str, got: str) -> None:
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=4, output_tokens=20)
    with pytest.raises(
        ScenarioError, match=rf"'bare' must give draft lengths as an integer array of shape \(4,\).*{got}"
    ):
        simulate(named({"policy": "plugin:bare", "settings": {"give": give}}), traces)


@pytest.mark.usefixtures("_installed")
def test_the_future_is_for_oracles_alone_and_they_are_labelled() -> None:
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=4, output_tokens=20)
    with pytest.raises(
        ScenarioError, match=r"'peeking' reads 'future_run_length' of a round, .* knows: active, slots"
    ):
        simulate(named({"policy": "plugin:peeking"}), traces)
    with pytest.raises(ScenarioError, match="longest_draft of plugin 'endless' must be a whole number >= 0"):
        simulate(named({"policy": "plugin:endless"}), traces)
    bound = simulate(named({"policy": "oracle"}), traces)
    third = simulate(named({"policy": "plugin:foreseeing"}), traces)
    for result in (bound, third):
        assert result.summary["provenance"]["oracle"].startswith("stopping policy: knows the future")
        assert result.summary["spec_decode_accepted_tokens"] == result.summary["spec_decode_draft_tokens"] > 0
    assert third.summary["spec_decode_accepted_tokens"] < bound.summary["spec_decode_accepted_tokens"]
    with pytest.raises(
        ScenarioError, match=r"'foreseeing' must ask for no more than will be accepted, .* got 1 too many"
    ):
        simulate(named({"policy": "plugin:foreseeing", "settings": {"greedy": True}}), traces)


def test_no_policy_is_given_an_array_of_what_is_to_come() -> None:
    """Whatever a round holds, the runs to come are not among it, nor one attribute further down."""
    traces = iid_traces(0.5, np.random.default_rng(0), sequences=6, output_tokens=40)
    seen: list[set[str]] = []

    class Watching(Fixed):
        def draft_tokens(self, round_: Round) -> Ints:
            held = {name: getattr(round_, name) for name in Round.__slots__}
            seen.append({name for name, value in held.items() if isinstance(value, np.ndarray)})
            return super().draft_tokens(round_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulator.stopping.make.Fixed", Watching)
        simulate(named({"policy": "fixed", "draft_tokens": 3}), traces)
    assert seen
    assert set().union(*seen) == {"slots", "position", "context", "cursor"}


# --- facts


def throughput(stopping: Mapping[str, Any], batch: int, traces: TraceSet) -> float:
    workload = {"concurrency": batch, "keep_full": True, "requests": max(batch, 30)}
    result: RunResult = simulate(named(stopping, batch, workload=workload, costs=H100), traces)
    # Rounds of a full batch only: no ramp, no prefill.
    table = result.iterations.to_pandas()
    full = table[(table["kind"] == "decode") & (table["active"] == batch)]
    return float(full["emitted_tokens"].sum() / full["duration_s"].sum())


BATCHES = (1, 16, 64, 256)


@pytest.fixture(scope="module")
def fixed_rates() -> dict[int, list[float]]:
    traces = iid_traces(0.6, np.random.default_rng(5), sequences=60, output_tokens=120)
    return {b: [throughput({"policy": "fixed", "draft_tokens": k}, b, traces) for k in range(7)] for b in BATCHES}


def test_the_best_fixed_length_falls_as_the_batch_grows_and_speculation_loses_at_last(
    fixed_rates: dict[int, list[float]],
) -> None:
    best = [int(np.argmax(fixed_rates[b])) for b in BATCHES]
    assert best == sorted(best, reverse=True)
    assert best[0] > best[-1]
    # At batch 1 five tokens pay well, at 256 they cost more than they bring.
    assert fixed_rates[1][5] > 1.8 * fixed_rates[1][0]
    assert fixed_rates[256][5] < fixed_rates[256][0]
    # Where drafts are mostly wrong, every length loses at 256.
    poor = iid_traces(0.3, np.random.default_rng(5), sequences=60, output_tokens=120)
    rates = [throughput({"policy": "fixed", "draft_tokens": k}, 256, poor) for k in range(4)]
    assert rates == sorted(rates, reverse=True)
    assert throughput({"policy": "goodput"}, 256, poor) > 0.98 * rates[0]


def test_adaptive_rules_are_never_far_from_the_best_fixed_length(fixed_rates: dict[int, list[float]]) -> None:
    """Acceptance is alike everywhere here, so a fixed length is the best there is; estimates cost a little."""
    traces = iid_traces(0.6, np.random.default_rng(5), sequences=60, output_tokens=120)
    for batch in BATCHES:
        best = max(fixed_rates[batch])
        assert throughput({"policy": "goodput"}, batch, traces) > 0.96 * best
        assert throughput({"policy": "budget"}, batch, traces) > 0.96 * best


def mixed(rng: np.random.Generator) -> TraceSet:
    """Requests whose drafts are accepted almost always, or hardly ever."""
    good, bad = (iid_traces(a, rng, sequences=40, output_tokens=120) for a in (0.92, 0.15))
    rows = {name: getattr(bad, name).to_pydict() for name in ("sequences", "positions")}
    for table in rows.values():
        table["sequence_id"] = [f"bad-{name}" for name in table["sequence_id"]]
    tables = {}
    for name, columns in rows.items():
        first = getattr(good, name).to_pydict()
        tables[name] = make_table(name, {key: first[key] + columns[key] for key in columns})
    return TraceSet.build(good.manifest, tables)


def test_a_shared_budget_beats_every_fixed_length_where_requests_differ() -> None:
    traces = mixed(np.random.default_rng(6))
    order = {"order": "shuffled"}
    for batch in (16, 64, 256):
        workload = {"concurrency": batch, "keep_full": True, "requests": max(batch, 80), **order}

        def rate(stopping: Mapping[str, Any], workload: dict[str, Any] = workload, batch: int = batch) -> float:
            result = simulate(named(stopping, batch, workload=workload, costs=H100), traces)
            table = result.iterations.to_pandas()
            full = table[(table["kind"] == "decode") & (table["active"] == batch)]
            return float(full["emitted_tokens"].sum() / full["duration_s"].sum())

        best = max(rate({"policy": "fixed", "draft_tokens": k}) for k in range(8))
        assert rate({"policy": "budget"}) > 0.99 * best, batch
        assert rate({"policy": "oracle_cost"}) > best


@pytest.mark.parametrize("batch", BATCHES)
def test_the_oracle_by_cost_beats_every_fixed_length(batch: int, fixed_rates: dict[int, list[float]]) -> None:
    traces = iid_traces(0.6, np.random.default_rng(5), sequences=60, output_tokens=120)
    oracle = throughput({"policy": "oracle_cost"}, batch, traces)
    assert oracle > max(fixed_rates[batch])
    # Drafting every token that will be accepted is not the best where verifying one costs more than it brings.
    assert oracle > 0.995 * throughput({"policy": "oracle"}, batch, traces)
