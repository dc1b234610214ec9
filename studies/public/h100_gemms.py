"""Steps of Llama-3.1-8B on an H100, put together from a published table of layer times.

LLMServingSim (casys-kaist, MIT licence) publishes the latency of every layer of the model by tokens, measured alone
on an H100. A step is the sum over 32 blocks of the matrix multiplications (queries, keys, values, output, gate, up,
down) and the LM head, as vLLM runs them inside a captured graph. Left out are the layers that the table times as
separate kernels and a compiled engine fuses: norms, rotary embedding, activation. Attention is a stated price for
every cached token.

At one token the sum is 5.90 ms; the constants published with SpecDecode-Bench, fitted by their authors to vLLM
itself, say 5.886 + 0.021 ms. Beyond that they part: the sum stays flat up to 128 tokens and reaches 7.4 ms at 256,
where the published straight line is at 11.3 ms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from calibration.common.arrays import Floats, Ints
from calibration.importers.rounds import read_columns
from calibration.traces import make_table

BLOCKS = 32
IN_BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONCE = ("lm_head",)
SIZES = (1, 2, 4, *range(8, 128, 8), *range(128, 513, 16), 640, 768, 1024, 1280, 1536, 1792, 2048)
"""Tokens of a step that are taken from the table: vLLM pads to such sizes up to 512; prefill needs the rest."""
_CONTEXT = 8192
"""Cached tokens a sequence that the price of attention is stated at; it is linear."""


def gemm_seconds(file: Path) -> tuple[Ints, Floats]:
    """Give (tokens, seconds) of the matrix multiplications of a whole step, at every size in the table."""
    columns = read_columns(file, {"layer_name": "text", "input": "count", "latency(ns)": "seconds"})
    largest = int(columns["input"].max())
    total = np.zeros(largest + 1)
    for names, times in ((IN_BLOCK, BLOCKS), (ONCE, 1)):
        for name in names:
            mine = columns["layer_name"] == name
            total[columns["input"][mine]] += times * columns["latency(ns)"][mine] / 1e9
    tokens = np.flatnonzero(total)
    return tokens, total[tokens]


def step_timings(file: Path, verifier: str, per_context_token_s: float) -> pa.Table:
    """Give verify and prefill steps of `verifier` as the timings of a TraceSet.

    Seconds of the multiplications are measured ones; `per_context_token_s` is stated and added.
    """
    tokens, seconds = gemm_seconds(file)
    known = dict(zip(tokens.tolist(), seconds.tolist(), strict=True))
    sizes = [size for size in SIZES if size in known]
    rows = [
        (operation, size, context, known[size] + per_context_token_s * size * context)
        for operation in ("verify", "prefill")
        for size in sizes
        for context in (0, _CONTEXT)
    ]
    operations, batch, context, step_s = zip(*rows, strict=True)
    return make_table(
        "timings",
        {
            "model": [verifier] * len(rows),
            "operation": operations,
            "batch": batch,
            "new_tokens": [1] * len(rows),
            "context_tokens": context,
            "repeat": [0] * len(rows),
            "seconds": step_s,
        },
    )
