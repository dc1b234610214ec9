"""The roofline: its limits in closed form, what grows with what, what it calls extrapolated, its table of keys."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from calibration.common.errors import CostError
from calibration.common.toml import sentences
from calibration.shapes.shapes import Shape, get_shape
from simulator.hardware.devices import H100_SXM
from simulator.hardware.work import (
    COEFFICIENTS,
    Efficiencies,
    Kernel,
    attention_s,
    kv_token_bytes,
    matmul_s,
    matrices,
    step_work,
)
from simulator.pricing.roofline import RooflineStep, roofline_step
from simulator.scenario.costs import Roofline

FIT = Efficiencies.fitted()
H100 = "h100-sxm"


def bare(model: str | Shape = "llama-3.1-8b", **options: Any) -> RooflineStep:
    """A step without any time of the host."""
    options = {"device": H100, "host_overhead_s": 0.0, "host_per_sequence_s": 0.0} | options
    return roofline_step(model, **options)


def decoder(layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int = 1024) -> Shape:
    return Shape("made", "llama", layers, hidden, intermediate, heads, heads, vocabulary, "made for a test")


# --- closed forms ---


def test_a_matrix_of_few_tokens_takes_its_weights_over_the_bandwidth() -> None:
    kernel = Kernel(0.0, 0.8, 0.9)
    seconds = matmul_s(kernel, 1.0, 8192.0, 8192.0, 1e15, 3e12, 2.0)
    assert seconds == pytest.approx(2 * 8192 * 8192 / (0.9 * 3e12), rel=1e-3)


def test_a_matrix_of_many_tokens_takes_its_operations_over_the_rate() -> None:
    kernel = Kernel(0.0, 0.8, 0.9)
    tokens = 200_000.0
    seconds = matmul_s(kernel, tokens, 8192.0, 8192.0, 1e15, 3e12, 2.0)
    assert seconds == pytest.approx(2 * tokens * 8192 * 8192 / (0.8 * 1e15), rel=2e-3)


def test_where_both_bounds_meet_a_matrix_takes_the_fourth_root_of_two_longer() -> None:
    # 2 tokens inner outer / 1e15 = 1 s with no bytes to speak of but those that also take 1 s.
    kernel = Kernel(0.5, 1.0, 1.0)
    inner = outer = 1e6
    tokens = 1e15 / (2 * inner * outer)
    moved = 2 * (inner * outer + tokens * (inner + outer))
    assert matmul_s(kernel, tokens, inner, outer, 1e15, moved, 2.0) == pytest.approx(0.5 + 2**0.25)


def test_attention_is_its_launch_where_there_is_nothing_to_do_and_memory_where_contexts_are_long() -> None:
    kernel = Kernel(8e-6, 0.3, 0.9)
    assert attention_s(kernel, 0.0, 0.0) == pytest.approx(8e-6)
    assert attention_s(kernel, 0.0, 1e-3) == pytest.approx(8e-6 + 1e-3 / 0.9)
    assert attention_s(kernel, 1e-3, 0.0) == pytest.approx((math.sqrt(8e-6) + math.sqrt(1e-3 / 0.3)) ** 2)


def test_one_sequence_of_70b_takes_its_weights_and_its_launches() -> None:
    step = bare("llama-3.1-70b")
    weights = float(step_work(step.shape, 1, 1, 0).weight_bytes) / (FIT.matmul.bytes * H100_SXM.bandwidth)
    launches = (4 * 80 + 1) * FIT.matmul.launch_s
    found = step.parts(1, 1, 0)
    assert float(found["matrices"] + found["head"]) == pytest.approx(weights + launches, rel=0.003)


def test_a_long_prefill_takes_its_operations() -> None:
    step = bare(operation="prefill")
    tokens = 200_000
    work = step_work(step.shape, 1, tokens, 0, logits=1)
    found = step.parts(1, tokens, 0)
    rate = H100_SXM.flops["bf16"]
    assert float(found["matrices"]) == pytest.approx(float(work.linear_flops) / (FIT.matmul.flops * rate), rel=0.01)
    assert float(found["attention"]) == pytest.approx(
        float(work.attention_flops) / (FIT.attention.flops * rate), rel=0.03
    )


def test_a_cached_token_costs_its_bytes_over_the_bandwidth() -> None:
    step = bare()
    slope = step.step_seconds(64, 64, 400_000) - step.step_seconds(64, 64, 200_000)
    byte = kv_token_bytes(step.shape) / (FIT.attention.bytes * H100_SXM.bandwidth)
    assert slope / 200_000 == pytest.approx(byte, rel=1e-9)


def test_the_matrices_of_a_step_are_those_that_its_work_counts() -> None:
    for name, size in (("llama-3.1-70b", 4), ("qwen3-8b", 2), ("llama-2-7b", 1), ("llama-3.1-70b", 16)):
        shape = get_shape(name)
        work = step_work(shape, 1, 1, 0, tensor_parallel=size)
        *layers, (_, inner, outer) = matrices(shape, size)
        assert sum(2 * count * wide * other for count, wide, other in layers) == pytest.approx(work.linear_flops)
        assert 2 * inner * outer == pytest.approx(work.head_flops)


# --- what grows with what ---


@pytest.mark.parametrize("operation", ["prefill", "verify", "draft"])
def test_more_tokens_or_more_context_never_cost_less(operation: Any) -> None:
    step = roofline_step("llama-3.1-8b", H100, operation=operation)
    tokens = np.arange(32, 6000)
    assert (np.diff(step.step_seconds(32, tokens, 16_000)) > 0).all()
    context = np.arange(0, 500_000, 1000)
    assert (np.diff(step.step_seconds(32, 160, context)) >= 0).all()
    assert step.step_seconds(32, 160, 500_000) > step.step_seconds(32, 160, 100_000)


def test_a_sequence_more_costs_the_host_more() -> None:
    step = roofline_step("llama-3.1-8b", H100)
    assert step.per_sequence_s == pytest.approx(FIT.host_per_logit_s * 128_256)
    more = step.step_seconds(33, 64, 10_000) - step.step_seconds(32, 64, 10_000)
    assert more == pytest.approx(step.per_sequence_s, rel=0.05)


def test_a_prefill_scores_one_token_a_sequence_and_a_verification_all() -> None:
    prefill, verify = (bare(operation=operation) for operation in ("prefill", "verify"))
    difference = verify.step_seconds(1, 2048, 0) - prefill.step_seconds(1, 2048, 0)
    assert difference == pytest.approx(float(verify.parts(1, 2048, 0)["head"] - prefill.parts(1, 2048, 0)["head"]))
    assert difference > 0.002


def test_two_devices_are_faster_than_one_but_not_twice() -> None:
    for batch, tokens in ((1, 1), (64, 256), (1, 4096)):
        alone, two, four = (
            bare("llama-3.1-70b", tensor_parallel=size).step_seconds(batch, tokens, 500 * batch) for size in (1, 2, 4)
        )
        assert alone / 2 < two < alone
        assert two / 2 < four < two


def test_all_reduces_take_their_launch_and_the_ring() -> None:
    step = bare("llama-3.1-70b", tensor_parallel=4)
    message = 2 * 8192 * 256
    once = FIT.matmul.launch_s + 1.5 * message / (FIT.link * 450e9)
    assert float(step.parts(256, 256, 0)["all_reduce"]) == pytest.approx(160 * once)
    assert float(bare("llama-3.1-70b").parts(256, 256, 0)["all_reduce"]) == 0


def test_a_deep_narrow_drafter_costs_more_than_a_shallow_wide_one_of_its_size() -> None:
    wide, narrow = decoder(1, 4096, 11_008, 32, 1024), decoder(8, 1408, 4096, 11, 2979)
    assert narrow.parameters == pytest.approx(wide.parameters, rel=0.01)
    one, eight = (bare(shape, operation="draft").step_seconds(1, 1, 200) for shape in (wide, narrow))
    assert eight > 2 * one
    # Of memory alone both would take the same; what differs is launches, seven layers more of them.
    launches = 7 * (
        4 * FIT.matmul.launch_s
        + FIT.attention.launch_s
        + sum(
            count * FIT.elementwise[kind].launch_s for count, kind in ((2, "norm"), (2, "rotation"), (1, "product"))
        )
    )
    assert eight - one == pytest.approx(launches, rel=0.1)


def test_a_drafter_has_no_host_time_unless_it_is_given() -> None:
    assert (roofline_step("llama-3.2-1b", H100, operation="draft").host_s) == 0
    step = roofline_step("llama-3.2-1b", H100, operation="draft", host_overhead_s=1e-3, host_per_sequence_s=1e-5)
    extra = step.step_seconds(8, 8, 100) - bare("llama-3.2-1b", operation="draft").step_seconds(8, 8, 100)
    assert extra == pytest.approx(1e-3 + 8e-5)


def test_half_the_layers_cost_half_of_the_layers() -> None:
    whole, half = bare(), bare(layers=16)
    assert float(half.parts(4, 16, 2000)["matrices"]) == pytest.approx(
        float(whole.parts(4, 16, 2000)["matrices"]) / 2
    )
    assert float(half.parts(4, 16, 2000)["head"]) == float(whole.parts(4, 16, 2000)["head"])


def test_eight_bits_halve_the_weights_but_not_the_cache() -> None:
    wide, narrow = bare(), bare(dtype="fp8")
    assert float(narrow.parts(1, 1, 0)["matrices"]) < 0.65 * float(wide.parts(1, 1, 0)["matrices"])
    assert float(narrow.parts(64, 64, 99_000)["attention"]) == float(wide.parts(64, 64, 99_000)["attention"])


def test_head_norms_are_priced_where_a_shape_has_them() -> None:
    qwen = get_shape("qwen3-8b")
    plain = dataclasses.replace(qwen, family="llama")
    difference = bare(qwen).parts(1, 1, 0)["elementwise"] - bare(plain).parts(1, 1, 0)["elementwise"]
    assert float(difference) == pytest.approx(2 * 36 * FIT.elementwise["norm"].launch_s, rel=0.05)


# --- one price, however it is asked ---


def test_one_step_and_many_at_once_cost_the_same() -> None:
    for operation in ("prefill", "verify"):
        step = roofline_step("qwen3-14b", H100, operation=operation)  # type: ignore[arg-type]
        batch, tokens, context = np.array([1, 3, 64]), np.array([1, 300, 256]), np.array([0, 40, 9000])
        together = step.step_seconds(batch, tokens, context)
        floats = step.step_seconds(*(array.astype(float) for array in (batch, tokens, context)))
        alone = [step.step_seconds(*map(int, key)) for key in zip(batch, tokens, context, strict=True)]
        assert together.tolist() == alone
        assert floats == pytest.approx(together, rel=1e-12)
        assert step.step_seconds(1, 10_000, 0) > step.step_seconds(1, 4096, 0)


def test_an_empty_step_costs_what_is_fixed() -> None:
    # An engine prices a chunk of prefill beside decoding as a prefill without this.
    step = roofline_step("llama-3.1-8b", H100, operation="prefill")
    fixed, one = step.step_seconds(1, 0, 0), step.step_seconds(1, 1, 0)
    assert 0.99 * one < fixed <= one
    assert math.isfinite(step.step_seconds(0, 0, 0))


def test_a_chunk_beside_decoding_is_one_pass_over_all_tokens() -> None:
    step = roofline_step("llama-3.1-8b", H100, operation="prefill")
    decode = roofline_step("llama-3.1-8b", H100)
    added = step.added_seconds(2, 1024, 0, 64)
    # All tokens at once, but for the attention, which is priced apart, and logits of the chunk's last tokens only.
    joint, alone = (decode.parts(66, tokens, 0) for tokens in (1088, 64))
    expected = sum(float(joint[part] - alone[part]) for part in ("matrices", "elementwise"))
    chunk = float(step.parts(2, 1024, 0)["attention"]) - 32 * FIT.attention.launch_s
    assert added == pytest.approx(expected + chunk + 2 * step.per_sequence_s, rel=0.001)
    # Few tokens ride along nearly free, many cost what they cost alone.
    assert step.added_seconds(1, 16, 0, 16) < 0.1 * step.step_seconds(1, 16, 0)
    assert step.added_seconds(1, 8192, 0, 64) == pytest.approx(step.step_seconds(1, 8192, 0), rel=0.1)


# --- what it says of itself ---


def test_steps_like_those_tested_are_inside_and_others_outside() -> None:
    step = roofline_step("llama-3.1-70b", H100, tensor_parallel=4)
    tested = FIT.tested
    assert not step.outside(1, 1, 0)
    assert not step.outside(64, 320, 64 * 2000)
    assert step.outside(1, tested.new_tokens + 1, 0)
    assert step.outside(tested.batch + 1, tested.batch + 1, 0)
    assert step.outside(2, 2, 2 * tested.context_tokens + 1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"device": "a100-sxm"}, "device a100-sxm"),
        ({"dtype": "fp8"}, "dtype fp8"),
        ({"tensor_parallel": 8}, "tensor_parallel 8"),
        ({"model": decoder(2, 256, 512, 4)}, "inner widths"),
    ],
)
def test_what_was_never_tested_is_outside_whatever_the_step(options: dict[str, Any], word: str) -> None:
    options = {"model": "llama-3.1-8b", "device": H100} | options
    step = roofline_step(**options)
    assert step.outside(1, 1, 0)
    assert [reason for reason in step.extrapolated if word in reason]
    assert step.describe()["extrapolated"] == list(step.extrapolated)


def test_a_description_says_what_was_fitted_and_how_well() -> None:
    told = roofline_step("qwen3-8b", H100).describe()
    assert told["kind"] == "roofline"
    assert (told["model"], told["device"], told["dtype"], told["tensor_parallel"]) == (
        "qwen3-8b",
        H100,
        "bf16",
        1,
    )
    assert told["extrapolated"] == []
    assert told["mean_errors"]["decode_step_unfitted"] == FIT.errors["decode_step_unfitted"]
    json.dumps(told)


def test_the_shipped_coefficients_are_shares_and_latencies_with_their_source_and_errors() -> None:
    data = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    kernels = [FIT.matmul, FIT.attention, *FIT.elementwise.values()]
    assert all(1e-6 < kernel.launch_s < 2e-5 and 0.1 < kernel.bytes < 1 for kernel in kernels)
    assert all(0.1 < share < 1 for share in (FIT.matmul.flops, FIT.attention.flops, FIT.link))
    for part in ("matmul", "attention", "elementwise", "all_reduce", "host"):
        assert data[part]["cells"] > 0
        assert len(data[part]["source"]) > 20
    assert set(FIT.errors) >= {
        "matrices_held_out",
        "matrices_unfitted",
        "decode_step_held_out",
        "decode_step_unfitted",
    }
    assert all(0 < error < 0.2 for error in FIT.errors.values())


# --- errors and keys ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "llama-3.1-7b"}, "did you mean 'llama-3.1-70b'"),
        ({"device": "h100-sxm5"}, "did you mean 'h100-sxm'"),
        ({"device": "l40s", "dtype": "fp4"}, "no rate"),
        ({"tensor_parallel": 3}, "must divide heads"),
        ({"device": "m2-ultra", "tensor_parallel": 2}, "link is not known"),
    ],
)
def test_what_cannot_be_priced_is_refused(options: dict[str, Any], message: str) -> None:
    options = {"model": "llama-3.1-70b", "device": H100} | options
    with pytest.raises(CostError, match=message):
        roofline_step(**options)


def faults(**table: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Roofline.model_validate({"kind": "roofline", "model": "llama-3.1-70b", "device": H100} | table)
    return sentences(caught.value.errors(), Roofline)


def test_a_table_names_a_model_and_a_device() -> None:
    table = Roofline(kind="roofline", model="llama-3.1-70b", device=H100, tensor_parallel=4, layers=40)
    assert table.dtype == "bf16"
    assert table.host_overhead_s is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": "lama-3.1-70b"}, "model must be a known shape, got 'lama-3.1-70b'; did you mean 'llama-3.1-70b'?"),
        ({"device": "H100"}, "device must be a known one, got 'H100'; did you mean 'h100-sxm'?"),
        ({"device": "H200-SXM"}, "device must be a known one, got 'H200-SXM'; did you mean"),
        ({"dtype": "fp8", "device": "a100-sxm"}, "dtype must be one that NVIDIA A100 SXM 80 GB has a rate for"),
        ({"tensor_parallel": 7}, "tensor_parallel: must divide heads = 64"),
        ({"tensor_parallel": 2, "device": "cpu"}, "whose link is not known"),
        ({"layers": 81}, "layers must be at most the 80 of 'llama-3.1-70b', got 81"),
        ({"host_overhead_s": -1.0}, "host_overhead_s: must be >= 0"),
        ({"tensor_paralel": 2}, "tensor_paralel: no such key; did you mean 'tensor_parallel'?"),
    ],
)
def test_a_fault_in_a_table_is_told_in_one_sentence(table: dict[str, Any], message: str) -> None:
    told = faults(**table)
    assert len(told) == 1
    assert message in told[0]


def test_both_names_that_are_not_known_are_told_at_once() -> None:
    (told,) = faults(model="gpt", device="abacus")
    assert "'gpt'" in told
    assert "'abacus'" in told
