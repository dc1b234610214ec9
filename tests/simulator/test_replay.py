"""Replay: what a TraceSet answers, exactly or in distribution, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from builders import iid_traces
from hypothesis import given
from hypothesis import strategies as st
from scenarios import scenario, traces_of

from calibration.common.errors import ReplayError, ScenarioError
from calibration.traces import TraceSet
from simulator import simulate
from simulator.playback.replay import DrawnRuns, RecordedRuns, Replay, compile_replay, runs_of, select_sequences


def compiled(traces: TraceSet, *, longest: int | None = 4, seed: int = 0, slots: int = 2) -> Replay:
    sequences = select_sequences(traces, drafter="drafter")
    return compile_replay(traces, "drafter", sequences, slots=slots, seed=seed, longest_draft=longest)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_runs_are_the_trues_that_follow(match: list[bool]) -> None:
    expected = []
    for t in range(len(match)):
        run = 0
        while t + run < len(match) and match[t + run]:
            run += 1
        expected.append(run)
    assert runs_of(np.array(match)).tolist() == expected


def test_recorded_runs_are_found_by_sequence_and_position() -> None:
    replay = compiled(traces_of([[2, 1, 0, 1], [0, 3, 0, 0, 1]], proposals=[[4, 1, 0, 2], [3, 3, 3, 1, 1]]))
    assert isinstance(replay, RecordedRuns)
    start = replay.open(1, request=77)
    assert replay.run_length[start : start + 5].tolist() == [0, 3, 0, 0, 1]
    assert replay.proposal_length is not None
    assert replay.proposal_length[start + 3] == 1


def test_position_zero_may_be_missing_because_prefill_emits_the_first_token() -> None:
    runs = [[0, 1, 0, 1], [0, 3, 0, 0, 1]]
    with_zero = simulate(scenario(2), traces_of(runs))
    without = simulate(scenario(2), traces_of(runs, first=1))
    assert without.requests.equals(with_zero.requests)


def test_a_hole_is_named_by_sequence_and_position() -> None:
    with pytest.raises(ReplayError, match=r"'drafter', sequence 'request-0', position 1, where a draft can start"):
        compiled(traces_of([[0, 1, 0, 1], [0, 0, 0]], first=2))


def test_sequences_that_the_drafter_never_saw_are_left_out() -> None:
    traces = traces_of([[0, 1, 0], [0, 0]])
    half = traces.positions.filter([name == "request-1" for name in traces.positions["sequence_id"].to_pylist()])
    partial = TraceSet.build(traces.manifest, {"sequences": traces.sequences, "positions": half})
    assert simulate(scenario(1), partial).requests["sequence_id"].to_pylist() == ["request-1"]
    # The same requests without speculation, so that the two can be compared.
    assert simulate(scenario(None), partial).requests["sequence_id"].to_pylist() == ["request-1"]
    assert simulate(scenario(None, drafter=None), partial).requests.num_rows == 2


def test_domains_choose_sequences_and_unknown_names_get_a_suggestion() -> None:
    traces = traces_of([[0, 1, 0], [0, 0], [0, 0]], domains=("chat", "code"))
    chosen = simulate(scenario(1, traces={"domains": ["code"]}), traces)
    assert chosen.requests["domain"].to_pylist() == ["code"]
    with pytest.raises(ScenarioError) as caught:
        simulate(scenario(1, traces={"domains": ["cod"]}, drafter={"name": "draftr"}), traces)
    assert "got 'cod'; did you mean 'code'?" in str(caught.value)
    assert "got 'draftr'; did you mean 'drafter'?" in str(caught.value)


def test_cut_run_lengths_refuse_longer_drafts() -> None:
    cut = traces_of([[2, 2, 1, 0, 1]], max_draft_tokens=2)
    assert simulate(scenario(2), cut).summary["completed"] == 1
    with pytest.raises(ReplayError, match=r"draft_tokens: must be at most 2, .* got 3"):
        simulate(scenario(3), cut)
    # An oracle asks for no more than was seen.
    assert simulate(scenario("oracle"), cut).summary["completed"] == 1


def test_a_drafter_that_says_how_much_it_proposes_limits_itself() -> None:
    runs, proposals = [[0, 2, 1, 0, 1]], [[2, 2, 1, 0, 2]]
    lookup = traces_of(runs, proposals=proposals, deterministic=True, max_draft_tokens=2)
    row = simulate(scenario(8), lookup).requests.to_pylist()[0]
    # Rounds at t = 1 (2 drafted, 2 accepted) and t = 4 (2 drafted, 1 accepted, no token left for a bonus).
    assert (row["rounds"], row["drafted_tokens"], row["accepted_tokens"]) == (2, 4, 3)


def test_drawn_runs_follow_the_recorded_probabilities() -> None:
    rng = np.random.default_rng(5)
    a = np.round(rng.random(12), 3)
    a[3], a[7] = 0.0, 1.0
    replay = compiled(traces_of([[0] * 12], probabilities=[a.tolist()]))
    assert isinstance(replay, DrawnRuns)
    draws = 4000
    seen = np.zeros((draws, 12), dtype=np.int64)
    for request in range(draws):
        start = replay.open(0, request)
        seen[request] = replay.run_length[start : start + 12]
        replay.close(start)
    for t in range(12):
        survive = np.concatenate((np.cumprod(a[t:]), [0.0]))
        for run in range(12 - t):
            expected = survive[run] if run < 12 - t else 0.0
            rate = (seen[:, t] > run).mean()
            assert abs(rate - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12


def test_luck_belongs_to_the_request_not_to_the_moment() -> None:
    traces = traces_of([[0] * 30, [0] * 20], probabilities=[[0.5] * 30, [0.5] * 20])

    def luck(replay: Replay, sequence: int, request: int) -> list[int]:
        start = replay.open(sequence, request)
        return replay.run_length[start : start + 20].tolist()

    one, other = compiled(traces), compiled(traces)
    luck(other, 0, 9)
    assert luck(one, 1, 4) == luck(other, 1, 4)
    assert luck(compiled(traces), 1, 4) != luck(compiled(traces), 1, 5)
    assert luck(compiled(traces), 1, 4) != luck(compiled(traces, seed=1), 1, 4)


def test_drawn_proposals_limit_runs() -> None:
    proposals = [[0, 1, 0, 2, 0, 1]]
    traces = traces_of([[0] * 6], probabilities=[[1.0] * 6], proposals=proposals)
    replay = compiled(traces)
    start = replay.open(0, 0)
    assert replay.run_length[start : start + 6].tolist() == proposals[0]


def test_one_hot_drafters_replay_sampled_text_exactly() -> None:
    sampled = traces_of([[1, 0, 1, 0]])
    manifest = sampled.manifest.model_copy(
        update={"decoding": sampled.manifest.decoding.model_copy(update={"mode": "sampled", "temperature": 1.0})}
    )
    traces = TraceSet.build(manifest, {"sequences": sampled.sequences, "positions": sampled.positions})
    result = simulate(scenario(1), traces)
    assert result.summary["provenance"]["replay"] == "exact (recorded run lengths)"
    assert result.requests["accepted_tokens"].to_pylist() == [1]


def test_sampled_acceptance_needs_probabilities() -> None:
    traces = traces_of([[0] * 4], probabilities=[[0.5] * 4], first=2)
    with pytest.raises(ReplayError, match=r"'accept_probability': must be recorded .* position 1"):
        compiled(traces)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_sampled_and_recorded_replay_agree_with_the_closed_form(alpha: float, k: int) -> None:
    """Tokens per round, bonus included: (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023), within 0.5%."""
    expected = (1 - alpha ** (k + 1)) / (1 - alpha)
    traces = iid_traces(alpha, np.random.default_rng(12), sequences=64, output_tokens=10_000)
    result = simulate(scenario(k, batch=64), traces)
    rounds = result.requests["rounds"].to_numpy().sum()
    # The prefill's token is no round's, and each request's last round may be cut by its end: one round in thousands.
    assert (64 * 9_999) / rounds == pytest.approx(expected, rel=0.005)
    assert result.summary["spec_decode_acceptance_length"] == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_drawn_replay_agrees_with_the_closed_form(k: int) -> None:
    alpha = 0.6
    traces = traces_of([[0] * 10_000] * 4, probabilities=[[alpha] * 10_000] * 4)
    result = simulate(scenario(k, batch=64, workload={"requests": 64}), traces)
    assert result.summary["provenance"]["replay"] == "exact in distribution (sampled)"
    expected = (1 - alpha ** (k + 1)) / (1 - alpha)
    assert (64 * 9_999) / result.requests["rounds"].to_numpy().sum() == pytest.approx(expected, rel=0.005)
    by_position = result.summary["spec_decode_per_position_acceptance_rates"]
    assert by_position == pytest.approx([alpha ** (j + 1) for j in range(k)], rel=0.03)
