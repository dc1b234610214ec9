"""Joules: power of steps from timings, and what a run makes of it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scenarios import random_runs, scenario, timing_table, traces_of

from calibration.traces import make_table
from simulator import RunResult, simulate
from simulator.pricing.power import fit_power, joules

ROWS = [
    *(
        ("verifier", op, b, n, c, 0.02 + 0.001 * b * n)
        for op in ("prefill", "verify")
        for b in (1, 4)
        for n in (1, 3, 8, 40)
        for c in (0, 64)
    ),
    *(("drafter", "draft", b, 1, c, 0.004 + 0.0002 * b) for b in (1, 2, 4) for c in (16, 64)),
]


def timings(watts: dict[str, float], missing: str | None = None, slope: float = 0.0) -> pa.Table:
    """Timings of a device that draws `watts` of an operation, and `slope` more for every token of a step."""
    table = timing_table(ROWS, repeats=3)
    joules = [
        None
        if row["operation"] == missing
        else (watts[row["operation"]] + slope * row["batch"] * row["new_tokens"]) * row["seconds"]
        for row in table.to_pylist()
    ]
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "joules"}
    return make_table("timings", {**columns, "joules": joules})


def run(table: pa.Table | None, draft_tokens: int | None = 2, **costs: object) -> RunResult:
    rng = np.random.default_rng(3)
    traces = traces_of([random_runs(rng, 30) for _ in range(8)], prompts=[20] * 8, timings=table)
    return simulate(scenario(draft_tokens, batch=4, costs=costs), traces)


def test_constant_power_gives_busy_time_times_watts() -> None:
    watts = {"prefill": 600.0, "verify": 400.0, "draft": 150.0}
    summary = run(timings(watts)).summary
    expected = sum(watts[part] * summary[f"{part}_s"] for part in watts)
    assert summary["joules"] == pytest.approx(expected)
    tokens = summary["total_output_tokens"]
    assert summary["joules_per_million_output_tokens"] == pytest.approx(expected / tokens * 1e6)
    assert summary["energy"]["mean_errors"] == {"prefill": 0, "verify": 0, "draft": 0}


def test_power_follows_the_tokens_of_a_step() -> None:
    power = fit_power(timings({"prefill": 1.0, "verify": 300.0, "draft": 1.0}, slope=2.0), "verifier", "verify")
    assert power is not None
    assert power.at(np.array([1, 3, 4, 5, 12, 160])) == pytest.approx([302, 306, 308, 310, 324, 620])
    assert power.at(1000) == pytest.approx(620)


def test_nothing_is_drawn_for_drafting_where_nothing_is_drafted() -> None:
    watts = {"prefill": 600.0, "verify": 400.0, "draft": 150.0}
    summary = run(timings(watts, missing="draft"), draft_tokens=None).summary
    assert summary["joules"] == pytest.approx(600 * summary["prefill_s"] + 400 * summary["verify_s"])


@pytest.mark.parametrize("missing", ["prefill", "verify", "draft"])
def test_energy_is_absent_where_a_step_has_none(missing: str) -> None:
    summary = run(timings({"prefill": 1.0, "verify": 1.0, "draft": 1.0}, missing=missing)).summary
    assert not [name for name in summary if "joule" in name or name == "energy"]


def test_energy_is_absent_where_prices_are_not_those_of_the_device() -> None:
    table = timings({"prefill": 1.0, "verify": 1.0, "draft": 1.0})
    stated = {"kind": "linear", "base_s": 0.02}
    assert "joules" not in run(table, verifier=stated).summary
    assert "joules" not in run(table, drafter=stated).summary
    assert "joules" not in run(None, verifier=stated, drafter=stated).summary


def test_steps_of_another_kind_than_measured_have_no_energy() -> None:
    table = timings({"prefill": 600.0, "verify": 400.0, "draft": 150.0})
    result = run(table)
    iterations, costs = result.iterations, result.summary["costs"]
    assert joules(table, costs, iterations)["joules"] == result.summary["joules"]
    kinds = pa.array(["mixed", *iterations["kind"].to_pylist()[1:]])
    mixed = iterations.set_column(iterations.schema.get_field_index("kind"), "kind", kinds)
    assert joules(table, costs, mixed) == {}
    assert joules(table, costs, iterations.slice(0, 0)) == {}
