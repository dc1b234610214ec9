"""Costs fitted to an engine's own steps: do they price steps that it has not taken yet?"""

from __future__ import annotations

import itertools
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_made import LOOKUP, STUDENT, Sequences, condition, engine_law, made_traces, measure, student_law
from scenarios import LINEAR

from calibration.common.errors import CostError, ExtrapolationWarning, ScenarioError
from calibration.measured import MeasuredRun
from calibration.traces import TraceSet
from simulator import RunResult, Scenario, simulate
from simulator.experiments.sweep import SweepResult, sweep
from simulator.pricing.observed import ObservedPrefill, ObservedStep, fit_observed
from simulator.pricing.steps import read_steps
from simulator.scenario.loading import load_scenario, parse_scenario
from simulator.scenario.scenario import Observed

HEAD = 3 / 11
"""FLOPs of the LM head over those of the layers in `engine_law`."""
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 4096}
BATCHES = (1, 2, 4, 8, 16)


def runs(
    root: Path, traces: TraceSet, batches: tuple[int, ...] = BATCHES, name: str = "plain", **how: Any
) -> list[str]:
    """Measure plain runs below `root`; give how a scenario in a folder beside them calls them."""
    engine = how.pop("settings", {})
    for batch in batches:
        data = condition(batch, how.pop("draft_tokens", 0), how.pop("drafter", LOOKUP))
        data["engine"] |= engine
        measure(root / f"{name}-{batch}", traces, data, role="fit", **how)
    return [f"../{name}-{batch}" for batch in batches]


@pytest.fixture(scope="module")
def traces() -> TraceSet:
    return made_traces()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, traces: TraceSet) -> Path:
    """Plain runs of an engine without noise, prefill first ("plain") and mixed ("mixed")."""
    folder = tmp_path_factory.mktemp("measured")
    traces.write(folder / "traces")
    runs(folder, traces)
    runs(folder, traces, name="mixed", settings=CHUNKED)
    return folder


def fit(root: Path, *names: str, head: float = HEAD) -> tuple[ObservedPrefill, ObservedStep]:
    return fit_observed(read_steps([root / name for name in names], "here"), "verifier", head)


def plain(name: str = "plain", batches: tuple[int, ...] = BATCHES) -> list[str]:
    return [f"{name}-{batch}" for batch in batches]


def error(price: ObservedStep, batch: int, new: int, context: int) -> float:
    """Relative error of a step of `batch` sequences with `new` new and `context` cached tokens each."""
    truth = engine_law([(new, context)] * batch, [])
    return float(price.step_seconds(batch, batch * new, batch * context)) / truth - 1


# --- verify steps from plain runs


@pytest.mark.parametrize(("batch", "new"), [(1, 3), (1, 5), (2, 3), (2, 7), (3, 5), (4, 4), (5, 1), (12, 1)])
def test_plain_runs_price_drafts_within_the_measured_number_of_tokens(root: Path, batch: int, new: int) -> None:
    _, verify = fit(root, *plain())
    assert abs(error(verify, batch, new, 100)) < 0.04
    assert not verify.outside(batch, batch * new, 100 * batch)


@pytest.mark.parametrize(("batch", "new"), [(8, 3), (8, 5), (16, 3), (16, 5), (16, 9)])
def test_beyond_it_prefill_shows_how_steps_go_on(root: Path, batch: int, new: int) -> None:
    _, verify = fit(root, *plain())
    assert abs(error(verify, batch, new, 100)) < 0.05
    assert verify.outside(batch, batch * new, 100 * batch)
    # Without the LM head of the drafted tokens, such a step would be too cheap by about its share.
    _, headless = fit(root, *plain(), head=0.0)
    assert error(headless, batch, new, 100) < error(verify, batch, new, 100) - 0.03


def test_a_single_batch_leaves_prefill_to_price_more_tokens(root: Path) -> None:
    _, verify = fit(root, "plain-1")
    assert abs(error(verify, 1, 1, 100)) < 0.01
    assert abs(error(verify, 1, 5, 100)) < 0.07
    assert verify.outside(1, 5, 100)


