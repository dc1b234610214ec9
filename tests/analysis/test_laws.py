"""The laws of size, training tokens, context and batch: made-up data with known answers, and the bundled traces."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from drawn import clustered, given_runs, sampled
from shared_data import shared_data

from analysis.common.records import from_json, to_json
from analysis.common.rounds import recording, replay_rounds
from analysis.fidelity.measured import bundled_runs
from analysis.laws import (
    LawFindings,
    batch_laws,
    context_law,
    engine_batch_law,
    find_laws,
    measured_batch_law,
    size_law,
    training_law,
)
from analysis.laws.batch import expected_accepted
from analysis.laws.size import family
from calibration.common.errors import ReportError
from calibration.traces import bundled, bundled_path

FAMILY = "smollm2-135m-cpu-distilled"


def test_the_family_leaves_specialists_out_and_goes_by_size() -> None:
    names = [d.name for d in family(bundled(FAMILY))]
    assert names == ["size-0.7", "size-1.6", "size-3.3", "size-6.7", "size-10", "size-20"]


def test_the_points_of_the_size_law_are_replayed_rounds() -> None:
    traces = bundled(FAMILY)
    law = size_law(traces, 4)
    for point, drafter in zip(law.drawn.points, family(traces), strict=True):
        rounds = replay_rounds(recording(traces, drafter.name), 4)
        assert point.x == drafter.parameters_non_embedding
        assert point.y.value == pytest.approx(rounds.accepted.sum() / rounds.rounds.sum(), rel=1e-5)
        assert point.y.requests == 72
    assert law.comparison.groups == 6
    assert law.comparison.interpolation.points == 6 * 4
    assert law.comparison.extrapolation.points == 6 * 2
    slope = law.drawn.fit("log-linear")
    assert slope is not None
    assert slope.intervals == "bootstrap over requests"
    assert slope.parameters["b"].low is not None
    assert slope.parameters["b"].low > 0


def test_a_size_law_needs_three_sizes() -> None:
    with pytest.raises(ReportError, match="needs 3 drafters of one paradigm that differ in size, got"):
        size_law(given_runs([[1, 0, 0]] * 6), 2)


def curves_csv(folder: Path, students: dict[str, tuple[float, float]], tokens: list[int]) -> Path:
    """Learning curves 1 + a + b ln(tokens / 10,000), exactly."""
    rows = [
        f"{name},{t},1.0,2.0,0.1,0.1,{1 + (0 if t == 0 else a + b * np.log(t / 10_000))},500"
        for name, (a, b) in students.items()
        for t in tokens
    ]
    path = folder / "curves.csv"
    path.write_text("\n".join(["student,tokens,seconds,loss,match,overlap,tokens_per_round,held_out_tokens", *rows]))
    return path


def test_learning_curves_leave_the_bonus_token_out_and_find_their_form(tmp_path: Path) -> None:
    students = {f"s{i}": (0.2 + 0.1 * i, 0.1 + 0.02 * i) for i in range(5)}
    law = training_law(curves_csv(tmp_path, students, [0, 10_000, 20_000, 40_000, 80_000, 160_000]))
    assert law.drawn.name == "s4"
    assert law.drawn.points[0].y.value == pytest.approx(0.6)
    fitted = law.drawn.fit("log-linear")
    assert fitted is not None
    assert float(fitted.predict(10_000)) == pytest.approx(0.6)
    assert fitted.parameters["b"].value == pytest.approx(0.18)
    assert law.comparison.extrapolation.best in ("log-linear", "saturating")
    assert law.published("extrapolation") in ("best", "not told apart")
    assert {"power", "constant"}.isdisjoint(law.comparison.extrapolation.alike)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student,tokens\na,1", "got no tokens_per_round"),
        ("student,tokens,tokens_per_round,held_out_tokens\na,x,1,1", "line 2: tokens must be a number, got 'x'"),
        ("student,tokens,tokens_per_round,held_out_tokens\na,0,1,1", "at least one row must have tokens > 0"),
    ],
)
def test_learning_curves_at_fault_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "curves.csv"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        training_law(path)


def test_accepted_tokens_of_a_draft_from_each_position() -> None:
    greedy = recording(given_runs([[3, 2, 1, 0, 1]]), "drafter")
    assert expected_accepted(greedy, 2)[:5, 0].tolist() == [2, 2, 1, 0, 1]
    chances = recording(sampled([[0.5, 0.25, 1.0, 0.0]]), "drafter")
    # 0.5 + 0.5 * 0.25 + 0.5 * 0.25 * 1 = 0.75 from the first position.
    assert expected_accepted(chances, 3)[:4, 0].tolist() == pytest.approx([0.75, 0.5, 1.0, 0.0])


def test_acceptance_that_grows_with_position_is_found() -> None:
    rng = np.random.default_rng(2)
    runs = []
    for _ in range(40):
        chance = 0.2 + 0.1 * np.log2(np.maximum(np.arange(128), 1))
        hit = rng.random(128) < chance
        runs.append([int(h) for h in hit])
    law = context_law(given_runs(runs, cap=1, domains=["a"] * 40), 1)
    assert [round(p.x, 1) for p in law.drawn.points] == [1.0, 2.5, 5.5, 11.5, 23.5, 47.5, 95.5]
    fitted = law.drawn.fit("log-linear")
    assert fitted is not None
    slope = fitted.parameters["b"]
    assert slope.low is not None
    assert slope.high is not None
    assert slope.low < 0.1 / np.log(2) < slope.high
    # Five inner bins are too few to rule the constant out by their errors; it errs by far the most all the same.
    errors = {one.form: one.rmse for one in law.comparison.interpolation.errors}
    assert errors["constant"] == max(errors.values()) > 3 * min(errors.values())


def test_speed_against_batch_on_made_up_costs() -> None:
    """A verify step of 10 ms + 1 ms a token: without speculation a request gets 1 / (10 + B) tokens a millisecond."""
    traces = clustered(np.random.default_rng(3))
    speed, gain = batch_laws(traces, 2, batches=(1, 2, 3, 4, 6))
    plain = next(c for c in speed.curves if c.name == "no speculation")
    for point in plain.points[:3]:
        # Prefill (20 ms a request) and the last, thinner batches take their share.
        assert point.y.value == pytest.approx(1000 / (10 + point.x), rel=0.15)
    by_name = {c.name: c.points for c in gain.curves}
    assert by_name["lookup"][0].y.value > 1 > by_name["slow"][0].y.value  # type: ignore[operator]
    assert gain.kind == "simulated"


def test_a_table_of_measured_speeds(tmp_path: Path) -> None:
    rows = [f"m,gsm8k,{b},{100 * b / (1 + 0.2 * np.log(b))}" for b in (1, 2, 4, 8, 16, 32)]
    path = tmp_path / "speeds.csv"
    path.write_text("\n".join(["model,task,batch,tps", *rows, "n,gsm8k,8,50"]))
    law = measured_batch_law(path, batch="batch", speed="tps", groups=("model", "task"))
    assert [c.name for c in law.curves] == ["m gsm8k"]
    assert law.drawn.points[0].y.value == 100
    with pytest.raises(ReportError, match="got no power"):
        measured_batch_law(path, batch="batch", speed="power", groups=("model",))


def test_public_measurements_of_speculation_have_one_batch_size_each() -> None:
    path = shared_data("specforge-specbundle", "specbundle_tidy.dev.csv")
    with pytest.raises(ReportError, match="measured at three batch sizes, got 1 at most"):
        measured_batch_law(path)


def test_public_measurements_of_serving_follow_the_log_linear_law() -> None:
    """vLLM on H100 without speculation: the form of Scylla's third law beats a power by far on left-out batches."""
    path = shared_data("ml-energy", "llm_energy_configs.dev.csv")
    groups = ("model", "task", "gpu_model", "num_gpus", "par_tensor_parallel", "precision")
    law = measured_batch_law(path, batch="max_num_seqs", speed="output_throughput_tokens_per_sec", groups=groups)
    assert law.comparison.groups == 6
    assert law.published("interpolation") == "best"
    assert law.comparison.interpolation.error("log-linear").relative == pytest.approx(0.058, abs=0.003)
    assert "power" not in law.comparison.interpolation.alike
    assert law.published("extrapolation") in ("best", "not told apart")


