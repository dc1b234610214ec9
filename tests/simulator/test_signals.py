"""Signals against the drafter's own paths, drawn and recorded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from builders import felt_traces, manifest

from calibration.common.errors import ReplayError
from calibration.traces import TraceSet, bundled
from simulator.playback.replay import compile_replay, select_sequences
from simulator.playback.signals import (
    DrafterRecording,
    RecordedSignals,
    features,
    fit_logistic,
    logistic,
    make_signals,
    predicted,
)


def compiled(
    traces: TraceSet, drafter: str = "drafter", *, predict: bool = False
) -> tuple[DrafterRecording, RecordedSignals]:
    sequences = select_sequences(traces, drafter=drafter)
    replay = compile_replay(traces, drafter, sequences, slots=4, seed=0, longest_draft=4)
    material = DrafterRecording(traces, drafter, sequences)
    return material, make_signals(replay, material, predict=predict)


def recorded_paths(traces: TraceSet, material: DrafterRecording) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The recorded rollouts by flat place, row by row."""
    paths: dict[int, tuple[list[float], list[float]]] = {}
    ids = list(material.sequences.ids)
    for row in traces.rollouts.to_pylist():
        if row["drafter"] == material.drafter:
            place = int(material.starts[ids.index(row["sequence_id"])]) + row["position"]
            confidence, entropy = paths.setdefault(place, ([], []))
            confidence.append(row["drafter_confidence"])
            entropy.append(row["drafter_entropy"])
    return {place: (np.array(a), np.array(b)) for place, (a, b) in paths.items()}


def test_where_a_rollout_was_recorded_the_whole_path_is_exact() -> None:
    traces, paths = felt_traces(np.random.default_rng(1), stride=1)
    material, signals = compiled(traces)
    for (name, t), (confidence, entropy) in paths.items():
        cursor = material.starts[[material.sequences.ids.index(name)]] + t
        assert signals.confidence(cursor, 8)[0] == pytest.approx(confidence, abs=1e-6)
        assert signals.entropy(cursor, 8)[0] == pytest.approx(entropy, abs=1e-6)
    assert signals.estimated_steps == 0


def test_a_drafter_that_sees_tokens_alone_feels_the_same_behind_the_same_wrong_token() -> None:
    """Rollouts at every fourth start also tell the tails of drafts that go wrong at the same token."""
    traces, paths = felt_traces(np.random.default_rng(2), stride=4, steps=12, ranks=(0.8, 0.1))
    material, signals = compiled(traces)
    runs = np.nan_to_num(material.columns("run_length")[0]).astype(int)
    length = {}
    for sequence in range(len(material.sequences)):
        for t in range(0, 60, 4):
            n = runs[material.starts[sequence] + t]
            tail = 12 - min(n + 1, 60 - t)
            wrong = (sequence, t + n)
            length[wrong] = max(length.get(wrong, 0), tail)
    exact = estimated = 0
    for (name, t), (confidence, _) in paths.items():
        sequence = material.sequences.ids.index(name)
        n = runs[material.starts[sequence] + t]
        on_text = min(n + 1, 60 - t)
        told = min(12, on_text + length.get((sequence, t + n), 0))
        before = signals.estimated_steps
        path = signals.confidence(material.starts[[sequence]] + t, 12)[0]
        assert path[:told] == pytest.approx(confidence[:told], abs=1e-6)
        assert signals.estimated_steps - before == 12 - told
        exact, estimated = exact + told, estimated + 12 - told
    assert exact > estimated > 0


def test_a_drafter_with_a_state_of_its_own_shares_no_tail() -> None:
    traces, paths = felt_traces(np.random.default_rng(3), stride=4, own_state=True)
    material, signals = compiled(traces)
    runs = np.nan_to_num(material.columns("run_length")[0]).astype(int)
    for (name, t), (confidence, _) in paths.items():
        cursor = material.starts[[material.sequences.ids.index(name)]] + t
        before = signals.estimated_steps
        path = signals.confidence(cursor, 8)[0]
        on_text = min(runs[cursor[0]] + 1, 60 - t, 8)
        certain = 8 if t % 4 == 0 and on_text < 8 else on_text
        assert path[:certain] == pytest.approx(confidence[:certain], abs=1e-6)
        assert signals.estimated_steps - before == 8 - certain


def test_borrowed_tails_are_recorded_ones_and_do_not_change_from_call_to_call() -> None:
    traces, _ = felt_traces(np.random.default_rng(4), stride=8, ranks=(0.3, 0.3))
    material, signals = compiled(traces)
    recorded = {round(float(v), 5) for v in traces.rollouts["drafter_confidence"].to_numpy()}
    recorded |= {round(float(v), 5) for v in traces.positions["drafter_confidence"].to_numpy()}
    cursors = material.needed
    path = signals.confidence(cursors, 8)
    assert {round(float(v), 5) for v in path.ravel()} <= recorded
    assert np.array_equal(path, signals.confidence(cursors, 8))
    assert np.array_equal(path[5:9], signals.confidence(cursors[5:9], 8))


@pytest.mark.parametrize("drafter", ["exit-24", "skip-13-17"])
def test_on_the_real_recording_rollouts_come_back(drafter: str) -> None:
    traces = bundled("smollm2-135m-cpu-greedy")
    material, signals = compiled(traces, drafter)
    paths = recorded_paths(traces, material)
    places = np.array(sorted(set(paths) & set(material.needed.tolist())))
    steps = min(len(paths[place][0]) for place in places.tolist())
    assert len(places) > 1000
    assert steps >= 8
    for kind, predicted_path in enumerate((signals.confidence(places, steps), signals.entropy(places, steps))):
        recorded = np.array([paths[place][kind][:steps] for place in places.tolist()])
        # Positions and rollouts come from passes of different shapes: rounding differs.
        assert np.abs(predicted_path - recorded).max() < 2e-3