def test_speculative_runs_in_the_fit_decide_what_plain_ones_cannot(root: Path, traces: TraceSet) -> None:
    """The law reads cached tokens more slowly for longer drafts and takes host time for every sequence."""
    names = []
    for batch, drafted in ((1, 6), (4, 6), (8, 3)):
        names.append(f"drafting-{batch}")
        measure(root / names[-1], traces, condition(batch, drafted, STUDENT), role="fit")
    _, before = fit(root, *plain())
    _, after = fit(root, *plain(), *names)
    unseen = [(1, 4), (2, 5), (4, 4), (6, 6), (8, 3)]
    errors = [[abs(error(price, b, n, 100)) for b, n in unseen] for price in (before, after)]
    assert max(errors[0]) < 0.05
    assert sum(errors[1]) < 0.7 * sum(errors[0])
    assert any("no step had several tokens" in text for text in before.assumed)
    assert after.assumed == ()


@settings(max_examples=60)
@given(st.integers(1, 20), st.integers(0, 200), st.integers(0, 4000), st.integers(1, 40))
def test_a_step_never_gets_cheaper_by_more_work(root: Path, batch: int, more: int, cached: int, extra: int) -> None:
    _, verify = fit(root, *plain())
    seconds = verify.step_seconds(batch, batch + more, cached)
    assert 0 < seconds <= verify.step_seconds(batch, batch + more + extra, cached)
    assert seconds <= verify.step_seconds(batch, batch + more, cached + extra)
    assert seconds <= verify.step_seconds(batch + 1, batch + 1 + more, cached)


# --- prefill and mixed steps


@pytest.mark.parametrize("name", ["plain", "mixed"])
@pytest.mark.parametrize("tokens", [20, 45, 90, 150])
def test_prompts(root: Path, name: str, tokens: int) -> None:
    prefill, _ = fit(root, *plain(name))
    assert prefill.step_seconds(1, tokens, 0) == pytest.approx(engine_law([], [(tokens, 0)]), rel=0.02)


def joint(prices: tuple[ObservedPrefill, ObservedStep], batch: int, new: int, tokens: int) -> float:
    prefill, verify = prices
    decoding = verify.step_seconds(batch, batch * new, batch * 100)
    return float(decoding) + prefill.added_seconds(1, tokens, 0, batch * new)


@pytest.mark.parametrize("name", ["plain", "mixed"])
@pytest.mark.parametrize(("batch", "new", "tokens"), [(2, 1, 60), (7, 1, 100), (3, 5, 30), (8, 5, 120)])
def test_a_mixed_step_is_one_pass(root: Path, name: str, batch: int, new: int, tokens: int) -> None:
    """Assumed where no mixed step was seen ("plain"); fitted, and the same, where the engine is such a one."""
    prices = fit(root, *plain(name))
    assert joint(prices, batch, new, tokens) == pytest.approx(
        engine_law([(new, 100)] * batch, [(tokens, 0)]), rel=0.035
    )
    assert any("one pass" in text for text in prices[0].assumed) == (name == "plain")


def test_an_engine_that_takes_two_passes_is_found_out(tmp_path: Path, traces: TraceSet) -> None:
    def two_passes(decoding: Sequences, prompts: Sequences) -> float:
        parts = [(decoding, []), ([], prompts)]
        return sum(engine_law(*part) for part in parts if any(part))

    traces.write(tmp_path / "traces")
    runs(tmp_path, traces, settings=CHUNKED, law=two_passes)
    prices = fit(tmp_path, *plain())
    fixed = two_passes([], [(1, 0)])
    assert prices[0].beside_s == pytest.approx(fixed, rel=0.3)
    truth = two_passes([(1, 100)] * 7, [(100, 0)])
    assert joint(prices, 7, 1, 100) == pytest.approx(truth, rel=0.03)
    assert joint(prices, 7, 1, 100) - prices[0].beside_s < 0.9 * truth
    told = prices[0].describe()["mixed"]
    assert told["beside_s"] == prices[0].beside_s
    assert told["mean_error"] < 0.03


# --- what an engine takes for itself


