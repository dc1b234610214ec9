"""Operations and bytes of a step, against figures worked out by hand and against published parameter counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.common.errors import CalibrationError, CostError
from calibration.shapes.shapes import SHAPES, UNTIMED, Shape, get_shape
from simulator.hardware.work import Share, Work, kv_token_bytes, step_work, weight_memory_bytes

EIGHT, SEVENTY = get_shape("llama-3.1-8b"), get_shape("llama-3.1-70b")


def test_a_decode_step_of_llama_8b_by_hand() -> None:
    """Four sequences, one new token each, 1000 cached tokens each.

    A layer's matrices: q 4096 x 4096, k and v 4096 x 1024 each, o 4096 x 4096, three of 4096 x 14336: 218,103,808
    entries; 32 layers; head 128,256 x 4096 = 525,336,576. A token's keys and values: 32 x 2 x 8 x 128 x 2 bytes.
    """
    work = step_work(EIGHT, 4, 4, 4000)
    assert work.linear_flops == 2 * 4 * 32 * 218_103_808
    assert work.head_flops == 2 * 4 * 525_336_576
    assert work.attention_flops == 32 * 4 * 4096 * (4 * 1001)
    layers = 32 * (218_103_808 + 2 * 4096)
    assert work.weight_bytes == 2 * (layers + 525_336_576 + 4096 + 4 * 4096)
    assert work.kv_read_bytes == 131_072 * 4004
    assert work.kv_write_bytes == 131_072 * 4
    # 12 h + 6 (q + k) + 6 i a layer, 5 h outside, h + vocabulary a scored token
    layer = 12 * 4096 + 6 * (4096 + 1024) + 6 * 14_336
    assert work.activation_bytes == 2 * 4 * (32 * layer + 5 * 4096 + 4096 + 128_256)
    assert (work.all_reduces, work.all_reduce_bytes, work.kernels) == (0, 0, 32 * 10 + 4)
    assert work.flops == work.linear_flops + work.attention_flops + work.head_flops
    assert work.bytes == work.weight_bytes + work.kv_bytes + work.activation_bytes


def test_a_verify_step_of_llama_70b_on_four_devices_by_hand() -> None:
    """Eight sequences of five new tokens after 2000; a device has 16 query heads, 2 KV heads, 7168 of the MLP."""
    work = step_work(SEVENTY, 8, 40, 16_000, tensor_parallel=4)
    matrices = 8192 * 2 * (2048 + 256) + 3 * 8192 * 7168
    assert matrices == 213_909_504
    assert work.linear_flops == 2 * 40 * 80 * matrices
    assert work.head_flops == 2 * 40 * 8192 * 32_064
    assert work.attention_flops == 80 * 4 * 2048 * 8 * (5 * 2000 + 1 + 2 + 3 + 4 + 5)
    assert work.weight_bytes == 2 * (80 * (matrices + 2 * 8192) + 8192 * 32_064 + 8192 + 40 * 8192)
    assert work.kv_read_bytes == 80 * 2 * 256 * 2 * 16_040
    assert (work.all_reduces, work.all_reduce_bytes) == (160, 160 * 40 * 8192 * 2)
    assert work.kernels == 80 * 12 + 4


def test_four_devices_do_the_matrices_and_the_cache_of_one_between_them() -> None:
    one, four = step_work(SEVENTY, 8, 40, 16_000), step_work(SEVENTY, 8, 40, 16_000, tensor_parallel=4)
    for name in ("linear_flops", "attention_flops", "head_flops", "kv_read_bytes", "kv_write_bytes"):
        assert 4 * getattr(four, name) == getattr(one, name), name
    assert 4 * four.weight_bytes > one.weight_bytes  # every device has all the norms


def test_kv_heads_are_kept_whole_beyond_one_a_device() -> None:
    assert Share.of(SEVENTY, 8).kv_width == Share.of(SEVENTY, 16).kv_width == 128
    assert kv_token_bytes(SEVENTY, tensor_parallel=16) == 80 * 2 * 128 * 2
    # 8192 x 128 for each of k and v on all 16 devices, the rest in 16 parts
    assert Share.of(SEVENTY, 16).layer_matrix == 8192 * 2 * (512 + 128) + 3 * 8192 * 1792


@pytest.mark.parametrize("name", [*SHAPES, *UNTIMED])
def test_weights_are_the_parameters_of_the_shape(name: str) -> None:
    shape = get_shape(name)
    assert weight_memory_bytes(shape, dtype_bytes=1) == shape.parameters
    share = Share.of(shape)
    assert (share.layer_matrix, share.layer_matrix + share.layer_rest) == (
        shape.layer_matrix_parameters,
        shape.layer_parameters,
    )
    # A decode step of one token reads all but the embedding table, of which it reads one row.
    read = step_work(shape, 1, 1, 0, dtype_bytes=1).weight_bytes
    table = 0 if shape.tied else shape.vocabulary * shape.hidden
    assert read == shape.parameters - table + shape.hidden


PUBLISHED = {"qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264}
"""Totals that the published weight files state."""


def test_shapes_that_cannot_be_timed_have_their_published_totals() -> None:
    assert {name: shape.parameters for name, shape in UNTIMED.items()} == PUBLISHED
    assert not set(SHAPES) & set(UNTIMED)
    with pytest.raises(CalibrationError, match=r"^shape 'qwen3-8': not known; did you mean 'qwen3-8b'\?$"):
        get_shape("qwen3-8")


@pytest.mark.parametrize("name", UNTIMED)
def test_transformers_counts_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = get_shape(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.config())
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    layer = model.model.layers[0]
    assert sum(p.numel() for p in layer.parameters()) == shape.layer_parameters


def test_norms_of_heads_cost_two_kernels_and_no_operations() -> None:
    plain = get_shape("qwen3-8b")
    without = dataclasses.replace(plain, family="llama")
    one, other = step_work(plain, 2, 2, 100), step_work(without, 2, 2, 100)
    assert one.flops == other.flops
    assert one.kernels - other.kernels == 2 * 36
    assert one.weight_bytes - other.weight_bytes == 2 * 36 * 2 * 128
    assert one.activation_bytes - other.activation_bytes == 2 * 2 * 36 * 2 * (4096 + 1024)


def test_a_prefill_scores_one_token_a_sequence() -> None:
    every, last = step_work(EIGHT, 2, 600, 0), step_work(EIGHT, 2, 600, 0, logits=2)
    assert last.head_flops * 300 == every.head_flops
    assert (every.scored_tokens, last.scored_tokens) == (600, 2)
    assert last.linear_flops == every.linear_flops
    assert last.weight_bytes == every.weight_bytes
    none = step_work(EIGHT, 2, 600, 0, logits=0)
    assert every.weight_bytes - none.weight_bytes == 2 * 525_336_576


def test_smaller_numbers_take_fewer_bytes() -> None:
    wide, narrow = step_work(EIGHT, 2, 6, 500), step_work(EIGHT, 2, 6, 500, dtype_bytes=1, kv_bytes=1)
    assert narrow.bytes * 2 == wide.bytes
    assert narrow.flops == wide.flops
    mixed = step_work(EIGHT, 2, 6, 500, kv_bytes=1)
    assert (mixed.kv_bytes * 2, mixed.weight_bytes) == (wide.kv_bytes, wide.weight_bytes)


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=6), st.integers(1, 9))
def test_attention_is_exact_where_all_have_as_many_new_tokens(contexts: list[int], new: int) -> None:
    batch = len(contexts)
    pairs = sum(context + seen for context in contexts for seen in range(1, new + 1))
    work = step_work(EIGHT, batch, batch * new, sum(contexts))
    assert work.attention_flops == pytest.approx(32 * 4 * 4096 * pairs, rel=1e-12)
    one_by_one = [step_work(EIGHT, 1, new, context) for context in contexts]
    assert work.attention_flops == pytest.approx(sum(w.attention_flops for w in one_by_one), rel=1e-12)
    assert work.kv_read_bytes == sum(w.kv_read_bytes for w in one_by_one)


def test_arrays_give_what_numbers_give() -> None:
    batch, new, context = np.array([1, 4, 64]), np.array([1, 12, 64]), np.array([10, 4000, 90_000])
    work = step_work(SEVENTY, batch, new, context, tensor_parallel=2)
    for i in range(3):
        alone = step_work(SEVENTY, int(batch[i]), int(new[i]), int(context[i]), tensor_parallel=2)
        for field in dataclasses.fields(Work):
            value = getattr(work, field.name)
            assert (value if np.ndim(value) == 0 else value[i]) == pytest.approx(
                getattr(alone, field.name), rel=1e-12
            )


def test_a_step_without_tokens_reads_the_layers_only() -> None:
    work = step_work(EIGHT, 0, 0, 0)
    assert (work.flops, work.kv_bytes, work.activation_bytes) == (0, 0, 0)
    assert work.weight_bytes == 2 * (32 * (218_103_808 + 2 * 4096) + 4096)


UNEVEN = dataclasses.replace(get_shape("llama-3.2-3b"), kv_heads=3)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        (EIGHT, 0, "tensor_parallel: must be at least 1, got 0"),
        (EIGHT, 3, "tensor_parallel: must divide heads = 32 of 'llama-3.1-8b', got 3"),
        (
            get_shape("qwen2.5-14b"),
            5,
            "tensor_parallel: must divide intermediate = 13824 of 'qwen2.5-14b', got 5",
        ),
        (
            UNEVEN,
            2,
            "tensor_parallel: must divide kv_heads = 3 of 'llama-3.2-3b' or be a multiple of it, got 2",
        ),
    ],
)
def test_a_size_that_does_not_divide_the_shape_is_refused(shape: Shape, size: int, message: str) -> None:
    with pytest.raises(CostError) as caught:
        step_work(shape, 1, 1, 0, tensor_parallel=size)
    assert str(caught.value) == message
