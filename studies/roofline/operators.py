"""The forms that a kernel's time could have, to be chosen from by their errors on what they were not fitted to.

A form gives seconds from a table of cells and its coefficients: launches in us, shares of the H100's peaks. What the
simulator prices with (`simulator.hardware.work`) is the form marked ``chosen``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import H100_SXM
from simulator.hardware.work import Kernel, Mover, Share, all_reduce_s, attention_s, elementwise_s, matmul_s

FLOPS, BANDWIDTH = H100_SXM.flops["bf16"], H100_SXM.bandwidth
LINK = H100_SXM.link or 0.0
MULTIPROCESSORS = 132
"""Of an H100 SXM, for the forms that count waves of tiles."""
US = 1e-6

Seconds = Callable[[pd.DataFrame, Any], Any]


@dataclass(frozen=True)
class Form:
    """One form: its name, the seconds it gives, and where the fit of its coefficients starts."""

    name: str
    seconds: Seconds
    start: tuple[float, ...]
    chosen: bool = False


def _bounds(cells: pd.DataFrame) -> tuple[Any, Any]:
    """Give the seconds of compute and of memory of matrices at peak."""
    compute = 2 * cells.tokens * cells.inner * cells.outer / FLOPS
    moved = cells.inner * cells.outer + cells.tokens * (cells.inner + cells.outer)
    return compute, 2 * moved / BANDWIDTH


def _norm(power: float) -> Seconds:
    def seconds(cells: pd.DataFrame, x: Any) -> Any:
        compute, memory = _bounds(cells)
        return x[0] * US + ((compute / x[1]) ** power + (memory / x[2]) ** power) ** (1 / power)

    return seconds


def _no_launch(cells: pd.DataFrame, x: Any) -> Any:
    compute, memory = _bounds(cells)
    return np.maximum(compute / x[0], memory / x[1])


def _largest(cells: pd.DataFrame, x: Any) -> Any:
    return x[0] * US + _no_launch(cells, x[1:])


def _free_norm(cells: pd.DataFrame, x: Any) -> Any:
    return _norm(x[3])(cells, x)


def _saturating(cells: pd.DataFrame, x: Any) -> Any:
    """Matrices of few tokens compute at a smaller share: share x tokens / (tokens + x[3])."""
    compute, memory = _bounds(cells)
    return x[0] * US + ((compute * (1 + x[3] / cells.tokens) / x[1]) ** 4 + (memory / x[2]) ** 4) ** 0.25


def _tiles(cells: pd.DataFrame, x: Any) -> Any:
    """Tiles of 128 x 128 in whole waves over all multiprocessors."""
    _, memory = _bounds(cells)
    waves = np.ceil(np.ceil(cells.tokens / 128) * np.ceil(cells.outer / 128) / MULTIPROCESSORS)
    compute = 2 * waves * MULTIPROCESSORS * 128 * 128 * cells.inner / FLOPS
    return x[0] * US + ((compute / x[1]) ** 4 + (memory / x[2]) ** 4) ** 0.25


def _matmul(cells: pd.DataFrame, x: Any) -> Any:
    kernel = Kernel(x[0] * US, x[1], x[2])
    return matmul_s(kernel, cells.tokens, cells.inner, cells.outer, FLOPS, BANDWIDTH, 2.0)


MATMUL = (
    Form("max(compute, memory)", _no_launch, (0.7, 0.8)),
    Form("launch + max(compute, memory)", _largest, (6, 0.7, 0.8)),
    Form("launch + compute + memory", _norm(1), (6, 0.7, 0.8)),
    Form("launch + (compute^4 + memory^4)^(1/4)", _matmul, (6, 0.7, 0.8), chosen=True),
    Form("the same with a fitted exponent", _free_norm, (6, 0.7, 0.8, 3)),
    Form("the same with a share that saturates in tokens", _saturating, (6, 0.7, 0.8, 10)),
    Form("the same in whole waves of 128 x 128 tiles", _tiles, (6, 0.7, 0.8)),
)


def attention_bounds(cells: pd.DataFrame) -> pd.DataFrame:
    """Add ``flops_s``, ``kv_s`` and ``new_s``, seconds at peak of an attention kernel, and its ``heads``."""
    keys = list(zip(cells.model, cells.tensor_parallel, strict=True))
    shares = {key: Share.of(get_shape(key[0]), key[1]) for key in set(keys)}
    query = np.array([shares[key].query_width for key in keys])
    kv = np.array([shares[key].kv_width for key in keys])
    head_dim = np.array([get_shape(model).head_dim for model in cells.model])
    pairs = cells.tokens * (cells.context + (cells.tokens + cells.batch) / 2) / cells.batch
    return cells.assign(
        flops_s=4 * query * pairs / FLOPS,
        kv_s=4 * kv * (cells.context + cells.tokens) / BANDWIDTH,
        new_s=4 * (query + kv) * cells.tokens / BANDWIDTH,
        heads=query / head_dim,
    )


def _block_waves(cells: pd.DataFrame, x: Any) -> Any:
    """Blocks of 128 queries of a head in whole waves, each as long as the context that the last one sees."""
    waves = np.ceil(np.ceil(cells.tokens / 128) * cells.heads / MULTIPROCESSORS)
    return x[0] * US + x[1] * 1e-9 * waves * cells.tokens


def _attention(cells: pd.DataFrame, x: Any) -> Any:
    return attention_s(Kernel(x[0] * US, x[1], 1.0), cells.flops_s, 0.0)


ATTENTION = (
    Form("launch + compute", lambda c, x: x[0] * US + c.flops_s / x[1], (9, 0.3)),
    Form("max(launch, compute)", lambda c, x: np.maximum(x[0] * US, c.flops_s / x[1]), (9, 0.3)),
    Form("launch + new tokens + compute", lambda c, x: x[0] * US + c.new_s / x[2] + c.flops_s / x[1], (9, 0.3, 0.3)),
    Form("launch + whole waves of 128 queries", _block_waves, (8, 20)),
    Form("(sqrt(launch) + sqrt(compute))^2", _attention, (9, 0.3), chosen=True),
)
"""Of prefill attention."""

DECODE_LATENCY = Form(
    "launch + per cached token of a sequence + per sequence",
    lambda c, x: x[0] * US + x[1] * 1e-9 * c.context / c.batch + x[2] * 1e-9 * c.batch,
    (4, 25, 300),
)
"""What LLMServingSim's decode attention follows: no bytes at all."""