def test_what_a_sequence_costs_shows_beside_prompts_of_as_many_tokens(tmp_path: Path, traces: TraceSet) -> None:
    """Where sequences are dear, f would fall from batches to prompts; a draft is of one sequence."""

    def dear(decoding: Sequences, prompts: Sequences) -> float:
        return engine_law(decoding, prompts) + 0.004 * len(decoding + prompts)

    traces.write(tmp_path / "traces")
    runs(tmp_path, traces, law=dear)
    _, verify = fit(tmp_path, *plain())
    truth = dear([(9, 100)], [])
    assert verify.step_seconds(1, 9, 100) == pytest.approx(truth, rel=0.06)
    assert dear([(1, 100)] * 9, []) > 1.4 * truth  # what it would cost as nine sequences


class Preparing:
    """A law whose steps take longer where the step before computed another number of tokens."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tokens = seconds, 0

    def __call__(self, decoding: Sequences, prompts: Sequences) -> float:
        tokens = sum(new for new, _ in decoding + prompts)
        changed, self.tokens = tokens != self.tokens, tokens
        return engine_law(decoding, prompts) + self.seconds * changed


@pytest.mark.parametrize("chunked", [False, True])
def test_another_number_of_tokens_costs_anew(tmp_path: Path, traces: TraceSet, chunked: bool) -> None:
    """Batches of a lookup change from step to step, those of plain runs hardly ever."""
    traces.write(tmp_path / "traces")
    runs(tmp_path, traces, law=Preparing(0.02), settings=CHUNKED if chunked else {})
    _, verify = fit(tmp_path, *plain())
    assert verify.change_s == pytest.approx(0.02, rel=0.1)
    assert verify.describe()["change_s"] == verify.change_s
    data = condition(4, 4, costs=observed(plain()))
    data["engine"] |= CHUNKED if chunked else {}
    errors = predicted(tmp_path, "held-out", traces, data, law=Preparing(0.02))
    assert abs(errors["output_throughput"]) < 0.03
    assert abs(errors["mean_ttft_ms"]) < 0.06
    rows = quietly(load_scenario(tmp_path / "held-out" / "scenario.toml")).iterations.to_pylist()
    tokens = [row["prefill_tokens"] + row["active"] + row["drafted_tokens"] for row in rows]
    assert sum(x != y for x, y in itertools.pairwise(tokens)) > 0.5 * len(rows)


# --- noise


def test_one_outlier_decides_nothing_and_many_are_paid_for(tmp_path: Path, traces: TraceSet) -> None:
    traces.write(tmp_path / "traces")
    names = plain(batches=(1, 2, 4))
    runs(tmp_path, traces, (1, 2, 4), noise=0.03)

    def with_slow_steps(name: str, slow: Callable[[int], float]) -> tuple[ObservedStep, int]:
        run = measure(tmp_path / name, traces, condition(4), role="fit", noise=0.03, seed=4, slow=slow)
        return fit(tmp_path, *names[:2], name)[1], run.steps.num_rows

    clean, _ = with_slow_steps("clean", lambda step: 1)
    one, _ = with_slow_steps("one", lambda step: 1000 if step == 40 else 1)
    assert one.step_seconds(4, 4, 400) == pytest.approx(clean.step_seconds(4, 4, 400), rel=0.02)
    assert one.fitness.total < -0.2  # and it says that it left something out
    many, number = with_slow_steps("many", lambda step: 6 if step % 50 == 7 else 1)
    steps = number + sum(MeasuredRun.read(tmp_path / name).steps.num_rows for name in names[:2])
    paid = 5 * sum(step % 50 == 7 for step in range(number)) / steps
    assert paid > 0.01
    assert many.step_seconds(1, 1, 100) / clean.step_seconds(1, 1, 100) - 1 == pytest.approx(paid, abs=0.01)


def test_what_is_told_of_a_fit(root: Path) -> None:
    prefill, verify = fit(root, *plain())
    told = verify.describe()
    assert (told["kind"], told["runs"]) == ("observed", plain())
    assert told["steps"] == sum(
        pc.sum(pc.equal(MeasuredRun.read(root / name).steps["operation"], "decode")).as_py() for name in plain()
    )
    assert told["measured_range"]["new_tokens_in_batch"] == [1, 16]
    assert told["mean_error"] < told["held_out_mean_error"] < told["held_out_worst_error"] < 0.1
    assert abs(told["total_error"]) < 0.002
    assert prefill.describe()["measured_range"]["batch"] == [1, 16]


# --- through the simulator


def quietly(scenario: Scenario) -> RunResult:
    """Simulate; that prices are carried on beyond the measured number of tokens is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        return simulate(scenario)


