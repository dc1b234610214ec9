"""Validation: made engines, measured and predicted; what is summed up, compared, refused, written and read."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from measured_made import LOOKUP, STUDENT, Sequences, condition, made_traces, measure

from analysis.fidelity.measured import find_conditions, summaries, text_note
from analysis.fidelity.table import QUANTITIES, Fidelity, errors_of
from analysis.fidelity.validate import read, to_csv, validate, write
from calibration.common.errors import ScenarioError, TraceError
from calibration.measured import MeasuredRun
from calibration.traces import TraceSet
from simulator import simulate
from simulator.scenario.loading import load_scenario

LINEAR = {"kind": "linear", "base_s": 0.01, "per_token_s": 0.002, "per_context_token_s": 0.00003}
BATCHES = (1, 4, 8, 16)


def linear_law(decoding: Sequences, prompts: Sequences) -> float:
    """The engine that `LINEAR` prices exactly, mixed steps included.

    The simulator counts the last token of a sequence as cached, one more than an engine's cache holds.
    """
    tokens, cached = (sum(one[i] for one in decoding + prompts) for i in (0, 1))
    return 0.01 + 0.002 * tokens + 0.00003 * (cached + len(decoding))


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    return made_traces()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, traces: TraceSet) -> Path:
    """One source: plain runs to fit on, lookup and other batches held out, noise and three repeats."""
    folder = tmp_path_factory.mktemp("validation")
    source = folder / "made-cpu"
    traces.write(source / "traces")
    costs = {"verifier": {"kind": "observed", "runs": [f"../plain-{batch}" for batch in BATCHES]}}
    how: dict[str, Any] = {"repeats": 3, "noise": 0.02}
    for batch in BATCHES:
        measure(source / f"plain-{batch}", traces, condition(batch, costs=costs), role="fit", **how)
        measure(source / f"lookup-4-{batch}", traces, condition(batch, 4, costs=costs), **how)
    measure(source / "plain-6", traces, condition(6, costs=costs), **how)
    measure(source / "arriving", traces, condition(8, 3, rate_rps=6.0, costs=costs), **how)
    chat = condition(3, 3, costs=costs)
    measure(source / "chat", traces, chat | {"traces": {"path": "../traces", "domains": ["chat"]}}, **how)
    return folder


@pytest.fixture(scope="module")
def fidelity(root: Path) -> Fidelity:
    return validate(root, workers=1)


# --- summaries of what was measured


@pytest.mark.parametrize("measure_table", [None, {"warmup_requests": 5}, {"warmup_s": 1.0}])
@pytest.mark.parametrize("rate_rps", [None, 3.0])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("drafted", [0, 3])
def test_a_measured_summary_means_what_a_simulated_one_means(
    tmp_path: Path,
    traces: TraceSet,
    measure_table: dict[str, Any] | None,
    rate_rps: float | None,
    chunked: bool,
    drafted: int,
) -> None:
    """An engine that takes exactly the stated seconds has the summary that the simulator gives, key by key."""
    traces.write(tmp_path / "traces")
    data = condition(4, drafted, rate_rps=rate_rps, costs={"verifier": LINEAR, "drafter": LINEAR | {"base_s": 0.0}})
    data["costs"]["drafter"] |= {"per_token_s": 0.0, "per_context_token_s": 0.0}
    data |= {} if measure_table is None else {"measure": measure_table}
    if chunked:
        data["engine"] |= {"enable_chunked_prefill": True, "max_num_batched_tokens": 4096}
    run = measure(tmp_path / "run", traces, data, law=linear_law)
    scenario = load_scenario(tmp_path / "run" / "scenario.toml")
    (measured,) = summaries(run, scenario)
    simulated = simulate(scenario).summary
    expected = {"output_throughput", "p99_tpot_ms", "mean_ttft_ms", "p95_itl_ms", "std_e2el_ms", "request_throughput"}
    assert expected < set(measured)
    for key, value in measured.items():
        same = value == simulated[key] if isinstance(value, str) else value == pytest.approx(simulated[key], rel=1e-9)
        assert same, key
    if drafted:
        assert measured["spec_decode_acceptance_length"] > 1.2


def test_what_was_not_seen_is_absent(tmp_path: Path, traces: TraceSet) -> None:
    traces.write(tmp_path / "traces")
    run = measure(tmp_path / "run", traces, condition(2, 3), tells_steps=False)
    unseen = run.requests
    for name in ("emission_s", "emitted", "drafts", "drafted_tokens", "accepted_tokens"):
        place = unseen.schema.get_field_index(name)
        unseen = unseen.set_column(place, name, pa.nulls(unseen.num_rows, unseen.schema.field(name).type))
    blind = MeasuredRun(run.manifest, unseen, run.steps, run.scenario)
    (summary,) = summaries(blind, load_scenario(tmp_path / "run" / "scenario.toml"))
    assert not [key for key in summary if "itl" in key or "spec_decode" in key or key.startswith("engine_")]
    assert summary["output_throughput"] > 0


def test_drifted_text_is_counted(traces: TraceSet, tmp_path: Path) -> None:
    traces.write(tmp_path / "traces")
    run = measure(tmp_path / "run", traces, condition(2))
    assert text_note(run, traces) == "text as recorded in 24 of 24 requests"
    texts = run.requests["output_token_ids"].to_pylist()
    texts[3][-1] += 1
    texts[5] = None
    place = run.requests.schema.get_field_index("output_token_ids")
    kind = run.requests.schema.field("output_token_ids").type
    drifted = run.requests.set_column(place, "output_token_ids", pa.array(texts, type=kind))
    assert text_note(MeasuredRun(run.manifest, drifted, run.steps, run.scenario), traces) == (
        "text as recorded in 22 of 23 requests"
    )


# --- the comparison


def test_held_out_conditions_are_predicted(fidelity: Fidelity) -> None:
    assert len(fidelity.held_out()) == 7
    throughput, accepted = (
        errors_of(name, fidelity.held_out()) for name in ("output_throughput", "spec_decode_acceptance_length")
    )
    assert throughput is not None
    assert accepted is not None
    assert throughput.worst < 0.05
    assert throughput.median < 0.03
    assert accepted.worst < 1e-9  # the same text: every draft is accepted as it was recorded
    assert accepted.conditions == 6
    assert throughput.spread is not None
    assert 0 < throughput.spread < 0.02


def test_one_condition_by_hand(root: Path, fidelity: Fidelity) -> None:
    (found,) = [c for c in fidelity.conditions if c.name == "arriving"]
    run = MeasuredRun.read(root / "made-cpu" / "arriving")
    rows = run.requests.to_pandas()
    by_repeat = []
    for _, mine in rows.groupby("repeat"):
        took = mine["finish_s"].max() - mine["arrival_s"].min()
        tpot = (mine["finish_s"] - mine["first_token_s"]) / (mine["output_tokens"] - 1)
        by_repeat.append((mine["output_tokens"].sum() / took, np.percentile(1000 * tpot, 99)))
    for name, values in zip(("output_throughput", "p99_tpot_ms"), zip(*by_repeat, strict=True), strict=True):
        one = found.of(name)
        assert one is not None
        assert one.measured == pytest.approx(np.mean(values))
        assert one.spread == pytest.approx((max(values) - min(values)) / 2 / np.mean(values))
        assert one.error == pytest.approx(one.predicted / np.mean(values) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = simulate(load_scenario(root / "made-cpu" / "arriving" / "scenario.toml")).summary
    assert {one.name: one.predicted for one in found.compared} == {
        one.name: summary[one.name] for one in found.compared
    }
    assert (found.role, found.repeats, found.open_loop) == ("held-out", 3, True)
    assert found.labels == {
        "drafter": LOOKUP,
        "policy": "fixed",
        "draft_tokens": "3",
        "batch": "8",
        "arrivals": "poisson",
        "rate_rps": "6",
    }
    assert found.notes[0] == "text as recorded in 72 of 72 requests"
    assert any("iterations priced outside of the range of the fit" in note for note in found.notes)


def test_labels_and_notes_of_others(fidelity: Fidelity) -> None:
    named = {c.name: c for c in fidelity.conditions}
    assert list(named)[-4:] == ["plain-4", "plain-6", "plain-8", "plain-16"]
    assert named["chat"].labels["domain"] == "chat"
    assert named["plain-6"].labels | {"drafter": "none", "draft_tokens": "0", "concurrency": "6"} == (
        named["plain-6"].labels
    )
    assert not named["plain-6"].open_loop
    own = {name for name, c in named.items() if any(note.startswith("in-sample") for note in c.notes)}
    assert own == {f"plain-{batch}" for batch in BATCHES}


def test_crossover_is_where_the_ratio_falls_below_one(root: Path, fidelity: Fidelity) -> None:
    (one,) = fidelity.crossovers
    assert (one.source, one.drafter, one.draft_tokens, one.grid) == ("made-cpu", LOOKUP, "4", BATCHES)
    named = {c.name: c for c in fidelity.conditions}
    for which, speedups, at in (
        ("measured", one.measured_speedups, one.measured),
        ("predicted", one.predicted_speedups, one.predicted),
    ):
        ratios = []
        for batch in BATCHES:
            drafting, plain = (named[f"{n}-{batch}"].of("output_throughput") for n in ("lookup-4", "plain"))
            ratios.append(getattr(drafting, which) / getattr(plain, which))
        assert speedups == pytest.approx(ratios)
        assert at == next((b for b, ratio in zip(BATCHES, ratios, strict=True) if ratio <= 1), None)
    # The law is memory bound at small batches and compute bound at large ones.
    assert one.measured_speedups[0] > 1 > one.measured_speedups[-1]
    assert one.steps_apart <= 1
    assert not one.fitted


def test_a_source_tells_of_itself(root: Path, fidelity: Fidelity, tmp_path: Path, traces: TraceSet) -> None:
    (source,) = fidelity.sources
    assert (source.name, source.title, source.clock) == ("made-cpu", "made for a test", "thread-cpu")
    assert source.fitted_on == "plain-1, plain-4, plain-8, plain-16"
    assert fidelity.created == "2026-01-01T00:00:00+00:00"
    traces.write(tmp_path / "a" / "traces")
    measure(tmp_path / "a" / "plain", traces, condition(1, costs={"verifier": LINEAR}))
    file = tmp_path / "a" / "source.toml"
    file.write_text('title = "Engine A"\nexplained = ["noise"]\nfitted_on = "a table"\n', encoding="utf-8")
    (told,) = validate(tmp_path, workers=1).sources
    assert (told.title, told.explained, told.fitted_on, told.citation) == ("Engine A", ("noise",), "a table", None)
    assert validate(tmp_path / "a", workers=1).sources[0].name == "a"
    file.write_text('titel = "Engine A"\n', encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"source.toml: titel: no such key; did you mean 'title'"):
        validate(tmp_path, workers=1)
    file.rename(tmp_path / "source.toml")
    with pytest.raises(ScenarioError, match=r"source.toml: no measured run lies beside it"):
        validate(tmp_path, workers=1)


def test_workers_change_nothing_and_progress_is_heard(tmp_path: Path, traces: TraceSet) -> None:
    traces.write(tmp_path / "a" / "traces")
    for batch in (1, 2):
        measure(tmp_path / "a" / f"plain-{batch}", traces, condition(batch, costs={"verifier": LINEAR}))
    heard: list[tuple[int, int]] = []
    alone = validate(tmp_path, workers=1, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]
    assert validate(tmp_path, workers=2) == alone


# --- what is refused


def test_a_leak_is_refused_with_both_names(root: Path, tmp_path: Path, traces: TraceSet) -> None:
    traces.write(tmp_path / "s" / "traces")
    measure(tmp_path / "s" / "plain-1", traces, condition(1), role="fit")
    measure(tmp_path / "s" / "plain-2", traces, condition(2))
    costs = {
        "verifier": {"kind": "observed", "runs": ["../plain-1"]},
        "drafter": {"kind": "observed", "runs": ["../plain-1", "../plain-2"]},
    }
    measure(tmp_path / "s" / "lookup", traces, condition(2, 2, costs=costs))
    rule = r"lookup/scenario.toml: costs.drafter.runs: a held-out condition must be priced from runs of role 'fit', "
    with pytest.raises(ScenarioError, match=rule + r"got '.*lookup/../plain-2' of role 'held-out'") as caught:
        validate(tmp_path, workers=1)
    assert str(caught.value).count("\n") == 0
    own = {"verifier": {"kind": "observed", "runs": ["../lookup"]}}
    measure(tmp_path / "s" / "lookup", traces, condition(2, 2, costs=own))
    with pytest.raises(ScenarioError, match=r"got '.*lookup/../lookup' of role 'held-out'"):
        validate(tmp_path, workers=1)
    # Also where the held-out run lies outside of the folder.
    far = {"verifier": {"kind": "observed", "runs": [str(root / "made-cpu" / "plain-6")]}}
    measure(tmp_path / "s" / "lookup", traces, condition(2, 2, costs=far))
    with pytest.raises(ScenarioError, match=r"got '.*plain-6' of role 'held-out'"):
        validate(tmp_path, workers=1)


def test_broken_folders_are_told_by_name(tmp_path: Path, traces: TraceSet) -> None:
    with pytest.raises(TraceError, match=r"no measured run below it \(a folder with measured.json\)"):
        validate(tmp_path, workers=1)
    traces.write(tmp_path / "s" / "traces")
    run = measure(tmp_path / "s" / "plain", traces, condition(1, costs={"verifier": LINEAR}))
    with pytest.raises(TraceError, match="plain: is a measured run itself; give the folder above"):
        validate(tmp_path / "s" / "plain", workers=1)
    (tmp_path / "s" / "plain" / "requests.parquet").write_bytes(b"PAR1")
    with pytest.raises(TraceError, match=r"plain/requests.parquet: not a readable Parquet file"):
        validate(tmp_path, workers=1)
    run.write(tmp_path / "s" / "plain")
    (tmp_path / "s" / "plain" / "scenario.toml").write_text("[workload]\nkind = 'closd'\n", encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"plain/scenario.toml: workload.kind: no such kind, got 'closd'"):
        validate(tmp_path, workers=1)


def test_what_cannot_be_predicted_or_summed_up_names_its_folder(tmp_path: Path, traces: TraceSet) -> None:
    traces.write(tmp_path / "s" / "traces")
    run = measure(tmp_path / "s" / "plain", traces, condition(1))
    with pytest.raises(ScenarioError, match=r"s/plain: cannot be predicted: timings.parquet: no prefill step"):
        validate(tmp_path, workers=1)
    cut = condition(1, costs={"verifier": LINEAR}, measure={"warmup_requests": 24})
    measure(tmp_path / "s" / "plain", traces, cut)
    with pytest.raises(ScenarioError, match=r"s/plain: .*warmup_requests: must leave some of the 24"):
        validate(tmp_path, workers=1)
    place = run.requests.schema.get_field_index("counted")
    fillers = run.requests.set_column(place, "counted", pa.array([False] * run.requests.num_rows))
    MeasuredRun(run.manifest, fillers, run.steps, run.scenario).write(tmp_path / "s" / "plain")
    (found,) = find_conditions(tmp_path)
    with pytest.raises(TraceError, match="repeat 0 of 1: no counted request"):
        summaries(found.run, found.scenario)


def test_a_changed_scenario_is_noted(tmp_path: Path, traces: TraceSet) -> None:
    traces.write(tmp_path / "s" / "traces")
    measure(tmp_path / "s" / "plain", traces, condition(1, costs={"verifier": LINEAR}))
    assert not any("changed" in note for note in validate(tmp_path, workers=1).conditions[0].notes)
    file = tmp_path / "s" / "plain" / "scenario.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("0.002", "0.003"), encoding="utf-8")
    assert "the scenario beside it was changed after the measurement" in (
        validate(tmp_path, workers=1).conditions[0].notes
    )


def test_two_drafters_and_no_baseline(tmp_path: Path, traces: TraceSet) -> None:
    """A crossover needs its baseline: the same scenario without drafts, at two batches or more."""
    traces.write(tmp_path / "s" / "traces")
    prices = {"verifier": LINEAR, "drafter": LINEAR}
    for batch in (1, 2):
        measure(tmp_path / "s" / f"a-{batch}", traces, condition(batch, costs=prices), role="fit")
        measure(tmp_path / "s" / f"b-{batch}", traces, condition(batch, 2, STUDENT, costs=prices), role="fit")
        measure(tmp_path / "s" / f"c-{batch}", traces, condition(batch, 2, costs=prices, slo={"ttft_ms": 1.0}))
    measure(tmp_path / "s" / "d-1", traces, condition(1, 3, costs=prices))
    (found,) = validate(tmp_path, workers=1).crossovers
    assert (found.drafter, found.draft_tokens, found.grid, found.fitted) == (STUDENT, "2", (1, 2), True)


# --- files


def test_written_and_read_again(fidelity: Fidelity, tmp_path: Path) -> None:
    write(fidelity, tmp_path / "out")
    assert read(tmp_path / "out") == fidelity
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "conditions.csv").read_text(encoding="utf-8"))))
    rows = [row for row in rows if row["quantity"] in QUANTITIES]
    assert len(rows) == sum(len(c.compared) for c in fidelity.conditions)
    (row,) = [r for r in rows if r["condition"] == "arriving" and r["quantity"] == "output_throughput"]
    found = next(c for c in fidelity.conditions if c.name == "arriving").of("output_throughput")
    assert found is not None
    assert float(row["error"]) == pytest.approx(found.error, rel=1e-4)
    assert (row["role"], row["open_loop"], row["unit"], row["rate_rps"]) == ("held-out", "true", "tokens/s", "6")
    assert row["concurrency"] == ""
    assert to_csv(read(tmp_path / "out")) == to_csv(fidelity)
    with pytest.raises(TraceError, match="not found; paceline validate writes it"):
        read(tmp_path)
    (tmp_path / "out" / "fidelity.json").write_text("{", encoding="utf-8")
    with pytest.raises(TraceError, match=r"fidelity.json: not readable, truncated or damaged"):
        read(tmp_path / "out")