def test_what_is_missing_is_named() -> None:
    traces, _ = felt_traces(np.random.default_rng(5))
    with pytest.raises(ReplayError, match=r"rollouts\.parquet: must hold rollouts of drafter 'drafter'"):
        compiled(dataclasses.replace(traces, rollouts=traces.rollouts.slice(0, 0)))
    index = traces.positions.schema.get_field_index("drafter_entropy")
    holes = traces.positions["drafter_entropy"].to_pylist()
    holes[65] = None
    broken = traces.positions.set_column(index, traces.positions.schema.field(index), pa.array(holes, pa.float32()))
    with pytest.raises(ReplayError, match=r"'drafter_entropy'.* 1 positions, first sequence 'request-1', position 5"):
        compiled(dataclasses.replace(traces, positions=broken))
    given = dataclasses.replace(traces, manifest=manifest(deterministic=True))
    with pytest.raises(ReplayError, match="proposes given tokens"):
        compiled(given)


def test_the_logistic_fit_finds_the_coefficients_it_was_drawn_from() -> None:
    rng = np.random.default_rng(6)
    confidence, entropy = rng.uniform(0.02, 0.98, 40_000), rng.uniform(0, 3, 40_000)
    truth = np.array([0.4, 0.8, -0.5])
    x = features(confidence, entropy)
    accepted = (rng.random(40_000) < logistic(x @ truth)).astype(float)
    fitted = fit_logistic(x, accepted)
    assert fitted == pytest.approx(truth, abs=0.08)
    assert logistic(x @ fitted).mean() == pytest.approx(accepted.mean(), abs=1e-6)
    # Soft labels, given exactly, are met exactly (but for the tiny penalty).
    assert fit_logistic(x, logistic(x @ truth)) == pytest.approx(truth, abs=1e-4)


def test_no_request_is_predicted_from_its_own_text() -> None:
    traces, _ = felt_traces(np.random.default_rng(7), sequences=10)
    material, signals = compiled(traces, predict=True)
    index = traces.positions.schema.get_field_index("accept_probability")
    names = traces.positions["sequence_id"].to_pylist()
    values = traces.positions["accept_probability"].to_pylist()
    flipped = [1 - a if name == "request-3" else a for name, a in zip(names, values, strict=True)]
    changed = traces.positions.set_column(
        index, traces.positions.schema.field(index), pa.array(flipped, pa.float32())
    )
    _, others = compiled(dataclasses.replace(traces, positions=changed), predict=True)
    own, other = material.starts[[3]] + 10, material.starts[[4]] + 10
    assert np.array_equal(signals.acceptance(own, 5), others.acceptance(own, 5))
    assert not np.array_equal(signals.acceptance(other, 5), others.acceptance(other, 5))
    assert ((signals.acceptance(own, 5) > 0) & (signals.acceptance(own, 5) < 1)).all()


def test_given_coefficients_are_taken() -> None:
    traces, _ = felt_traces(np.random.default_rng(8))
    sequences = select_sequences(traces, drafter="drafter")
    replay = compile_replay(traces, "drafter", sequences, slots=4, seed=0, longest_draft=4)
    material = DrafterRecording(traces, "drafter", sequences)
    signals = make_signals(replay, material, predict=True, coefficients=np.array([0.0, 1.0, 0.0]))
    cursors = material.needed[:30]
    # The logistic of the logit is the confidence itself.
    assert signals.acceptance(cursors, 3) == pytest.approx(np.clip(signals.confidence(cursors, 3), 1e-6, 1 - 1e-6))
    one = predicted(np.array([[1.0, 0.0, 0.0]]), np.array([0]), np.array([[0.3]]), np.array([[1.0]]))
    assert one[0, 0] == pytest.approx(1 / (1 + np.exp(-1)))


def test_sampled_drafts_are_exact_on_the_text_and_estimated_behind_it() -> None:
    """Random drafts: rollouts tell how drafts feel once they left the text, not what this draft feels."""
    traces, _ = felt_traces(np.random.default_rng(9), stride=2, ranks=(0.7, 0.2))
    no_runs = traces.positions.set_column(
        3, traces.positions.schema.field(3), pa.nulls(traces.positions.num_rows, pa.int32())
    )
    sampled = dataclasses.replace(traces, manifest=manifest(mode="sampled"), positions=no_runs)
    sequences = select_sequences(sampled, drafter="drafter")
    replay = compile_replay(sampled, "drafter", sequences, slots=2, seed=3, longest_draft=8)
    material = DrafterRecording(sampled, "drafter", sequences)
    signals = make_signals(replay, material)
    sure = material.columns("drafter_confidence")[0]
    behind = {round(float(v), 5) for v in sampled.rollouts["drafter_confidence"].to_numpy()}
    for sequence in (0, 4):
        start = replay.open(sequence, 17 + sequence)
        for t in range(1, 60):
            before = signals.estimated_steps
            path = signals.confidence(np.array([start + t]), 8)[0]
            certain = min(int(replay.run_length[start + t]) + 1, 60 - t, 8)
            place = int(material.starts[sequence]) + t
            assert path[:certain] == pytest.approx(sure[place : place + certain])
            assert signals.estimated_steps - before == 8 - certain
            assert {round(float(v), 5) for v in path[certain:]} <= behind