def predicted(root: Path, name: str, traces: TraceSet, data: dict[str, Any], **how: Any) -> dict[str, float]:
    """Measure a condition, simulate the scenario beside it, and give the relative errors."""
    run = measure(root / name, traces, data, **how)
    result = quietly(load_scenario(root / name / "scenario.toml"))
    simulated = result.requests.to_pandas()
    rows = run.requests.to_pandas()
    took = rows["finish_s"].max() - rows["arrival_s"].min()
    ttft = (rows["first_token_s"] - rows["arrival_s"]).mean() * 1000
    return {
        "output_throughput": result.summary["output_throughput"] * took / rows["output_tokens"].sum() - 1,
        "mean_ttft_ms": (simulated["first_token_s"] - simulated["arrival_s"]).mean() * 1000 / ttft - 1,
    }


def observed(names: list[str], drafter: list[str] | None = None) -> dict[str, Any]:
    """The ``[costs]`` of a scenario that lies beside runs with these names."""
    costs: dict[str, Any] = {"verifier": {"kind": "observed", "runs": [f"../{name}" for name in names]}}
    if drafter is not None:
        costs["drafter"] = {"kind": "observed", "runs": [f"../{name}" for name in drafter]}
    return costs


@pytest.mark.parametrize("rate_rps", [None, 8.0])
@pytest.mark.parametrize(("name", "engine"), [("plain", {}), ("mixed", CHUNKED)])
@pytest.mark.parametrize(("batch", "drafted"), [(1, 4), (4, 4), (6, 0), (8, 3)])
def test_lookup_is_predicted_from_plain_runs(
    root: Path, traces: TraceSet, name: str, engine: dict[str, Any], batch: int, drafted: int, rate_rps: float | None
) -> None:
    data = condition(batch, drafted, rate_rps=rate_rps, costs=observed(plain(name)))
    data["engine"] |= engine
    errors = predicted(root, "held-out", traces, data)
    assert abs(errors["output_throughput"]) < 0.03
    assert abs(errors["mean_ttft_ms"]) < 0.06


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(("batch", "drafted"), [(1, 5), (3, 3), (8, 2)])
def test_a_model_drafter_is_predicted_from_runs_with_other_drafts(
    root: Path, traces: TraceSet, tells: bool, batch: int, drafted: int
) -> None:
    """Its own steps, its prefill among them, where the engine tells them; what rounds took beyond, where not."""
    names = []
    for slots, tokens in ((1, 3), (4, 4), (8, 4)):
        names.append(f"student-{slots}-{tells}")
        if not (root / names[-1]).exists():
            data = condition(slots, tokens, STUDENT)
            measure(root / names[-1], traces, data, role="fit", tells_drafts=tells)
    data = condition(batch, drafted, STUDENT, costs=observed(plain(), names))
    errors = predicted(root, "held-out", traces, data, tells_drafts=tells)
    assert abs(errors["output_throughput"]) < 0.05
    assert abs(errors["mean_ttft_ms"]) < 0.04
    told = quietly(load_scenario(root / "held-out" / "scenario.toml")).summary["costs"]["draft"]
    assert told["charged"] == ("per_step" if tells else "per_round")
    assert told["runs"] == names


def test_the_steps_of_a_drafter_have_its_own_price(root: Path, traces: TraceSet) -> None:
    data = condition(4, 4, STUDENT)
    measure(root / "own", traces, data, role="fit")
    scenario = parse_scenario({**data, "costs": observed(plain(), ["own"])}, folder=root / "own")
    priced = quietly(scenario).iterations
    decode = priced.filter(pc.equal(priced["kind"], "decode")).slice(0, 5).to_pylist()
    for row in decode:
        slots = row["active"]
        truth = sum(student_law(slots, row["context_tokens"] + j * slots) for j in range(4))
        assert row["draft_s"] == pytest.approx(truth, rel=0.02)
    # The first step reads four prompts, which the drafter does too.
    first = priced.slice(0, 1).to_pylist()[0]
    prompts = traces.sequences["prompt_tokens"].to_pylist()[:4]
    truth = engine_law([], [(tokens, 0) for tokens in prompts]) + student_law(sum(prompts), 0)
    assert first["verify_s"] == pytest.approx(truth, rel=0.03)


