"""Modelled joules: the law by hand, published anchors, what is extrapolated, and the sum over a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.common.errors import CostError
from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import get_device
from simulator.hardware.work import Work, step_work
from simulator.pricing.power import PowerModel, figures, modelled_joules, power_model, step_joules

H100 = get_device("h100-sxm")
SIMPLE = PowerModel(
    tdp_watts=100, bandwidth=10, flops=100, idle=0.1, memory=0.5, arithmetic=0.4, token_bytes=2, fitted=True
)


def work(moved: float = 0.0, flops: float = 0.0, scored: float = 0.0) -> Work:
    """Work of so many bytes (a quarter of each sort), operations and scored tokens."""
    return Work(flops / 2, flops / 4, flops / 4, moved / 4, moved / 4, moved / 4, moved / 4, scored, 0, 0.0, 1)


def test_the_law_by_hand() -> None:
    """20 bytes and one token worth 2: 2.2 s at peak, at half of the TDP; 50 operations: 0.5 s, at 0.4 of it."""
    assert SIMPLE.joules(work(20, 50, 1), 10) == pytest.approx(100 * (0.1 * 10 + 0.5 * 2.2 + 0.4 * 0.5))
    assert SIMPLE.joules(work(), 3) == pytest.approx(30)
    assert SIMPLE.joules(work(20, 50, 1), 1) == 100  # throttled: 1.4 times the TDP would be needed


def test_joules_of_parts_add_up_until_the_device_throttles() -> None:
    both = SIMPLE.joules(work(15, 30, 3), 9)
    assert both == pytest.approx(SIMPLE.joules(work(10, 20, 1), 4) + SIMPLE.joules(work(5, 10, 2), 5))


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e4), st.floats(1e-6, 1e4))
def test_power_lies_between_idle_and_tdp(moved: float, flops: float, scored: float, seconds: float) -> None:
    watts = SIMPLE.joules(work(moved, flops, scored), seconds) / seconds
    assert 10 * (1 - 1e-9) <= watts <= 100 * (1 + 1e-9)


def test_arrays_give_what_numbers_give() -> None:
    shape, batch, seconds = get_shape("llama-3.1-8b"), np.array([1, 8, 64]), np.array([0.006, 0.007, 0.02])
    joules = step_joules(step_work(shape, batch, batch, batch * 500), seconds, H100)
    alone = [step_joules(step_work(shape, b, b, b * 500), s, H100) for b, s in zip((1, 8, 64), seconds, strict=True)]
    assert joules == pytest.approx(alone)


@pytest.mark.parametrize(
    ("name", "devices", "batch", "context", "itl_s", "published"),
    [
        ("llama-3.1-8b", 1, 63.9, 620, 0.01150, 0.1186),
        ("llama-3.1-70b", 4, 127.6, 580, 0.02787, 0.5634),
        ("qwen3-32b", 2, 127.8, 850, 0.02966, 0.2749),
        ("qwen3-14b", 1, 32.0, 4400, 0.02155, 0.3539),
    ],
)
def test_published_joules_of_a_token(
    name: str, devices: int, batch: float, context: float, itl_s: float, published: float
) -> None:
    """ML.ENERGY v3 on H100: decode steps at the published median ITL; prefill, a tenth of it or less, left out."""
    work = step_work(get_shape(name), batch, batch, batch * context, tensor_parallel=devices)
    joules = devices * step_joules(work, itl_s, H100) / batch
    assert joules == pytest.approx(published, rel=0.15)


def test_what_was_fitted_and_what_is_extrapolated() -> None:
    assert power_model(H100).fitted
    assert power_model(H100).describe()["kind"] == "modelled"
    for name, dtype in (("h100-sxm", "fp8"), ("a100-sxm", "bf16"), ("h200", "bf16")):
        model = power_model(get_device(name), dtype)
        assert not model.fitted
        assert "extrapolated" in model.describe()["kind"]
    errors = power_model(H100).describe()["held_out_mean_errors"]
    assert set(errors) == {"cells", "model", "sizes"}
    assert "ML.ENERGY" in figures()["source"]


def test_another_device_draws_the_same_parts_of_its_own_tdp() -> None:
    here, there = power_model(H100), power_model(get_device("a100-sxm"))
    assert (there.idle, there.memory, there.arithmetic) == (here.idle, here.memory, here.arithmetic)
    assert (there.tdp_watts, there.bandwidth, there.flops) == (400, 2.039e12, 312e12)
    assert power_model(get_device("b200")).idle == 0.192  # its own


def test_a_device_whose_power_cannot_be_known_is_refused() -> None:
    with pytest.raises(CostError, match=r"^device 'm2-ultra': its tdp_watts must be known to give joules, got none$"):
        power_model(get_device("m2-ultra"))
    with pytest.raises(CostError, match="has no rate for it, got 'fp8'"):
        power_model(get_device("a100-sxm"), "fp8")


def priced(model: str, size: int = 1, **more: Any) -> dict[str, Any]:
    """What a price of kind roofline says of itself."""
    return {"kind": "roofline", "model": model, "device": "h100-sxm", "dtype": "bf16", "tensor_parallel": size} | more


def iterations(*rows: tuple[Any, ...]) -> pa.Table:
    """Engine iterations: kind, active, drafted, emitted, context, prefill tokens; draft, verify, overhead seconds."""
    names = ("kind", "active", "drafted_tokens", "emitted_tokens", "context_tokens", "prefill_tokens")
    columns = (*names, "draft_s", "verify_s", "overhead_s")
    return pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))


ROWS = (
    ("prefill", 2, 0, 2, 0, 600, 0.0, 0.05, 0.001),
    ("decode", 4, 12, 9, 2000, 0, 0.006, 0.03, 0.001),
    ("mixed", 5, 8, 7, 2100, 100, 0.004, 0.035, 0.001),
)


def test_a_run_is_the_sum_of_its_iterations() -> None:
    big, small = get_shape("llama-3.1-70b"), get_shape("llama-3.2-1b")
    found = modelled_joules(
        {
            "prefill": priced("llama-3.1-70b", 4),
            "verify": priced("llama-3.1-70b", 4),
            "draft": priced("llama-3.2-1b"),
        },
        iterations(*ROWS),
    )
    verify = [
        step_joules(step_work(big, 2, 600, 0, tensor_parallel=4, logits=2), 0.051, H100),
        step_joules(step_work(big, 4, 16, 2000, tensor_parallel=4), 0.031, H100),
        step_joules(step_work(big, 5, 113, 2100, tensor_parallel=4, logits=13), 0.036, H100),
    ]
    draft = [  # three steps of four tokens; two of four
        3 * step_joules(step_work(small, 4, 4, 2000), 0.002, H100),
        2 * step_joules(step_work(small, 5, 4, 2100), 0.002, H100),
    ]
    assert found["joules"] == pytest.approx(4 * sum(verify) + sum(draft))
    assert found["joules_per_million_output_tokens"] == pytest.approx(found["joules"] / 18 * 1e6)
    assert found["energy"]["kind"] == "modelled"
    assert 100 < found["joules"] / 0.13 < 4 * 700  # watts of four devices, and of one that drafts


def test_a_part_of_a_model_does_a_part_of_its_work() -> None:
    costs = {"verify": priced("llama-3.1-8b"), "draft": priced("llama-3.1-8b", layers=1)}
    rows = iterations(ROWS[1])
    part = modelled_joules(costs, rows)["joules"]
    costs["draft"] = priced("llama-3.1-8b")
    whole = modelled_joules(costs, rows)["joules"]
    one = dataclasses.replace(get_shape("llama-3.1-8b"), layers=1)
    step = 3 * step_joules(step_work(one, 4, 4, 2000), 0.002, H100)
    assert part == pytest.approx(modelled_joules({"verify": priced("llama-3.1-8b")}, rows)["joules"] + step)
    assert part < whole


def test_nothing_is_said_where_a_price_is_of_another_kind_or_nothing_was_emitted() -> None:
    rows, price = iterations(*ROWS), priced("llama-3.1-8b")
    assert modelled_joules({"verify": {"kind": "linear"}}, rows) == {}
    assert modelled_joules({"prefill": {"kind": "fitted"}, "verify": price}, rows) == {}
    assert modelled_joules({"verify": price, "draft": {"kind": "fraction_of_verify"}}, rows) == {}
    assert modelled_joules({}, rows) == {}
    assert modelled_joules({"verify": price}, iterations(("decode", 1, 0, 0, 5, 0, 0.0, 0.01, 0.0))) == {}
