"""The decoder step that is timed: the logits of transformers, trees against chains, caches, fp8."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.models.fp8 import INPUT_SCALE, LARGEST, Fp8Linear, fp8_fault
from calibration.shapes.shapes import SHAPES
from calibration.timing.bench import (
    Bench,
    Dense,
    HeadWeights,
    LayerWeights,
    Place,
    ancestors,
    attend,
    depths,
    place_tokens,
    run_head,
    run_layers,
    tree_parents,
)
from calibration.timing.gridfile import StepCell

CPU = torch.device("cpu")


def reference(shape, seed=0):
    """A transformers model of `shape` with biases and norms that matter, and its weights as the step wants them."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape.config()).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=0.3 if name.endswith("bias") else 0.15)
    state = model.state_dict()
    layers = []
    for number in range(shape.layers):
        part = {key.split(f"layers.{number}.")[1]: v for key, v in state.items() if f"layers.{number}." in key}
        heads = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        bias = torch.cat([part[f"{name}.bias"] for name in heads]) if shape.qkv_bias else None
        layers.append(
            LayerWeights(
                part["input_layernorm.weight"],
                Dense(torch.cat([part[f"{name}.weight"] for name in heads]), bias),
                Dense(part["self_attn.o_proj.weight"]),
                part["post_attention_layernorm.weight"],
                Dense(torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]])),
                Dense(part["mlp.down_proj.weight"]),
            )
        )
    head = HeadWeights(state["model.embed_tokens.weight"], state["model.norm.weight"], Dense(state["lm_head.weight"]))
    return model, tuple(layers), head


