"""The stopping policy that learns what the next tokens would gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import felt_traces, iid_traces
from scenarios import scenario

from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator import Scenario, simulate
from simulator.playback.replay import select_sequences
from simulator.playback.signals import FOLDS, DrafterRecording
from simulator.stopping.goodput import worth_it
from simulator.stopping.learned_signals import Recall, fit_outlook, make_recall, outlook_columns

CHEAP = {
    "overhead_s": 0.001,
    "verifier": {"kind": "linear", "base_s": 0.02, "per_token_s": 0.0002},
    "drafter": {"kind": "linear", "base_s": 0.001, "per_token_s": 0.00001},
}


def learned(batch: int, costs: dict[str, Any], policy: dict[str, Any] | None = None) -> Scenario:
    """A scenario with the policy, unless another is given."""
    data = scenario(0, batch=batch, costs=costs).model_dump(exclude_none=True)
    data["stopping"] = policy or {"policy": "learned", "max_draft_tokens": 8}
    return Scenario.model_validate(data)


def speed(traces: TraceSet, batch: int, costs: dict[str, Any], policy: dict[str, Any] | None = None) -> float:
    """Output tokens per second."""
    return float(simulate(learned(batch, costs, policy), traces).summary["output_throughput"])


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    """Traces whose confidence tells something of acceptance."""
    return felt_traces(np.random.default_rng(0), sequences=10, output_tokens=100)[0]


def test_it_beats_every_fixed_length_where_confidence_tells(traces: TraceSet) -> None:
    fixed = max(speed(traces, 1, CHEAP, {"policy": "fixed", "draft_tokens": k}) for k in range(6))
    assert speed(traces, 1, CHEAP) > fixed


def test_it_stops_drafting_where_a_step_costs_more_than_it_can_bring(traces: TraceSet) -> None:
    dear = {**CHEAP, "drafter": {"kind": "linear", "base_s": 0.05}}
    table = simulate(learned(2, dear), traces).iterations
    assert table["drafted_tokens"].to_numpy().sum() == 0


def test_longer_drafts_where_drafting_is_cheaper(traces: TraceSet) -> None:
    drafted = []
    for price in (0.0001, 0.004):
        costs = {**CHEAP, "drafter": {"kind": "linear", "base_s": price}}
        drafted.append(simulate(learned(1, costs), traces).iterations["drafted_tokens"].to_numpy().mean())
    assert drafted[0] > drafted[1]


def test_those_who_are_willing_must_pay_for_the_step_together() -> None:
    worth, own = np.array([[3.0], [2.0], [0.5]]), np.array([1.0])
    everyone = np.ones(3, dtype=bool)
    assert worth_it(everyone, worth, own, np.array([2.9])).tolist() == [True, True, False]
    assert worth_it(everyone, worth, own, np.array([3.1])).tolist() == [False, False, False]
    assert worth_it(np.array([False, True, True]), worth, own, np.array([0.5])).tolist() == [False, True, False]


def test_a_first_step_that_does_not_pay_is_taken_for_those_behind_it() -> None:
    worth, own = np.array([[1.0, 2.0, 3.0]]), np.full(3, 0.1)
    fixed = np.array([2.0, 0.0, 0.0])
    assert worth_it(np.ones(1, dtype=bool), worth, own, fixed).tolist() == [True]
    assert worth_it(np.ones(1, dtype=bool), worth[:, :1], own[:1], fixed[:1]).tolist() == [False]


def test_coefficients_of_a_fold_ignore_its_sequences() -> None:
    first, other = (felt_traces(np.random.default_rng(seed), sequences=10)[0] for seed in (0, 1))
    found = []
    for source in (first, mixed(first, other)):
        material = DrafterRecording(source, "drafter", select_sequences(source, drafter="drafter"))
        felt = material.columns("drafter_confidence", "drafter_entropy")
        found.append(fit_outlook(material, *felt, make_recall(material, felt[0])))
    for one, two in zip(*found, strict=True):
        assert one[0].tolist() == two[0].tolist(), "fold 0 was fitted to the sequences that are the same"
        assert one[1].tolist() != two[1].tolist()


def mixed(first: TraceSet, other: TraceSet) -> TraceSet:
    """Give `first` with the sequences of fold 0 taken from `other`."""
    changed = [f"request-{i}" for i in range(0, 10, FOLDS)]
    tables = {"sequences": first.sequences}
    for name in ("positions", "rollouts"):
        kept = [row for row in getattr(first, name).to_pylist() if row["sequence_id"] not in changed]
        taken = [row for row in getattr(other, name).to_pylist() if row["sequence_id"] in changed]
        rows = sorted(
            kept + taken,
            key=lambda row: (int(row["sequence_id"].split("-")[1]), row["position"], row.get("step", 0)),
        )
        schema = getattr(first, name).schema
        tables[name] = type(getattr(first, name)).from_pylist(rows, schema=schema)
    return TraceSet.build(first.manifest, tables)


def test_the_past_starts_anew_with_every_request(traces: TraceSet) -> None:
    material = DrafterRecording(traces, "drafter", select_sequences(traces, drafter="drafter"))
    recall = make_recall(material, material.columns("drafter_confidence")[0])
    starts = recall.start[material.starts]
    assert (starts == starts[0]).all()
    assert (recall.start[material.starts + 20] != starts[0]).any(axis=1).all()


def test_the_past_of_a_place_ignores_what_is_recorded_from_there_on(traces: TraceSet) -> None:
    material = DrafterRecording(traces, "drafter", select_sequences(traces, drafter="drafter"))
    place = int(material.starts[3]) + 50
    rows = traces.positions.to_pylist()
    for row in rows[place:]:
        row.update(accept_probability=1.0 - row["accept_probability"], drafter_confidence=0.123)
    schema = traces.positions.schema
    tables = {"sequences": traces.sequences, "rollouts": traces.rollouts}
    tables["positions"] = type(traces.positions).from_pylist(rows, schema=schema)
    other = DrafterRecording(TraceSet.build(traces.manifest, tables), "drafter", material.sequences)
    one, two = (make_recall(m, m.columns("drafter_confidence")[0]).start for m in (material, other))
    assert one[: place + 1].tolist() == two[: place + 1].tolist()
    assert one[place + 1].tolist() != two[place + 1].tolist()


def echoing() -> Recall:
    """Ten places; the text before place 8 ended like that before place 4, and that like the one before place 1."""
    source = np.full(10, -1)
    source[[8, 4]] = [4, 1]
    accepted = np.array([1, 1, 0, 1, 0, 1, 1, 0, 1, 1], dtype=float)
    return Recall(np.ones((10, 1)), np.full(10, 0.6), source, np.full(10, 0.7), accepted, np.full(10, 0.5))


def test_a_source_tells_how_drafts_fared_there_and_wraps_round_at_its_end() -> None:
    there, _ = echoing().echo(np.array([8, 4, 0]), 6)
    assert (there[0] + 0.6).tolist() == pytest.approx([0, 1, 1, 0, 0, 1])  # places 4 5 6 7 4 5
    assert (there[1] + 0.6).tolist() == pytest.approx([1, 0, 1, 1, 0, 1])  # places 1 2 3 1 2 3
    assert not there[2].any()


def test_survival_at_the_source_and_its_source_are_told_step_by_step() -> None:
    before, *_ = echoing().before(np.array([4, 8]), 3)
    assert before[0, :, 4].tolist() == pytest.approx([1, 1, 0])  # reached steps 0, 1 at the source
    assert before[0, :, 5].tolist() == pytest.approx([1, 0, 0])
    assert (before[1, :, 6] + 0.6).tolist() == pytest.approx([1, 0, 1])  # the source of place 8 is 4, its source 1
    assert before[:, 0, -1].tolist() == [0, 1]


def test_a_step_is_forecast_from_the_steps_before_it_alone() -> None:
    rng = np.random.default_rng(0)
    confidence, entropy = rng.uniform(0.1, 0.9, (1, 6)), rng.uniform(0, 3, (1, 6))
    place = np.array([8])
    one = outlook_columns(echoing(), place, confidence, entropy)
    confidence[:, 3:], entropy[:, 3:] = 0.01, 9.0
    two = outlook_columns(echoing(), place, confidence, entropy)
    assert one[0].tolist() == two[0].tolist()
    assert one[1][:, :3].tolist() == two[1][:, :3].tolist()
    assert (one[1][:, 3:] != two[1][:, 3:]).any(axis=2).all()


def test_traces_without_confidence_are_refused() -> None:
    bare = iid_traces(0.6, np.random.default_rng(0), sequences=6, output_tokens=40)
    with pytest.raises(ReplayError, match="drafter_confidence"):
        simulate(learned(1, CHEAP), bare)