def test_a_lookup_that_never_ran_is_free_and_says_so(root: Path, traces: TraceSet) -> None:
    data = condition(2, 3, costs=observed(plain()))
    measure(root / "free", traces, data)
    with pytest.warns(ExtrapolationWarning):
        summary = simulate(load_scenario(root / "free" / "scenario.toml")).summary
    assert summary["draft_s"] == 0
    assert summary["costs"]["draft"]["assumed"] == ["no draft steps are told: no step of these runs drafted"]


def test_linear_prices_of_mixed_steps_are_what_they_were(traces: TraceSet, root: Path) -> None:
    """Prompts beside decoding add their part of a linear price, whatever else the step computes."""
    data = condition(3, 2, costs={"verifier": LINEAR, "drafter": LINEAR})
    data["engine"] |= CHUNKED
    for row in simulate(parse_scenario(data, folder=root / "plain-1")).iterations.to_pylist():
        added = row["prefill_s"] - 0.001 * row["prefill_tokens"]
        assert added == pytest.approx(0.02 if row["kind"] == "prefill" else 0)


# --- what is refused


def simulated(root: Path, **costs: Any) -> None:
    simulate(parse_scenario(condition(2, 2, STUDENT, costs=costs), folder=root / "plain-1"))


def test_a_model_drafter_that_never_ran_is_refused(root: Path) -> None:
    with pytest.raises(CostError, match="no draft step of 'student' and no round with drafted tokens; give"):
        simulated(root, **observed(plain()))


def test_an_overhead_beside_observed_costs_is_refused(root: Path) -> None:
    with pytest.raises(CostError, match=r"costs.overhead_s: must be left out for observed costs.*got 0.01"):
        simulated(root, overhead_s=0.01, **observed(plain()))


def test_runs_that_are_not_there_or_not_alike_are_refused(root: Path, tmp_path: Path, traces: TraceSet) -> None:
    with pytest.raises(CostError, match=r"costs.verifier.runs: no measured run there \(no measured.json\), got"):
        simulated(root, **observed(["plain-3"]))
    run = MeasuredRun.read(root / "plain-1")
    for key, value in (("clock", "wall"), ("model", "another")):
        other = MeasuredRun(run.manifest.model_copy(update={key: value}), run.requests, run.steps, run.scenario)
        other.write(tmp_path / "other")
        with pytest.raises(CostError, match=rf"here: must be runs of one {key}, got '.*' \(plain-1\) and '{value}'"):
            read_steps([root / "plain-1", tmp_path / "other"], "here")
    unseen = MeasuredRun(run.manifest, run.requests, run.steps.slice(0, 0), run.scenario)
    unseen.write(tmp_path / "server")
    with pytest.raises(CostError, match="'server' has no steps, only requests could be seen"):
        read_steps([tmp_path / "server"], "here")
    run.write(tmp_path / "damaged")
    (tmp_path / "damaged" / "steps.parquet").write_bytes(b"PAR1")
    with pytest.raises(CostError, match=r"here: .*steps.parquet: not a readable Parquet file"):
        read_steps([tmp_path / "damaged"], "here")
    with pytest.raises(CostError, match="no steps of 'verifer'; did you mean 'verifier'"):
        fit_observed(read_steps([root / "plain-1"], "here"), "verifer")


# --- scenarios