class Reader:
    """Feeds tokens step by step through the timed functions, with a cache that grows; gives logits."""

    def __init__(self, shape, layers, head, batch):
        self.shape, self.layers, self.head = shape, layers, head
        self.cache = torch.empty(len(layers), 2, batch, shape.kv_heads, 0, shape.head_dim)

    def feed(self, tokens, parents=None, keep=True):
        new = tokens.shape[1]
        context = self.cache.shape[4]
        room = torch.full((*self.cache.shape[:4], new, self.shape.head_dim), float("nan"))  # poison: must be written
        cache = torch.cat((self.cache, room), 4)
        parents = list(range(-1, new - 1)) if parents is None else parents
        place = place_tokens(self.shape, context, parents, torch.float32, CPU)
        x = torch.nn.functional.embedding(tokens, self.head.embedding)
        logits = run_head(self.shape, self.head, run_layers(self.shape, self.layers, x, cache, place))
        if keep:
            self.cache = cache
        return logits


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_logits_are_those_of_transformers_in_one_pass_and_step_by_step(name):
    shape = SHAPES[name]
    model, layers, head = reference(shape)
    tokens = torch.randint(shape.vocabulary, (3, 12), generator=torch.Generator().manual_seed(1))
    wanted = model(input_ids=tokens).logits
    assert wanted.std() > 0.5  # the logits say something
    whole = Reader(shape, layers, head, 3).feed(tokens)
    assert (whole - wanted).abs().max() < 1e-4
    reader = Reader(shape, layers, head, 3)
    pieces = [reader.feed(piece) for piece in tokens.split([5, 1, 4, 1, 1], 1)]
    assert (torch.cat(pieces, 1) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_every_node_of_a_tree_has_the_logits_of_its_own_chain(name):
    shape = SHAPES[name]
    _, layers, head = reference(shape)
    noise = torch.Generator().manual_seed(2)
    parents = tree_parents(9)
    context = torch.randint(shape.vocabulary, (2, 6), generator=noise)
    nodes = torch.randint(shape.vocabulary, (2, 10), generator=noise)
    reader = Reader(shape, layers, head, 2)
    reader.feed(context)
    tree = reader.feed(nodes, parents, keep=False)
    for node in range(10):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        chain = reader.feed(nodes[:, path], keep=False)
        assert (tree[:, node] - chain[:, -1]).abs().max() < 1e-4


@settings(max_examples=30)
@given(st.data())
def test_a_token_sees_its_ancestors_and_itself(data):
    size = data.draw(st.integers(1, 12))
    parents = [-1] + [data.draw(st.integers(-1, i - 1)) for i in range(1, size)]
    seen = ancestors(parents)
    for token in range(size):
        path, at = set(), token
        while at >= 0:
            path.add(at)
            at = parents[at]
        assert set(torch.nonzero(seen[token])[:, 0].tolist()) == path
        assert depths(parents)[token] == len(path) - 1


@pytest.mark.parametrize(("nodes", "branching"), [(1, 2), (7, 2), (12, 3), (5, 1)])
def test_a_tree_is_full_level_by_level(nodes, branching):
    parents = tree_parents(nodes, branching)
    assert len(parents) == nodes + 1
    assert parents[0] == -1
    children = np.bincount(parents[1:], minlength=nodes + 1)
    assert children.max() == min(branching, nodes)
    assert depths(parents) == sorted(depths(parents))
    if branching == 1:
        assert depths(parents) == list(range(nodes + 1))


def test_a_masked_row_reads_only_what_its_place_allows():
    """The additive mask against a loop over heads, tokens and slots; its rows are aligned for the kernels."""
    shape = SHAPES["tiny"]
    parents = tree_parents(4)
    place = place_tokens(shape, 3, parents, torch.float32, CPU)
    assert place.bias is not None
    seen = ancestors(parents)
    for group, token, slot in itertools.product(range(2), range(5), range(8)):
        allowed = slot < 3 or bool(seen[token, slot - 3])
        assert (place.bias[group * 5 + token, slot] == 0) == allowed
    assert place.bias.stride(0) % 8 == 0
    assert place.slots.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_leaving_the_causal_order_to_the_kernel_gives_the_masked_result(name):
    """The place that a GPU gets in 16 bits, here in 32 on a CPU."""
    from torch.nn.attention.bias import causal_lower_right

    shape = SHAPES[name]
    noise = torch.Generator().manual_seed(5)
    queries = torch.randn(2, shape.heads, 3, shape.head_dim, generator=noise)
    keys, values = torch.randn(2, 2, shape.kv_heads, 10, shape.head_dim, generator=noise)
    masked = place_tokens(shape, 7, [-1, 0, 1], torch.float32, CPU)
    kernel = Place(masked.slots, masked.cos, masked.sin, causal=causal_lower_right(3, 10))
    assert masked.bias is not None
    difference = attend(queries, keys, values, masked) - attend(queries, keys, values, kernel)
    assert difference.abs().max() < 1e-5


CELL = StepCell("tiny", "whole", "fp32", False, "chain", "verify", 2, 3, 5)


def test_steps_of_the_three_parts_do_what_their_names_say(monkeypatch, tmp_path):
    monkeypatch.setattr("calibration.timing.bench._CPU_CACHES", tmp_path)  # a cache of unknown size: fewest layers
    shape = SHAPES["tiny"]
    for part, layers in (("whole", 6), ("layer", 4), ("head", 0)):
        bench = Bench.build(shape, part, "fp32", CPU, 0)
        assert len(bench.layers) == layers
        assert (bench.head is None) == (part == "layer")
        step = bench.work(dataclasses.replace(CELL, part=part))
        assert step().shape == ((2, 3, 64) if part == "layer" else (2, 3))
        assert torch.equal(step(), step())  # a step leaves nothing behind that changes the next one
    prefill = dataclasses.replace(CELL, operation="prefill", context_tokens=0, new_tokens=7)
    assert Bench.build(shape, "whole", "fp32", CPU, 0).work(prefill)().shape == (2, 1)
    assert Bench.build(shape, "layer", "fp32", CPU, 0, layers=2).layers[0].out.weight.shape == (64, 64)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_activations_stay_finite_and_of_order_one(name, dtype):
    shape = SHAPES[name]
    bench = Bench.build(shape, "layer", dtype, CPU, 0, layers=shape.layers)
    out = bench.work(StepCell(name, "layer", dtype, False, "tree", "verify", 2, 8, 20, 7))().float()
    assert torch.isfinite(out).all()
    assert 0.5 < out.std() < 20


def scaled_mm_or_skip(device):
    fault = fp8_fault(device)
    if device.type == "cuda" and fault:
        pytest.skip(fault)
    eight = torch.ones(16, 16).to(torch.float8_e4m3fn).to(device)
    one = torch.tensor(1.0, device=device)
    try:
        torch._scaled_mm(eight, eight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as refusal:
        pytest.skip(f"torch._scaled_mm does not run on {device.type}: {str(refusal).splitlines()[0]}")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp8_linear_is_the_product_of_the_rounded_factors(device, bias):
    """Against float64 arithmetic on the same e4m3 numbers, and near the product of the unrounded ones."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    place = torch.device(device)
    scaled_mm_or_skip(place)
    noise = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 64, generator=noise) / 8
    shift = torch.randn(48, generator=noise).bfloat16() if bias else None
    x = torch.randn(2, 5, 64, generator=noise).bfloat16()
    x[0, 0, 0] = 1000.0  # clipped, not made NaN
    linear = Fp8Linear.quantise(weight.clone().to(place).bfloat16(), None if shift is None else shift.to(place))
    got = linear(x.to(place)).cpu().double()
    rounded_x = (x.float() / INPUT_SCALE).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).double() * INPUT_SCALE
    rounded_w = linear.weight.cpu().double() * linear.weight_scale.cpu().double()
    wanted = rounded_x @ rounded_w.T + (0 if shift is None else shift.double())
    assert torch.allclose(got, wanted, rtol=2**-7, atol=2e-2)  # the result is rounded to bf16
    assert (rounded_w - weight.double()).norm() / weight.norm() < 0.05
    exact = x[1].double() @ weight.double().T + (0 if shift is None else shift.double())
    assert (got[1] - exact).norm() / exact.norm() < 0.06


def test_a_step_in_fp8_is_near_the_same_step_on_dequantised_weights():
    scaled_mm_or_skip(CPU)
    shape = SHAPES["tiny"]
    bench = Bench.build(shape, "layer", "fp8", CPU, 0, layers=3)

    def plain(linear):
        return Dense((linear.weight.float() * linear.weight_scale).bfloat16(), linear.bias)

    def dequantised(layer):
        names = ("qkv", "out", "gate_up", "down")
        return dataclasses.replace(layer, **{name: plain(getattr(layer, name)) for name in names})

    dense = tuple(dequantised(layer) for layer in bench.layers)
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    place: Place = place_tokens(shape, 0, [-1, 0, 1, 2], torch.bfloat16, CPU)
    empty = torch.empty(3, 2, 2, shape.kv_heads, 4, shape.head_dim, dtype=torch.bfloat16)
    fp8, plain_out = (run_layers(shape, w, x, empty.clone(), place).float() for w in (bench.layers, dense))
    assert 0 < (fp8 - plain_out).norm() / plain_out.norm() < 0.1


def test_fp8_is_refused_where_there_are_no_units_for_it(monkeypatch):
    assert fp8_fault(CPU) == "fp8 needs a CUDA device of compute capability 8.9 or newer, got cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        fault = fp8_fault(torch.device("cuda"))
        assert (fault is not None) == refused
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8_fault(torch.device("cuda")) == "fp8 needs compute capability 8.9 or newer, got 8.0 (Old Card)"
