"""What only a CUDA device can show of the timed steps: graphs, fp8, 16-bit attention kernels, energy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from calibration.models.clock import energy_counter_mj
from calibration.models.fp8 import fp8_fault
from calibration.timing import SHAPES, StepCell, parse_timing_job, time_shapes
from calibration.timing.bench import Bench, Place, attend, capture, free_memory_bytes, place_tokens
from calibration.timing.gridfile import cells_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")
STEPS = [
    StepCell("smollm2-135m", "whole", "bf16", False, "chain", "verify", 3, 1, 100),
    StepCell("smollm2-135m", "whole", "bf16", False, "chain", "verify", 3, 5, 100),
    StepCell("smollm2-135m", "whole", "bf16", False, "tree", "verify", 3, 8, 101, 7),
    StepCell("smollm2-135m", "whole", "bf16", False, "chain", "prefill", 2, 200, 0),
]


@pytest.mark.parametrize("cell", STEPS, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_a_graph_gives_what_the_eager_step_gives(cell, dtype):
    if dtype == "fp8" and (fault := fp8_fault(CUDA)):
        pytest.skip(fault)
    cell = dataclasses.replace(cell, dtype=dtype, part="layer")
    bench = Bench.build(SHAPES[cell.shape], "layer", dtype, CUDA, 0, layers=3)
    work = bench.work(cell)
    wanted = work().float()
    assert torch.isfinite(wanted).all()
    held = []
    replay = capture(lambda: held.append(work()), CUDA)
    held[-1].zero_()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(held[-1].float(), wanted)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "qwen2.5-7b", "smollm2-135m"])
@pytest.mark.parametrize("new", [2, 5, 64])
def test_the_kernels_own_causal_order_is_the_masked_one(name, new):
    shape = SHAPES[name]
    queries = torch.randn(2, shape.heads, new, shape.head_dim, device=CUDA, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 2, shape.kv_heads, 300 + new, shape.head_dim, device=CUDA, dtype=torch.bfloat16)
    chain = list(range(-1, new - 1))
    kernel = place_tokens(shape, 300, chain, torch.bfloat16, CUDA)
    assert kernel.causal is not None
    exact = place_tokens(shape, 300, chain, torch.float32, CUDA)
    assert exact.bias is not None
    wanted = attend(queries.float(), keys.float(), values.float(), exact)
    masked = Place(kernel.slots, kernel.cos, kernel.sin, bias=exact.bias.bfloat16())
    for place in (kernel, masked):
        assert (attend(queries, keys, values, place).float() - wanted).abs().max() < 0.02


def test_a_small_job_runs_with_graphs_and_gives_its_memory_back(tmp_path):
    before = free_memory_bytes(CUDA)
    table = {
        "shapes": ["smollm2-135m"],
        "dtypes": ["bf16"] if fp8_fault(CUDA) else ["bf16", "fp8"],
        "graphs": [True, False],
        "batches": [1, 4],
        "new_tokens": [1, 5],
        "contexts": [128],
        "trees": [15],
        "prefill_batches": [1],
        "prefill_tokens": [128],
    }
    job = parse_timing_job({"device": "cuda", "grid": [table, {**table, "contexts": [32_768], "batches": [512]}]})
    grid = time_shapes(job, tmp_path / "out")
    assert grid.complete
    assert set(cells_of(grid.steps)) | set(cells_of(grid.skipped)) == set(job.cells())
    assert cells_of(grid.steps)
    after = free_memory_bytes(CUDA)
    assert before is not None
    assert after is not None
    assert before - after < 2**30


def test_an_allocation_that_fails_leaves_the_device_usable(tmp_path, monkeypatch):
    """The estimate is switched off: a cache of 512 x 32,768 tokens must be refused by the device itself."""
    import calibration.timing.run as run

    monkeypatch.setattr(run, "too_large", lambda *_: None)
    table = {"shapes": ["llama-2-7b"], "dtypes": ["bf16"], "graphs": [True, False], "parts": ["layer"]}
    sizes = {"batches": [512, 1], "new_tokens": [1], "contexts": [32_768, 128]}
    job = parse_timing_job({"device": "cuda", "grid": [table | sizes]})
    grid = time_shapes(job, tmp_path / "out")
    assert {(c.batch, c.context_tokens) for c in cells_of(grid.skipped)} == {(512, 32_768)}
    assert len(cells_of(grid.steps)) == 6


def test_energy_rises_where_the_device_counts_it():
    counter = energy_counter_mj(CUDA)
    if counter is None:
        pytest.skip("NVML reports no energy here")
    begin = counter()
    x = torch.randn(4096, 4096, device=CUDA)
    for _ in range(200):
        x = x @ x / 64
    torch.cuda.synchronize()
    assert counter() >= begin