def test_a_sweep_tells_runs_of_one_name_in_two_folders_apart(tmp_path: Path, traces: TraceSet) -> None:
    """Only ``costs.verifier.runs`` differs, and only in the folder above: hashes of settings are equal."""
    traces.write(tmp_path / "traces")
    data = condition(1) | {"traces": {"path": "../../traces"}}
    for folder, slower in (("a", 1.0), ("b", 3.0)):
        measure(tmp_path / folder / "run", traces, data, role="fit")
        run = MeasuredRun.read(tmp_path / folder / "run")
        start, seconds = run.steps["start_s"], run.steps["seconds"]
        steps = run.steps
        for name, column in (("start_s", start), ("seconds", seconds)):
            steps = steps.set_column(steps.column_names.index(name), name, pc.multiply(column, slower))
        MeasuredRun(run.manifest, run.requests, steps, run.scenario).write(tmp_path / folder / "run")

    def chosen(folder: str) -> Scenario:
        tables = condition(1, costs={"verifier": {"kind": "observed", "runs": [f"{folder}/run"]}})
        return parse_scenario(tables | {"traces": {"path": "traces"}}, folder=tmp_path)

    def swept(folder: str) -> SweepResult:
        with pytest.warns(ExtrapolationWarning):  # one run alone says little; retold where a cell is reused
            return sweep(chosen(folder), {"seed": [1]}, store=tmp_path / "cells.sqlite", workers=1)

    assert chosen("a").hash == chosen("b").hash
    first, second, again = swept("a"), swept("b"), swept("a")
    assert (first.reused, second.reused, again.reused) == (0, 0, 1)
    assert again.summaries == first.summaries
    told = [one.summaries[0] for one in (first, second)]
    assert told[1]["duration"] == pytest.approx(3 * told[0]["duration"])
    inputs = [one["provenance"]["inputs_sha256"] for one in told]
    assert list(inputs[0]) == list(inputs[1]) == ["costs.verifier.runs[0]"]
    assert inputs[0] != inputs[1]
    traces.build(traces.manifest.model_copy(update={"seed": 9}), _tables(traces)).write(tmp_path / "traces")
    assert swept("a").reused == 0  # the recording is another one


def test_files_that_change_in_one_process_are_read_again(tmp_path: Path) -> None:
    for seed in (0, 1):
        made = made_traces(seed)
        made.write(tmp_path / "traces")
        tables = condition(1, 2, costs={"verifier": LINEAR, "drafter": LINEAR}) | {"traces": {"path": "traces"}}
        chosen = parse_scenario(tables, folder=tmp_path)
        found = sweep(chosen, {"seed": [1]}, store=tmp_path / "cells.sqlite", workers=1)
        assert found.reused == 0
        told = found.summaries[0]
        assert told["provenance"]["traces_sha256"] == TraceSet.read(tmp_path / "traces").sha256
        assert told == simulate(chosen.model_copy(update={"seed": 1}).placed(tmp_path)).summary


def test_an_input_that_changes_while_a_sweep_runs_is_not_kept(tmp_path: Path) -> None:
    made_traces(0).write(tmp_path / "traces")
    tables = condition(1, 2, costs={"verifier": LINEAR, "drafter": LINEAR}) | {"traces": {"path": "traces"}}
    chosen = parse_scenario(tables, folder=tmp_path)

    def change(done: int, total: int) -> None:
        if done == 0:
            made_traces(1).write(tmp_path / "traces")

    with pytest.raises(ScenarioError, match="a file that it reads was changed while the sweep ran; run it again"):
        sweep(chosen, {"seed": [1]}, store=tmp_path / "cells.sqlite", workers=1, progress=change)
    assert sweep(chosen, {"seed": [1]}, store=tmp_path / "cells.sqlite", workers=1).reused == 0


def _tables(traces: TraceSet) -> dict[str, Any]:
    return {name: getattr(traces, name) for name in ("sequences", "positions", "rollouts", "timings")}


def test_runs_are_paths_of_a_scenario(root: Path) -> None:
    data = condition(2, 2, costs=observed(["plain-1", "plain-2"], ["plain-4"]))
    scenario = parse_scenario(data, folder=root / "plain-1")
    (result := root / "one").mkdir()
    moved = parse_scenario(tomllib.loads(scenario.to_toml(result)), folder=result)
    verifier, drafter = moved.costs.verifier, moved.costs.drafter
    assert isinstance(verifier, Observed)
    assert isinstance(drafter, Observed)
    places = [moved.locate(run).resolve() for run in (*verifier.runs, *drafter.runs)]
    assert places == [(root / name).resolve() for name in ("plain-1", "plain-2", "plain-4")]
    assert moved.hash == scenario.hash
    other = parse_scenario(
        condition(2, 2, costs=observed(["plain-1", "plain-8"], ["plain-4"])), folder=root / "plain-1"
    )
    assert other.hash != scenario.hash
    with pytest.raises(ScenarioError, match=r"costs.verifier.runs: must"):
        parse_scenario(condition(2, costs=observed([])), folder=root / "plain-1")
