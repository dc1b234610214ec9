"""The stopping policy that learns what the next tokens would gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import felt_traces, iid_traces
from scenarios import scenario

from calibration.errors import ReplayError
from calibration.traces import TraceSet
from simulator import Scenario, simulate
from simulator.playback.predictor import FOLDS
from simulator.playback.recorded import Material
from simulator.playback.replay import select_sequences
from simulator.stopping.learned import acceptance_so_far, fit_outlook, worth_it

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
        material = Material(source, "drafter", select_sequences(source, drafter="drafter"))
        found.append(fit_outlook(material, *material.columns("drafter_confidence", "drafter_entropy")))
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


def test_acceptance_so_far_starts_anew_with_every_request(traces: TraceSet) -> None:
    material = Material(traces, "drafter", select_sequences(traces, drafter="drafter"))
    rate = acceptance_so_far(material, material.columns("accept_probability")[0])
    assert set(rate[material.starts + 1].tolist()) == {rate[1]}
    assert ((rate > 0) & (rate < 1)).all()


def test_traces_without_confidence_are_refused() -> None:
    bare = iid_traces(0.6, np.random.default_rng(0), sequences=6, output_tokens=40)
    with pytest.raises(ReplayError, match="drafter_confidence"):
        simulate(learned(1, CHEAP), bare)
