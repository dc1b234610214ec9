"""What only a CUDA device can show of our engine: its kernels, 16-bit logits, clocks that wait for the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from replayed import GREEDY
from tiny import random_prompts, tiny_verifier

from calibration.drafters import build_drafter, parse_drafter
from calibration.engines.drive import EngineRequest
from calibration.engines.own.cache import make_cache
from calibration.engines.own.decoder import Decoder, Span
from calibration.engines.own.drafting import Stopwatch
from calibration.engines.own.engine import OwnEngine
from calibration.models.lane import generate
from calibration.models.sampling import generator_for
from calibration.timing import SHAPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda")
KINDS = ("paged", "padded")


def on_device(dtype):
    verifier = tiny_verifier(1, dtype=dtype)
    return dataclasses.replace(verifier, model=verifier.model.to(CUDA))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize(("name", "gamma"), [(None, 0), ("prompt-lookup", 4), ("exit-2", 3), ("skip-1-2", 2)])
def test_the_text_is_that_of_plain_generation(kv, name, gamma, dtype):
    verifier = on_device(dtype)
    prompts = random_prompts(11, 6)
    outputs = generate(verifier.model, prompts, GREEDY, 20, frozenset(), generator_for(CUDA, 0))
    options = {"drafter": build_drafter(parse_drafter(name), verifier), "draft_tokens": gamma} if name else {}
    engine = OwnEngine(verifier, max_num_seqs=3, kv=kv, **options)
    assert engine.device.kind == "cuda"
    for number, prompt in enumerate(prompts):
        engine.submit(EngineRequest(number, prompt, 20))
    texts = {number: [] for number in range(6)}
    while engine.busy:
        step = engine.step()
        for number, tokens in step.received.items():
            texts[number].extend(tokens)
        if name != "prompt-lookup":
            assert all(draft.cpu_s == draft.wall_s > 0 for draft in step.drafts)
    assert [tuple(text) for text in texts.values()] == [output.ids for output in outputs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_logits_of_ragged_steps_are_near_those_of_transformers(kind, dtype):
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[CUDA]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(dataclasses.replace(SHAPES["smollm2-135m"], layers=3).config())
    model = model.eval().requires_grad_(False).to(CUDA)
    rows = random_prompts(2, 3, 60, 60, 40_000)
    wanted = [model(torch.tensor([row], device=CUDA)).logits[0] for row in rows]
    decoder = Decoder(model.to(dtype), "model", 64)
    cache = make_cache(kind, decoder.cache_shape, rows=3, capacity=64, block_size=16)
    held = [37, 20, 50]
    for row in range(3):
        cache.open(row)
        decoder.logits([[Span(row, rows[row][: held[row]], 0)]], cache)
    counts = (5, 1, 3)
    spans = [Span(row, rows[row][held[row] : held[row] + n], n) for row, n in enumerate(counts)]
    got = decoder.logits([spans], cache)
    want = torch.cat([wanted[row][held[row] : held[row] + n] for row, n in enumerate(counts)])
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_a_stopwatch_waits_for_the_device():
    x = torch.randn(8192, 8192, device=CUDA)
    watch = Stopwatch(CUDA)
    for _ in range(20):
        x = x @ x / 8192
    with_work = watch.read()
    assert with_work[0] == with_work[1]
    idle = watch.read()
    assert idle[1] < with_work[1] / 10
