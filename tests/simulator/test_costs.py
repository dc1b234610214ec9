"""Costs: linear constants, fits to timings with their errors, and what is outside of the measurement."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import DRAFT, LINEAR, scenario, timing_table, traces_of
from scipy.optimize import nnls

from calibration.common.errors import CostError, ExtrapolationWarning
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants, LinearCost
from simulator import simulate
from simulator.pricing.fitted import FittedStep, fit_step

BATCHES, NEW, CONTEXTS = (1, 2, 4, 8), (1, 2, 3, 5, 9), (64, 256, 512)
GRID = [(b, n, c) for b in BATCHES for n in NEW for c in CONTEXTS]


def truth(batch: int, new: int, context: int) -> float:
    """A machine: compute bound from 16 tokens on, slower attention for several new tokens."""
    total = batch * new
    return 0.05 + 0.001 * max(total - 16, 0) + 0.0005 * (batch - 1) + (2e-6 + 3e-6 * (new > 1)) * batch * context


def timings(noise: float = 0.0, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    rows = [("verifier", "verify", *cell, truth(*cell) * float(np.exp(noise * rng.normal()))) for cell in GRID]
    rows += [("verifier", "prefill", b, n, 0, 0.01 + 0.001 * b * n) for b in (1, 4) for n in (8, 32, 128)]
    rows += [("drafter", "draft", b, 1, c, 0.004 + 0.0001 * b + 1e-7 * b * c) for b in BATCHES for c in CONTEXTS]
    return timing_table(rows, repeats=2)


def totals(cells: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, new, context = np.array(cells, dtype=float).T
    return batch, batch * new, batch * context


def test_a_fit_finds_a_machine_of_its_own_kind() -> None:
    fit = fit_step(timings(), "verifier", "verify")
    assert fit.error < 1e-6
    unseen = [(3, 4, 100), (8, 6, 400), (1, 7, 0), (5, 1, 300)]
    got = fit.step_seconds(*totals(unseen))
    assert got == pytest.approx([truth(*cell) for cell in unseen], rel=1e-6)
    assert len(fit.cells) == len(GRID)
    assert (fit.cells.repeats == 2).all()


def test_the_median_of_repeats_is_fitted() -> None:
    rows = [("verifier", "verify", 1, n, 0, s) for n, t in ((1, 1.0), (2, 2.0)) for s in (t, t, 50 * t)]
    fit = fit_step(timing_table(rows), "verifier", "verify")
    assert fit.step_seconds(1, 2, 0) == pytest.approx(2.0)
    assert fit.cells.seconds.tolist() == [1.0, 2.0]


def test_held_out_error_is_that_of_fits_that_never_saw_the_cell() -> None:
    """Against a dense solve of the same model, cell by cell, with scipy alone."""
    table = timings(noise=0.1)
    fit = fit_step(table, "verifier", "verify")
    frame = table.to_pandas().query("operation == 'verify'")
    cells = frame.groupby(["batch", "new_tokens", "context_tokens"])["seconds"].median().reset_index()
    b, n, c, y = (cells[name].to_numpy(float) for name in ("batch", "new_tokens", "context_tokens", "seconds"))

    def design(keep: np.ndarray) -> np.ndarray:
        knots = [0.0, *np.unique((b * n)[keep])[1:]]
        inside = [np.minimum(np.maximum(b * n - low, 0), high - low) for low, high in itertools.pairwise(knots)]
        return np.stack([np.ones_like(b), *inside, b * c, b - 1, b * c * (n > 1)], axis=1)

    errors = []
    for i in range(len(y)):
        keep = np.arange(len(y)) != i
        X = design(keep)
        solution = nnls(X[keep] / y[keep, None], np.ones(len(y) - 1))[0]
        errors.append(abs(X[i] @ solution / y[i] - 1))
    assert fit.held_out_error == pytest.approx(np.mean(errors), rel=1e-3)
    assert fit.held_out_worst == pytest.approx(np.max(errors), rel=1e-3)
    assert fit.held_out_error is not None
    assert fit.error < fit.held_out_error


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.floats(0.0, 0.6), st.data())
def test_a_step_never_gets_cheaper_by_more_work(seed: int, noise: float, data: st.DataObject) -> None:
    fit = fit_step(timings(noise, seed), "verifier", "verify")
    batch = data.draw(st.integers(1, 12))
    tokens = batch + data.draw(st.integers(0, 120))
    context = data.draw(st.integers(0, 9000))
    before = fit.step_seconds(batch, tokens, context)
    assert before > 0
    more = data.draw(st.integers(1, 50))
    for step in ((batch, tokens + more, context), (batch, tokens, context + more)):
        assert fit.step_seconds(*step) >= before
    # One more sequence brings at least one more token and its context.
    assert fit.step_seconds(batch + 1, tokens + 1, context + more) >= before


def test_one_step_and_many_steps_cost_the_same() -> None:
    fit = fit_step(timings(noise=0.05), "verifier", "verify")
    cells = [(1, 1, 64), (3, 4, 100), (8, 9, 700), (9, 40, 900)]
    batch, new, context = totals(cells)
    one_by_one = [fit.step_seconds(b, b * n, b * c) for b, n, c in cells]
    assert fit.step_seconds(batch, new, context).tolist() == one_by_one


def test_beyond_the_measurement_a_step_goes_on_growing() -> None:
    fit = fit_step(timings(), "verifier", "verify")
    largest = max(b * n for b, n, _ in GRID)
    last = fit.step_seconds(8, largest, 512)
    slope = fit.step_seconds(8, largest + 1, 512) - last
    assert slope >= 0.001 * 0.99
    assert fit.step_seconds(8, largest + 100, 512) - last == pytest.approx(100 * slope)


@pytest.mark.parametrize(
    ("step", "outside"),
    [
        ((1, 1, 64), False),
        ((8, 72, 8 * 512), False),
        ((8, 73, 8), True),
        ((9, 9, 9), True),
        ((2, 4, 2 * 513), True),
        ((2, 4, 0), False),
    ],
)
def test_what_lies_outside(step: tuple[int, int, int], outside: bool) -> None:
    assert fit_step(timings(), "verifier", "verify").outside(*step) is outside


def measured(first: int = 64, runs: int = 40) -> TraceSet:
    return traces_of([[1, 0] * (runs // 2)] * 4, prompts=[first] * 4, timings=timings())


def test_a_run_by_measured_costs_says_how_good_they_are() -> None:
    summary = simulate(scenario(2, batch=2, costs={}), measured()).summary
    assert summary["extrapolated_iterations"] == 0
    assert summary["provenance"]["costs"] == "fitted to recorded timings"
    verify = summary["costs"]["verify"]
    assert (verify["kind"], verify["cells"]) == ("fitted", len(GRID))
    assert 0 <= verify["mean_error"] <= verify["held_out_mean_error"] <= verify["held_out_worst_error"]
    assert verify["measured_range"]["batch"] == [1, 8]
    # prefill of two prompts of 64 tokens: 0.01 + 0.001 * 128.
    assert summary["costs"]["prefill"]["operation"] == "prefill"
    assert summary["mean_ttft_ms"] > 138


def test_leaving_the_measured_range_is_counted_and_warned_about_once() -> None:
    traces = measured(first=500)
    with pytest.warns(ExtrapolationWarning, match=r"\d+ of \d+ iterations were priced outside") as caught:
        summary = simulate(scenario(2, batch=2, costs={}), traces).summary
    assert len(caught) == 1
    # Prompts of 500 leave the prefill grid once per prefill, and the contexts pass 512 on the way.
    assert 0 < summary["extrapolated_iterations"] < summary["iterations"]


def test_without_timings_a_measured_cost_says_what_to_give() -> None:
    with pytest.raises(CostError, match=r"no prefill step of 'verifier' was timed.* give kind = 'linear'"):
        simulate(scenario(1, costs={}), traces_of([[0, 0]]))


def constants(**drafters: Any) -> CostConstants:
    return CostConstants(source="a table", verifier=LinearCost(base_s=0.5), drafters=drafters, overhead_s=0.25)


def with_constants(stated: CostConstants) -> TraceSet:
    traces = traces_of([[0, 0, 0]])
    return TraceSet.build(
        traces.manifest.model_copy(update={"costs": stated}),
        {"sequences": traces.sequences, "positions": traces.positions},
    )


def test_constants_that_came_with_the_traces_are_used_where_nothing_was_timed() -> None:
    traces = with_constants(constants(drafter=LinearCost(base_s=0.125, charged="per_round")))
    summary = simulate(scenario(1, costs={}), traces).summary
    # One prefill and two rounds.
    assert summary["duration"] == pytest.approx(3 * (0.5 + 0.25) + 2 * 0.125)
    assert summary["costs"]["verify"]["source"] == "a table"
    assert simulate(scenario(1, costs={"overhead_s": 0.0}), traces).summary["overhead_s"] == 0
    # The scenario's own prices rule, and then the stated overhead is none of theirs.
    own = simulate(scenario(1, costs={"verifier": LINEAR, "drafter": DRAFT}), traces).summary
    assert own["overhead_s"] == 0
    assert own["costs"]["verify"]["source"] == "scenario"


def test_missing_constants_are_named() -> None:
    traces = with_constants(constants(draftr=LinearCost(base_s=1.0)))
    with pytest.raises(CostError, match="no constants for drafter 'drafter'; did you mean 'draftr'"):
        simulate(scenario(1, costs={}), traces)
    stated = {"verifier": {"kind": "stated"}, "drafter": DRAFT}
    with pytest.raises(CostError, match="the TraceSet states none"):
        simulate(scenario(1, costs=stated), traces_of([[0, 0]]))
    with pytest.raises(CostError, match="time would stand still"):
        simulate(scenario(1, costs={"verifier": {"kind": "linear", "base_s": 0.0}, "drafter": DRAFT}), traces)


def test_lock_step_drafting_pays_for_the_slots_still_drafting() -> None:
    """Four slots propose 3, 0, 1 and 3 tokens in one round; by hand, step by step."""
    proposals = [[3, 3, 3, 3, 3], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [3, 3, 3, 3, 3]]
    traces = traces_of([[0] * 5] * 4, prompts=[10, 20, 30, 40], proposals=proposals)
    costs = {
        "verifier": LINEAR,
        "drafter": {"kind": "linear", "base_s": 1.0, "per_token_s": 0.1, "per_context_token_s": 0.01},
    }
    first = simulate(scenario(5, costs=costs), traces).iterations.to_pylist()[1]
    # At t = 1 contexts are 11, 21, 31, 41: steps of slots {0, 2, 3}, {0, 3}, {0, 3}.
    steps = [(3, 11 + 31 + 41), (2, 12 + 42), (2, 13 + 43)]
    assert first["draft_s"] == pytest.approx(sum(1.0 + 0.1 * n + 0.01 * c for n, c in steps))
    assert first["verify_s"] == pytest.approx(0.02 + 0.001 * (7 + 4) + 0.00001 * (11 + 21 + 31 + 41))


def test_a_measured_lookup_is_one_step_a_round_and_a_measured_model_one_step_a_token() -> None:
    def draft_seconds(paradigm: str) -> float:
        traces = measured()
        info = traces.manifest.drafters[0].model_copy(update={"paradigm": paradigm})
        manifest = traces.manifest.model_copy(update={"drafters": (info,)})
        same = TraceSet.build(
            manifest,
            {"sequences": traces.sequences, "positions": traces.positions, "timings": traces.timings},
        )
        return float(simulate(scenario(3, batch=1, costs={}), same).iterations["draft_s"][1].as_py())

    context = 65
    step = [0.004 + 0.0001 + 1e-7 * (context + j) for j in range(3)]
    assert draft_seconds("early-exit") == pytest.approx(sum(step), rel=1e-6)
    assert draft_seconds("prompt-lookup") == pytest.approx(step[0], rel=1e-6)


def test_fits_are_shared_between_runs() -> None:
    first: FittedStep = fit_step(timings(), "verifier", "verify")
    assert fit_step(timings(), "verifier", "verify") is first
    assert fit_step(timings(noise=0.01), "verifier", "verify") is not first