def test_measured_runs_of_engines_give_a_law() -> None:
    """Runs that a second source only predicts otherwise count once; a request slows down as clients join."""
    law = engine_batch_law(bundled_runs())
    names = [c.name for c in law.curves]
    assert "openvino plain" in names
    assert not any(name.startswith("openvino-plain") for name in names)
    assert law.kind == "measured"
    for curve in law.curves:
        speeds = [p.y.value or 0.0 for p in curve.points]
        assert speeds[-1] < 0.7 * speeds[0]
    assert "constant" not in law.comparison.interpolation.alike


def test_a_trace_that_was_not_timed_has_no_batch_law() -> None:
    runs = [[1, 0] * 20 for _ in range(12)]
    found = find_laws(traces=given_runs(runs, domains=["a", "b"] * 6), draft_tokens=2)
    assert [law.key for law in found.laws] == ["position", "context"]
    assert any(text.startswith("batch size: ") and "cost" in text for text in found.absent), found.absent


def test_laws_without_data_are_named() -> None:
    found = find_laws(traces=clustered(np.random.default_rng(1)), batches=(1, 2, 3), draft_tokens=2)
    assert {law.key for law in found.laws} >= {"position", "batch-speed", "batch-speedup"}
    assert found.law("batch-speed").published("interpolation") == "too few levels"
    assert any(text.startswith("size: no data") for text in found.absent)
    with pytest.raises(ReportError, match="no law 'size'"):
        found.law("size")


def test_the_bundled_family_end_to_end() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_laws(family=bundled(FAMILY), curves=bundled_path(FAMILY) / "recipe" / "curves.csv")
    assert [law.key for law in found.laws] == ["size", "size-with-embedding", "training-tokens"]
    assert found.law("training-tokens").comparison.groups == 10
    for law in found.laws:
        assert "constant" not in law.comparison.interpolation.alike
    assert from_json(LawFindings, to_json(found), "laws") == found
