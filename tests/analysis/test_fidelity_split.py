"""Acceptance before time, and whose an error is: engines that take exactly the stated seconds, one thing changed."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from measured_made import LOOKUP, STUDENT, Sequences, condition, made_traces, measure

from analysis.fidelity.counts import PARTS, Count, Split, counts, disagreements, positions_by, tokens_per_round
from analysis.fidelity.table import Condition
from analysis.fidelity.validate import read, to_csv, validate, write
from calibration.common.toml import dumps
from calibration.measured import MeasuredRun
from calibration.traces import TraceSet

LINEAR = {"kind": "linear", "base_s": 0.01, "per_token_s": 0.002, "per_context_token_s": 0.00003}
FREE = {"kind": "linear", "base_s": 0.0, "charged": "per_round"}
PRICES = {"verifier": LINEAR, "drafter": FREE}


def linear_law(decoding: Sequences, prompts: Sequences) -> float:
    """The engine that `LINEAR` prices exactly; the simulator counts the last token of a sequence as cached."""
    tokens, cached = (sum(one[i] for one in decoding + prompts) for i in (0, 1))
    return 0.01 + 0.002 * tokens + 0.00003 * (cached + len(decoding))


def weaker(traces: TraceSet, kept: float = 0.5, *, proposes: float = 1.0) -> TraceSet:
    """The same requests and drafts, of which fewer tokens are accepted, or, with `proposes`, fewer drafts."""
    rng = np.random.default_rng(3)
    table = traces.positions
    own = pc.fill_null(table["proposal_length"], 8).to_numpy()
    runs = np.where(rng.random(table.num_rows) < kept, table["run_length"].to_numpy(), 0)
    lengths = np.where(rng.random(table.num_rows) < proposes, own, 0)
    runs = np.minimum(runs, lengths)
    columns = {"run_length": runs, "proposal_length": lengths}
    for name, values in columns.items():
        field = table.schema.field(name)
        null = table[name].is_null().combine_chunks() if name == "proposal_length" else None
        array = pa.array(values, type=field.type, mask=None if null is None else null.to_numpy(zero_copy_only=False))
        table = table.set_column(table.schema.get_field_index(name), field, array)
    return TraceSet.build(traces.manifest, {"sequences": traces.sequences, "positions": table})


def compared(
    root: Path,
    data: dict[str, Any],
    *,
    predicted: dict[str, Any] | None = None,
    engine: TraceSet | None = None,
    tells_steps: bool = True,
) -> Condition:
    """Measure `data` with the text and drafts of `engine`, and predict `predicted` with those of `made_traces`."""
    traces = made_traces(sequences=16)
    source = root / "made"
    (traces if engine is None else engine).write(source / "traces")
    measure(source / "run", traces if engine is None else engine, data, law=linear_law, tells_steps=tells_steps)
    if engine is not None:
        traces.write(source / "own")
    told = dict(predicted or data)
    if engine is not None:
        told |= {"traces": {"path": "../own"}}
    (source / "run" / "scenario.toml").write_text(dumps(told), encoding="utf-8")
    (found,) = validate(root, workers=1).conditions
    return found


def parts(found: Condition) -> tuple[float, float, float]:
    """The three parts, which multiply to the whole."""
    split = found.split
    assert split is not None
    assert split.acceptance is not None
    assert split.step_time is not None
    got = (split.acceptance, split.step_time, split.queue)
    assert np.prod([1 + part for part in got]) == pytest.approx(1 + split.whole, rel=1e-12)
    whole = found.of("mean_e2el_ms")
    assert whole is not None
    assert split.whole == pytest.approx(whole.error, rel=1e-12)
    return got


# --- whose error


@pytest.mark.parametrize("rate_rps", [None, 3.0])
@pytest.mark.parametrize(("batch", "drafted", "drafter"), [(1, 3, LOOKUP), (4, 3, LOOKUP), (4, 0, LOOKUP)])
def test_where_nothing_is_wrong_no_part_is(
    tmp_path: Path, batch: int, drafted: int, drafter: str, rate_rps: float | None
) -> None:
    found = compared(tmp_path, condition(batch, drafted, drafter, rate_rps=rate_rps, costs=PRICES))
    assert parts(found) == pytest.approx((0, 0, 0), abs=1e-9)
    assert not any(count.material for count in found.counts)


@pytest.mark.parametrize("factor", [0.8, 1.25])
@pytest.mark.parametrize("batch", [1, 4])
def test_wrong_costs_are_step_time_alone(tmp_path: Path, batch: int, factor: float) -> None:
    wrong = {key: value * factor if isinstance(value, float) else value for key, value in LINEAR.items()}
    data = condition(batch, 3, costs=PRICES)
    found = compared(tmp_path, data, predicted=data | {"costs": {"verifier": wrong, "drafter": FREE}})
    assert parts(found) == pytest.approx((0, factor - 1, 0), abs=1e-9)


@pytest.mark.parametrize(("batch", "tolerance"), [(1, 0.005), (4, 0.02)])
def test_wrong_acceptance_is_acceptance_alone(tmp_path: Path, batch: int, tolerance: float) -> None:
    engine = weaker(made_traces(sequences=16))
    found = compared(tmp_path, condition(batch, 3, costs=PRICES), engine=engine)
    acceptance, step_time, queue = parts(found)
    assert acceptance < -0.05
    assert step_time == pytest.approx(0, abs=1e-9)
    assert queue == pytest.approx(0, abs=tolerance)


def test_wrong_arrivals_are_queue_alone(tmp_path: Path) -> None:
    data = condition(2, 3, rate_rps=1.0, costs=PRICES)
    slower = data | {"workload": {"kind": "poisson", "rate_rps": 6.0}}
    found = compared(tmp_path, data, predicted=slower)
    acceptance, step_time, queue = parts(found)
    assert (acceptance, step_time) == pytest.approx((0, 0), abs=1e-9)
    assert queue > 0.2


def test_the_steps_of_a_model_that_drafts_are_priced(tmp_path: Path) -> None:
    """Its draft steps are rows of their own: prices of them and of the verifier move the step time, nothing else."""
    student = {"kind": "linear", "base_s": 0.004, "per_token_s": 0.0002}
    costs = {"verifier": LINEAR, "drafter": student}
    found = compared(tmp_path, condition(1, 3, STUDENT, costs=costs))
    acceptance, step_time, queue = parts(found)
    assert acceptance == pytest.approx(0, abs=1e-3)
    assert step_time != pytest.approx(0, abs=1e-3)
    assert queue == pytest.approx(0, abs=2e-2)


def test_what_was_not_seen_is_named_and_stays_in_the_queue(tmp_path: Path) -> None:
    found = compared(tmp_path, condition(1, 3, costs=PRICES), tells_steps=False)
    split = found.split
    assert split is not None
    assert (split.step_time, split.together) == (None, "no steps were seen")
    assert split.acceptance is not None
    assert (1 + split.acceptance) * (1 + split.queue) == pytest.approx(1 + split.whole, rel=1e-12)


# --- what was counted


def test_drafts_that_the_engine_did_not_make_are_said_first(tmp_path: Path) -> None:
    engine = weaker(made_traces(sequences=16), 1.0, proposes=0.1)
    found = compared(tmp_path, condition(1, 3, costs=PRICES), engine=engine)
    by_name = {one.name: one for one in found.counts}
    drafts = by_name["drafts"]
    assert drafts.counted is not None
    assert drafts.predicted > 4 * drafts.counted > 0
    (line,) = disagreements([("made: run", found.counts)])
    assert line.startswith(f"drafts: {drafts.predicted:.0f} predicted, {drafts.counted:.0f} counted; ")
    assert line.endswith("(made: run)")


def test_counts_are_those_of_the_engine(tmp_path: Path) -> None:
    found = compared(tmp_path, condition(1, 3, costs=PRICES))
    run = MeasuredRun.read(tmp_path / "made" / "run")
    table = run.requests
    totals = {name: pc.sum(table[name]).as_py() for name in ("drafts", "drafted_tokens", "accepted_tokens")}
    by_name = {one.name: one for one in found.counts}
    assert {name: by_name[name].counted for name in totals} == totals
    rounds = run.steps.filter(pc.equal(run.steps["operation"], "decode")).num_rows  # one sequence a step
    emitted = pc.sum(table["output_tokens"]).as_py() - table.num_rows
    assert by_name["tokens_per_round"].counted == pytest.approx(emitted / rounds)
    assert by_name["tokens_per_round"].predicted == pytest.approx(emitted / rounds)


def test_positions_come_from_counters_then_from_arrivals(tmp_path: Path) -> None:
    traces = made_traces(sequences=8)
    traces.write(tmp_path / "traces")
    run = measure(tmp_path / "run", traces, condition(1, 3))
    counters = {
        "vllm:spec_decode_num_drafts_total": 100.0,
        **{
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{at}"}}': value
            for at, value in enumerate((60.0, 30.0, 10.0))
        },
    }
    told = MeasuredRun(run.manifest.model_copy(update={"counters": counters}), run.requests, run.steps, run.scenario)
    assert positions_by(told, {"drafts": 100.0}) == pytest.approx([0.6, 0.3, 0.1])
    drafts, accepted = (float(pc.sum(run.requests[name]).as_py()) for name in ("drafts", "accepted_tokens"))
    by_arrival = positions_by(run, {"drafts": drafts, "accepted_tokens": accepted})
    assert by_arrival is not None
    arrived = sum(tokens - 1 for row in run.requests["emitted"].to_pylist() for tokens in row[1:])
    assert sum(by_arrival) * drafts == pytest.approx(arrived)
    assert positions_by(run, {"drafts": drafts, "accepted_tokens": 2 * accepted}) is None  # arrivals are not rounds


def test_an_engine_that_counts_nothing(tmp_path: Path) -> None:
    traces = made_traces(sequences=8)
    traces.write(tmp_path / "traces")
    run = measure(tmp_path / "run", traces, condition(1, 3), tells_steps=False)
    table = run.requests
    for name in ("drafts", "drafted_tokens", "accepted_tokens", "emitted", "emission_s"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.nulls(table.num_rows, table.schema.field(name).type))
    blind = MeasuredRun(run.manifest, table, run.steps, run.scenario)
    assert tokens_per_round(blind) is None
    found = counts(blind, {"spec_decode_num_drafts": 107, "spec_decode_per_position_acceptance_rates": [0.5]})
    assert [one.counted for one in found] == [None] * 5
    assert found[0].told == "drafts: 107 predicted, not counted by the engine"
    assert found[3].label == "accepted at position 1"
    assert not any(one.material for one in found)


def test_counters_of_a_server_count_where_its_requests_do_not(tmp_path: Path) -> None:
    traces = made_traces(sequences=8)
    traces.write(tmp_path / "traces")
    run = measure(tmp_path / "run", traces, condition(1, 3), tells_steps=False, repeats=2)
    table = run.requests
    for name in ("drafts", "drafted_tokens", "accepted_tokens"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.nulls(table.num_rows, table.schema.field(name).type))
    told = {"drafts": 28.0, "draft_tokens": 84.0, "accepted_tokens": 40.0}
    counters = {f'vllm:spec_decode_num_{name}_total{{engine="0"}}': value for name, value in told.items()}
    seen = MeasuredRun(run.manifest.model_copy(update={"counters": counters}), table, run.steps, run.scenario)
    found = counts(seen, {"spec_decode_num_drafts": 107, "tokens_per_round": 1.5})
    by_name = {one.name: one.counted for one in found}
    assert [by_name[name] for name in ("drafts", "drafted_tokens", "accepted_tokens")] == [14, 42, 20]  # a repeat
    emitted = (pc.sum(table["output_tokens"]).as_py() - table.num_rows) / 2
    assert by_name["tokens_per_round"] == pytest.approx(emitted / (emitted - 20))
    assert disagreements([("s", found)])[0].startswith("drafts: 107 predicted, 14 counted")


def test_without_speculation_there_is_nothing_to_count(tmp_path: Path) -> None:
    found = compared(tmp_path, condition(2, costs=PRICES))
    assert found.counts == ()
    assert not found.speculates


@pytest.mark.parametrize(
    ("predicted", "counted", "of", "material"),
    [
        (107, 14, 1.0, True),
        (107, 100, 1.0, False),  # 7%
        (6, 4, 1.0, False),  # chance
        (30, 0, 1.0, True),
        (0, 0, 1.0, False),
        (0.5, 0.4, 900.0, True),  # of 900 drafts: 450 against 360
        (0.012, 0.008, 400.0, False),
        (1.5, 1.3, None, True),
        (1.5, 1.45, None, False),
        (107, None, 1.0, False),
    ],
)
def test_far_off_is_more_than_a_tenth_and_more_than_chance(
    predicted: float, counted: float | None, of: float | None, material: bool
) -> None:
    assert Count("drafts", predicted, counted, of).material is material


# --- files


def test_the_table_has_acceptance_first_and_parts_last(tmp_path: Path) -> None:
    found = compared(tmp_path, condition(1, 3, costs=PRICES))
    fidelity = validate(tmp_path, workers=1)
    rows = list(csv.DictReader(io.StringIO(to_csv(fidelity))))
    names = [row["quantity"] for row in rows]
    assert names[:3] == ["drafts", "drafted_tokens", "accepted_tokens"]
    assert names[-3:] == [f"split_{part}" for part in PARTS]
    assert float(rows[0]["measured"]) == found.counts[0].counted
    silent = replace(found, counts=(Count("drafts", 107.0, None),), split=Split(0.1, None, None, 0.1, "nothing seen"))
    rows = list(csv.DictReader(io.StringIO(to_csv(replace(fidelity, conditions=(silent,))))))
    assert (rows[0]["measured"], rows[0]["predicted"], rows[0]["error"]) == ("not counted by the engine", "107", "")
    assert [row["quantity"] for row in rows if row["quantity"].startswith("split_")] == ["split_queue"]
    assert read(write(fidelity, tmp_path / "out")) == fidelity
