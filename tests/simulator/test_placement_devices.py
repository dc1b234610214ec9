"""A drafter behind a link, and one whose layers run in parallel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import iid_traces, run_lengths
from scenarios import DRAFT, LINEAR, scenario, traces_of

from calibration.common.errors import CostError, ScenarioError
from simulator import RunResult, Scenario, simulate
from simulator.placement.overlapped import ThinnedRuns
from simulator.playback.replay import compile_replay, select_sequences

VERIFY_S, STEP_S = 0.05, 0.004
FLAT = {
    "verifier": {"kind": "linear", "base_s": VERIFY_S},
    "drafter": {"kind": "linear", "base_s": STEP_S},
}


def decoding_s(run: RunResult) -> np.ndarray:
    table = run.requests
    return np.asarray(table["finish_s"].to_numpy() - table["first_token_s"].to_numpy())


def layer_parallel(**keys: Any) -> dict[str, Any]:
    return {"kind": "layer_parallel", "group": 4, "layers": 30, "acceptance_drop": 0.0, **keys}


# --- remote


def test_a_remote_drafter_speeds_up_as_its_closed_form_says() -> None:
    """S = E[tokens] t_t / (g t_d + t_v + RTT), E[tokens] = (1 - a^(g+1)) / (1 - a), bonus included."""
    alpha, tokens, round_trip_s = 0.8, 4, 0.03
    recorded = iid_traces(alpha, np.random.default_rng(5), sequences=16, output_tokens=1200)
    placement = {"kind": "remote", "round_trip_s": round_trip_s}
    run = simulate(scenario(tokens, batch=1, costs=FLAT, placement=placement), recorded)
    speed_up = 1199 * VERIFY_S / decoding_s(run)
    expected = (1 - alpha ** (tokens + 1)) / (1 - alpha) * VERIFY_S / (tokens * STEP_S + VERIFY_S + round_trip_s)
    error = speed_up.std(ddof=1) / np.sqrt(len(speed_up))
    assert abs(speed_up.mean() - expected) <= 3 * error
    assert error < 0.02 * expected


def test_bytes_cross_the_link_at_its_bandwidth() -> None:
    """Up: what is verified, with its probabilities; down: the ids of what is emitted. Batches share the link."""
    rng = np.random.default_rng(6)
    runs = [run_lengths(rng.random(20) < 0.7).tolist() for _ in range(3)]
    placement = {"kind": "remote", "round_trip_s": 0.01, "bandwidth_gb_s": 0.001, "bytes_per_drafted_token": 1000.0}
    costs = {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT}
    far, near = (
        simulate(scenario(3, batch=3, costs=costs, placement=place), traces_of(runs)).iterations.slice(1)
        for place in (placement, None)
    )
    drafted, emitted = (far[f"{name}_tokens"].to_numpy() for name in ("drafted", "emitted"))
    link_s = far["duration_s"].to_numpy() - near["duration_s"].to_numpy()
    assert link_s == pytest.approx(0.01 + (1000 * drafted + 4 * emitted) / 1e6)
    for column in ("drafted_tokens", "accepted_tokens", "draft_s", "verify_s"):
        assert far[column].equals(near[column])


def test_rounds_without_a_draft_do_not_use_the_link() -> None:
    traces = traces_of([[2, 1, 0, 1, 0]])
    remote = {"kind": "remote", "round_trip_s": 9.0}
    runs = [simulate(scenario(0, costs=FLAT, placement=place), traces) for place in (remote, None)]
    assert decoding_s(runs[0]) == pytest.approx(decoding_s(runs[1]))


# --- layers in parallel


@pytest.mark.parametrize(("group", "share"), [(1, 1.0), (4, 8 / 30), (30, 1 / 30), (64, 1 / 30)])
def test_a_draft_step_takes_its_share_of_the_layers_and_a_repair_follows(group: int, share: float) -> None:
    runs = [[5, 4, 3, 2, 1, 0, 2, 1, 0, 0], [3, 2, 1, 0, 2, 1, 0, 2, 1, 0]]
    costs = {"verifier": LINEAR, "drafter": DRAFT}
    grouped, plain = (
        simulate(scenario(3, batch=2, costs=costs, placement=place), traces_of(runs)).iterations.slice(1)
        for place in (layer_parallel(group=group, sync_s=0.0005), None)
    )
    assert grouped["emitted_tokens"].equals(plain["emitted_tokens"])
    steps = np.full(grouped.num_rows, 3)
    emitted, context = (grouped[name].to_numpy() for name in ("emitted_tokens", "context_tokens"))
    repair_s = DRAFT["base_s"] + DRAFT["per_token_s"] * emitted + DRAFT["per_context_token_s"] * context
    draft_s = plain["draft_s"].to_numpy() * share + steps * 0.0005 + repair_s
    assert grouped["draft_s"].to_numpy() == pytest.approx(draft_s)
    assert grouped["duration_s"].to_numpy() == pytest.approx(draft_s + grouped["verify_s"].to_numpy())


def test_the_layers_come_from_the_recording_or_must_be_given() -> None:
    placement = layer_parallel()
    del placement["layers"]
    with pytest.raises(ScenarioError, match=r"placement\.layers: must be given: .* 'drafter'"):
        simulate(scenario(3, costs=FLAT, placement=placement), traces_of([[1, 0, 0]]))


def test_layers_are_grouped_of_drafters_with_steps_only() -> None:
    costs = {**FLAT, "drafter": {"kind": "fraction_of_verify", "fraction": 0.1}}
    with pytest.raises(CostError, match=r"costs\.drafter: must be charged per_step .* got per_round"):
        simulate(scenario(3, costs=costs, placement=layer_parallel()), traces_of([[1, 0, 0]]))


@pytest.mark.parametrize("sampled", [False, True])
def test_thinned_acceptance_is_a_times_one_minus_d(sampled: bool) -> None:
    """E[tokens per round] = (1 - b^(k+1)) / (1 - b) with b = a (1 - d), whether recorded or drawn."""
    alpha, drop, tokens, length = 0.85, 0.1, 4, 1500
    rng = np.random.default_rng(8)
    if sampled:
        traces = traces_of([[0] * length] * 12, probabilities=[[alpha] * length] * 12)
    else:
        traces = iid_traces(alpha, rng, sequences=12, output_tokens=length)
    run = simulate(scenario(tokens, costs=FLAT, placement=layer_parallel(acceptance_drop=drop)), traces)
    per_round = (length - 1) / run.requests["rounds"].to_numpy()
    kept = alpha * (1 - drop)
    expected = (1 - kept ** (tokens + 1)) / (1 - kept)
    error = per_round.std(ddof=1) / np.sqrt(len(per_round))
    assert abs(per_round.mean() - expected) <= 3 * error
    assert error < 0.02 * expected
    assert run.summary["provenance"]["replay"] == "approximation: recorded acceptance, thinned"


def test_thinned_runs_never_grow_and_agree_with_each_other() -> None:
    recorded = iid_traces(0.9, np.random.default_rng(3), sequences=4, output_tokens=50)
    sequences = select_sequences(recorded)
    whole = compile_replay(recorded, "drafter", sequences, slots=4, seed=1, longest_draft=5)
    thinned = ThinnedRuns(whole, sequences.output_tokens, 0.3, seed=1)
    starts = [thinned.open(2, request, 50) for request in (7, 8, 7)]
    first, other, again = (thinned.run_length[start : start + 50] for start in starts)
    before = whole.run_length[whole.open(2, 7, 50) :][:50]
    assert (first <= before).all()
    assert (first < before).any()
    assert (first[1:][first[:-1] > 0] == first[:-1][first[:-1] > 0] - 1).all(), "one set of lost tokens"
    assert first.tolist() == again.tolist(), "luck belongs to the request"
    assert first.tolist() != other.tolist()
    assert thinned.positions(starts[0] + np.arange(50)).tolist() == list(range(100, 150))
    thinned.close(starts[0])
    assert thinned.open(0, 9, 50) == starts[0], "room is used again"


def test_everything_lost_is_plain_decoding_at_the_price_of_drafting() -> None:
    traces = iid_traces(0.9, np.random.default_rng(1), sequences=3, output_tokens=30)
    run = simulate(scenario(4, costs=FLAT, placement=layer_parallel(acceptance_drop=1.0)), traces)
    assert run.requests["rounds"].to_pylist() == [29] * 3
    assert run.summary["spec_decode_accepted_tokens"] == 0


def test_the_time_on_the_link_and_the_drafts_in_vain_are_told() -> None:
    """One round trip a round; a drafted token that is not accepted is in vain, verified or not."""
    traces = iid_traces(0.6, np.random.default_rng(1), sequences=4, output_tokens=50)
    base = {
        "workload": {"kind": "closed", "concurrency": 2},
        "drafter": {"name": "drafter"},
        "stopping": {"policy": "fixed", "draft_tokens": 3},
        "engine": {"max_num_seqs": 2},
        "costs": {"verifier": {"kind": "linear", "base_s": 0.02}, "drafter": {"kind": "linear", "base_s": 0.002}},
    }

    def run(**placement: object) -> tuple[dict[str, Any], int]:
        result = simulate(Scenario.model_validate({**base, "placement": placement}), traces=traces)
        kinds = result.iterations["kind"].to_pylist()
        return result.summary, kinds.count("decode")

    near, rounds = run(kind="serial")
    assert near["wasted_draft_tokens"] == near["spec_decode_draft_tokens"] - near["spec_decode_accepted_tokens"]
    assert "link_s" not in near
    far, same = run(kind="remote", round_trip_s=0.01)
    assert same == rounds
    assert far["link_s"] == pytest.approx(0.01 * rounds)
    assert far["duration"] - near["duration"] == pytest.approx(far["link_s"])
    ahead, _ = run(kind="overlapped")
    compared = ahead["spec_decode_draft_tokens"] - ahead["spec_decode_accepted_tokens"]
    assert ahead["wasted_draft_tokens"] > compared
