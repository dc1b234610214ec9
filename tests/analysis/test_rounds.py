"""Replayed rounds against slow loops, against enumeration, and at the edges of a recording."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from drawn import drawn_runs, given_runs, played, sampled
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.common.rounds import recording, replay_rounds
from calibration.common.errors import ReplayError, TraceError
from calibration.traces import TraceSet, make_table


def slow_sums(rounds: list[dict[str, int]], k: int) -> dict[str, object]:
    """Sums of one sequence, counted one round at a time."""
    whole = [r for r in rounds if r["left"] > k]
    depths = range(1, k + 1)
    return {
        "rounds": len(whole),
        "drafting_rounds": sum(r["drafted"] > 0 for r in whole),
        "drafted": sum(r["drafted"] for r in whole),
        "accepted": sum(r["accepted"] for r in whole),
        "accepted_by_position": [sum(r["accepted"] >= i for r in whole) for i in depths],
        "at_risk": [
            sum(r["accepted"] >= i - 1 and min(r["drafted"], r["left"]) >= i for r in rounds) for i in depths
        ],
        "accepted_at": [sum(r["accepted"] >= i for r in rounds) for i in depths],
    }


@given(data=st.data(), k=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_greedy_replay_equals_a_slow_loop(data: st.DataObject, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    runs = [drawn_runs(rng, tokens) for tokens in lengths]
    proposals = None
    if data.draw(st.booleans()):
        proposals = [[int(rng.integers(n, n + 4)) for n in row] for row in runs]
    fast = replay_rounds(recording(given_runs(runs, proposals=proposals), "drafter"), k)
    for i, row in enumerate(runs):
        slow = slow_sums(played(row, k, None if proposals is None else proposals[i]), k)
        for name, expected in slow.items():
            assert np.array_equal(getattr(fast, name)[i], expected), name


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sampled_expectations_equal_enumeration(k: int) -> None:
    """Every pattern of accepted and rejected tokens, weighted with its probability."""
    chances = [0.3, 0.9, 0.5, 0.2, 0.75, 0.6, 0.1]
    expected: dict[str, np.ndarray] = {}
    for pattern in itertools.product([False, True], repeat=len(chances)):
        weight = np.prod([a if yes else 1 - a for a, yes in zip(chances, pattern, strict=True)])
        runs = [
            next((j for j, yes in enumerate(pattern[t:]) if not yes), len(pattern) - t) for t in range(len(pattern))
        ]
        for name, value in slow_sums(played(runs, k), k).items():
            expected[name] = expected.get(name, 0.0) + weight * np.asarray(value, dtype=float)
    found = replay_rounds(recording(sampled([chances]), "drafter"), k)
    for name, value in expected.items():
        # Probabilities are stored as float32.
        assert getattr(found, name)[0] == pytest.approx(value, abs=1e-6), name


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many long sequences are replayed a few at a time; the sums come back in their order."""
    rng = np.random.default_rng(8)
    recorded = recording(given_runs([drawn_runs(rng, int(rng.integers(1, 60))) for _ in range(17)]), "drafter")
    whole = replay_rounds(recorded, 3)
    monkeypatch.setattr("analysis.common.rounds._BLOCK_ELEMENTS", 500)
    blocks = replay_rounds(recorded, 3)
    assert blocks.rounds.tolist() == whole.rounds.tolist()
    assert blocks.at_risk.tolist() == whole.at_risk.tolist()
    assert len(set(whole.rounds.tolist())) > 5


def test_a_perfect_drafter_is_cut_only_by_the_end() -> None:
    tokens, k = 21, 4
    rounds = replay_rounds(recording(given_runs([list(range(tokens, 0, -1))]), "drafter"), k)
    # From position 1 in steps of five: rounds at 1, 6, 11, 16 leave 20, 15, 10, 5 tokens; all are complete.
    assert rounds.rounds[0] == 4
    assert rounds.accepted[0] == 16
    assert rounds.at_risk[0].tolist() == rounds.accepted_at[0].tolist() == [4, 4, 4, 4]


def test_the_end_censors_and_does_not_reject() -> None:
    # Two tokens are left at position 1 and both match: a draft of 4 is compared twice and never rejected.
    rounds = replay_rounds(recording(given_runs([[3, 2, 1]]), "drafter"), 4)
    assert rounds.rounds[0] == 0
    assert rounds.at_risk[0].tolist() == [1, 1, 0, 0]
    assert rounds.accepted_at[0].tolist() == [1, 1, 0, 0]


def test_draft_lengths_beyond_the_recording_are_refused() -> None:
    recorded = recording(given_runs([[2, 1, 0, 0]], cap=2), "drafter")
    with pytest.raises(ReplayError, match=r"drafter 'drafter': draft length must lie in \[1, 2\], got 3"):
        replay_rounds(recorded, 3)
    with pytest.raises(ReplayError, match="got 0"):
        replay_rounds(recorded, 0)


def test_unknown_drafter_gets_a_suggestion() -> None:
    with pytest.raises(TraceError, match="did you mean 'drafter'"):
        recording(given_runs([[0, 0]]), "draftr")


def test_a_recording_may_begin_late_and_leave_requests_out() -> None:
    whole = given_runs([[0, 1, 0, 2, 1, 0], [0, 0, 0]])
    late = whole.positions.filter(
        [
            t >= 2 and s == "s0"
            for t, s in zip(
                whole.positions["position"].to_pylist(), whole.positions["sequence_id"].to_pylist(), strict=True
            )
        ]
    )
    rounds = replay_rounds(
        recording(TraceSet.build(whole.manifest, {"sequences": whole.sequences, "positions": late}), "drafter"), 1
    )
    # Rounds at 2 (rejects), 3 (accepts one), 5 (rejects; the bonus token does not fit).
    assert rounds.rounds.tolist() == [2, 0]
    assert rounds.accepted.tolist() == [1, 0]
    assert rounds.at_risk[:, 0].tolist() == [3, 0]


def test_acceptance_must_be_recorded_one_way_throughout() -> None:
    traces = sampled([[0.5, 0.5, 0.5]])
    columns = {name: traces.positions[name].to_pylist() for name in ("sequence_id", "drafter", "position")}
    mixed = make_table("positions", {**columns, "run_length": [1, None, 0], "accept_probability": [None, 0.5, 0.5]})
    broken = TraceSet.build(traces.manifest, {"sequences": traces.sequences, "positions": mixed})
    with pytest.raises(ReplayError, match="every row must hold run_length, or every row accept_probability"):
        recording(broken, "drafter")
