"""The catalogue of shapes: published totals, transformers' own count, and what a step of one needs of memory."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calibration.common.errors import CalibrationError
from calibration.timing import SHAPES, StepCell, get_shape
from calibration.timing.bench import Bench
from calibration.timing.gridfile import timed_layers
from calibration.timing.run import USABLE, cache_bytes, step_bytes, too_large, weight_bytes

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}
"""Totals that the published weight files state, tied tensors once."""


def test_parameters_are_the_published_totals():
    assert {name: shape.parameters for name, shape in SHAPES.items() if not name.startswith("tiny")} == PUBLISHED


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_counts_the_same_and_describes_it_the_same(name):
    from transformers import AutoModelForCausalLM

    from calibration.models.load import describe

    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    found = describe(name, model)
    assert found == shape.info(dtype=found.dtype)
    assert found.parameters == shape.parameters


def test_an_unknown_shape_is_refused_with_a_hint():
    with pytest.raises(CalibrationError, match=r"^shape 'llama-3-7b': not known; did you mean 'llama-3-70b'\?$"):
        get_shape("llama-3-7b")
    assert get_shape("llama-3-8b").info("verifier", "bfloat16").name == "verifier"


CELL = StepCell("tiny-qwen", "whole", "bf16", False, "chain", "verify", 3, 4, 20)


def tensor_bytes(thing):
    """Bytes of all distinct tensors in nested dataclasses and tuples."""
    found = {}

    def walk(value):
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, tuple):
            for item in value:
                walk(item)
        elif dataclasses.is_dataclass(value):
            for entry in dataclasses.fields(value):
                walk(getattr(value, entry.name))

    walk(thing)
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("part", ["whole", "layer", "head"])
@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_weights_take_the_bytes_that_were_foreseen(name, part, dtype):
    shape = SHAPES[name]
    cell = dataclasses.replace(CELL, shape=name, part=part, dtype=dtype)
    bench = Bench.build(shape, part, dtype, torch.device("cpu"), 0)
    scales = 8 * 4 * len(bench.layers) if dtype == "fp8" else 0  # two fp32 scalars a matrix
    assert tensor_bytes((bench.layers, bench.head)) == weight_bytes(shape, cell, len(bench.layers)) + scales


def test_the_kv_cache_of_known_models():
    """Llama-2-7B in 16 bits: 512 KiB a token; Llama-3-8B, with a quarter of the KV heads: 128 KiB."""
    step = StepCell("", "whole", "bf16", True, "chain", "verify", 2, 1, 1023)
    for name, per_token in (("llama-2-7b", 512 * 1024), ("llama-3-8b", 128 * 1024)):
        assert cache_bytes(SHAPES[name], step, SHAPES[name].layers) == 2 * 1024 * per_token


def test_a_70b_fits_an_80_gb_card_layer_by_layer_only():
    shape, card = SHAPES["llama-3-70b"], 79 * 2**30
    step = StepCell("llama-3-70b", "whole", "bf16", True, "chain", "verify", 1, 5, 1024)
    reason = too_large(shape, step, shape.layers, card)
    assert reason is not None
    assert reason.startswith("memory: needs 131.42 GiB of weights + 0.31 of KV cache + 0.0")
    assert reason.endswith("to work, 79.00 GiB are free")
    layer = dataclasses.replace(step, part="layer")
    assert too_large(shape, layer, 4, card) is None
    assert too_large(shape, step, shape.layers, None) is None
    exactly = step_bytes(shape, layer, 4)
    assert too_large(shape, layer, 4, int(exactly / USABLE) + 1) is None
    assert too_large(shape, layer, 4, int(exactly / USABLE) - 1) is not None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, as operations make them and drop them."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage.data_ptr()] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.data_ptr())
        return out

    def free(self, key):
        self.live -= self.known.pop(key)


STEPS = {
    "chain": StepCell("tiny", "whole", "fp32", False, "chain", "verify", 16, 9, 200),
    "tree": StepCell("tiny", "whole", "fp32", False, "tree", "verify", 16, 9, 200, 8),
    "prefill": StepCell("tiny", "whole", "fp32", False, "chain", "prefill", 2, 200, 0),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("part", ["whole", "layer", "head"])
def test_what_a_step_allocates_stays_below_what_was_foreseen(part, step):
    """The largest sum of live tensors while a step is made and run, weights left out, against the estimate."""
    shape = SHAPES["tiny"]
    cell = dataclasses.replace(STEPS[step], part=part)
    bench = Bench.build(shape, part, "fp32", torch.device("cpu"), 0)
    layers = len(bench.layers)
    with LiveBytes() as meter:
        bench.work(cell)()
    foreseen = step_bytes(shape, cell, layers) - weight_bytes(shape, cell, layers)
    assert 0.5 * foreseen < meter.peak <= foreseen


@pytest.mark.parametrize(
    ("part", "cache", "layers"), [("whole", 0, 6), ("head", 0, 0), ("layer", 0, 4), ("layer", 10**9, 6)]
)
def test_a_layer_step_runs_enough_layers_to_leave_the_cache(part, cache, layers):
    assert timed_layers(SHAPES["tiny"], part, "fp32", cache) == layers


def test_few_layers_of_a_large_shape_and_many_of_a_small_one():
    cache = 50 * 2**20
    assert timed_layers(SHAPES["llama-3-70b"], "layer", "bf16", cache) == 4
    assert timed_layers(SHAPES["qwen2.5-0.5b"], "layer", "bf16", cache) == 8  # 30 MB each, 4 x 52 MB wanted
    assert timed_layers(SHAPES["qwen2.5-0.5b"], "layer", "fp8", cache) == 15
    assert timed_layers(SHAPES["smollm2-135m"], "layer", "bf16", cache) == 30