def _moved(cells: pd.DataFrame) -> Any:
    return 2 * cells.numbers / BANDWIDTH


ELEMENTWISE = (
    Form("max(launch, memory)", lambda c, x: np.maximum(x[0] * US, _moved(c) / x[1]), (4, 0.4)),
    Form("launch + memory", lambda c, x: elementwise_s(Mover(x[0] * US, x[1]), _moved(c)), (3, 0.4), chosen=True),
    Form("sqrt(launch^2 + memory^2)", lambda c, x: np.hypot(x[0] * US, _moved(c) / x[1]), (3, 0.4)),
)
"""Fitted kind by kind."""


def _ring(cells: pd.DataFrame) -> Any:
    return all_reduce_s(0.0, 1.0, cells.message, cells.tensor_parallel, LINK)


def _eager(cells: pd.DataFrame, x: Any) -> Any:
    share = all_reduce_s(x[2] * US, x[1], cells.message, cells.tensor_parallel, LINK)
    return np.maximum(x[0] * US, share)


ALL_REDUCE = (
    Form("max(launch, ring)", lambda c, x: np.maximum(x[0] * US, _ring(c) / x[1]), (40, 0.6)),
    Form("launch + ring", lambda c, x: x[0] * US + _ring(c) / x[1], (30, 0.8)),
    Form(
        "launch + latency x (devices - 1) + ring",
        lambda c, x: x[0] * US + x[2] * US * (c.tensor_parallel - 1) + _ring(c) / x[1],
        (30, 0.8, 1),
    ),
    Form("max(call, latency + ring)", _eager, (40, 0.7, 20), chosen=True),
)
"""Of all-reduces called one by one, as they were measured."""
