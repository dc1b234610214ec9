"""The error table of the roofline: every public table, by what was fitted and what was not, by size and context."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import H100_SXM
from simulator.pricing.roofline import roofline_step
from studies.roofline import coefficients, fit, operators, tables
from studies.roofline.fit import Choice, Roles

TOKEN_EDGES = (0, 8, 64, 256, 512, 1024, 4096)
BATCH_EDGES = (0, 16, 64, 128, 256, 1024)
CONTEXT_EDGES = (0, 100, 1000, 10_000)
MESSAGE_EDGES = (0, 2**20, 2**23, 2**27)
JOINED = 0.7
"""Requests that join in a step, above which half of all steps carry a prompt."""

LAYER = {"llama-2-7b": 4, "llama-2-70b": 4, "llama-3.1-8b": 7, "llama-3.1-70b": 7}
"""Matrices of a layer in the tables, the LM head not among them."""

CALLED = "called one by one: the host's 37 us a call is all that was measured, at most 8 x 96 cached tokens"
ELSEWHERE = "another model, engine and device: only the bandwidth is the GH200's (96 GB, 4.0 TB/s, assumed)"
UNSPLIT = (
    "a regressor's output; kernel that splits no context, at most 2 MB of keys and values: all latency, no bytes"
)
BLOCKS = "one block of threads a token: measured times rise in waves of some 264 tokens, the form is smooth"
CALLS = "below 1 MB the same message took 7 to 42 us: the host's calls, not the link"
PROMPTS = "over 0.7 requests join a step: the median step may carry a prompt, priced as plain decoding"


class Row(NamedTuple):
    """Errors on some cells: mean and worst absolute relative error, and the mean of predicted / measured - 1.

    ``role``: ``fitted`` (the coefficients saw them), ``held-out`` (they saw others of that model), ``unfitted`` (they
    saw nothing of that model, or of that table). ``by``: ``all``, or the bin.
    """

    table: str
    quantity: str
    model: str
    role: str
    by: str
    n: int
    mape: float
    worst: float
    bias: float
    note: str = ""


class Anchor(NamedTuple):
    """Seconds by the roofline, without host time, and by published constants."""

    what: str
    batch: int
    new_tokens: int
    context_tokens: int
    roofline_s: float
    published_s: float

    @property
    def ratio(self) -> float:
        """Roofline over published."""
        return self.roofline_s / self.published_s


def roofline_table(folder: Path) -> list[Row]:
    """Give the errors of the shipped coefficients on every cell of the public tables in `folder`."""
    return [
        row for rows in (_matrices, _pieces, _attention, _decode_attention, _reduces, _steps) for row in rows(folder)
    ]


def forms_table(folder: Path) -> list[Choice]:
    """Give how every form that was tried did, fitted anew to the public tables in `folder`."""
    return fit.compare(folder, coefficients.bare(coefficients.stored()))


def _predicted(part: str, roles: Roles) -> Iterator[tuple[str, pd.DataFrame]]:
    """Give (role, cells with their predicted seconds), those of another table as unfitted."""
    data = coefficients.stored()
    for name, cells in zip(("fitted", "held-out", "unfitted", "unfitted"), roles, strict=True):
        if len(cells):
            yield name, cells.assign(predicted=coefficients.predict(part, cells, data))


def _rows(cells: pd.DataFrame, quantity: str, role: str, bins: Mapping[str, Any], note: str = "") -> Iterator[Row]:
    """Give a row for every model, and one for every bin of it; `bins`: edges by the column they are of."""
    for model in dict.fromkeys(cells.model):
        mine = cells[cells.model == model]
        place = (str(mine.table.iloc[0]), quantity, str(model), role)
        yield Row(*place, "all", *_errors(mine), note)
        if role == "fitted":
            continue
        for column, edges in bins.items():
            values = mine[column].to_numpy(dtype=float)
            for low, high in itertools.pairwise(edges):
                inside = mine[(values > low) & (values <= high)]
                if 0 < len(inside) < len(mine):
                    yield Row(*place, f"{column.replace('_', ' ')} {low + 1} to {high}", *_errors(inside), note)


def _errors(cells: pd.DataFrame) -> tuple[int, float, float, float]:
    error = (cells.predicted / cells.seconds - 1).to_numpy(dtype=float)
    size = np.abs(error)
    return len(cells), fit.digits(size.mean(), 3), fit.digits(size.max(), 3), fit.digits(error.mean(), 3)


def _matrices(folder: Path) -> Iterator[Row]:
    for role, cells in _predicted("matrices", fit.matrix_roles(folder)):
        yield from _rows(cells, "a matrix", role, {"tokens": TOKEN_EDGES})
        yield from _rows(_layers(cells), "matrices of a layer", role, {"tokens": TOKEN_EDGES})


def _layers(cells: pd.DataFrame) -> pd.DataFrame:
    """Add up the matrices of a layer."""
    inner = cells[cells.operator != "lm_head"]
    keys = ["table", "model", "tensor_parallel", "tokens"]
    sums = inner.groupby(keys, as_index=False)[["seconds", "predicted"]].sum()
    whole = inner.groupby(keys)["seconds"].size().to_numpy() == np.array([LAYER[model] for model in sums.model])
    return pd.DataFrame(sums[whole])


def _pieces(folder: Path) -> Iterator[Row]:
    for role, cells in _predicted("elementwise", fit.elementwise_roles(folder)):
        for kind in sorted(set(cells.kind)):
            yield from _rows(cells[cells.kind == kind], kind, role, {}, BLOCKS if kind == "norm" else "")


def _attention(folder: Path) -> Iterator[Row]:
    for role, cells in _predicted("attention", fit.attention_roles(folder)):
        yield from _rows(cells, "attention of a prefill", role, {"tokens": TOKEN_EDGES})


def _decode_attention(folder: Path) -> Iterator[Row]:
    data = coefficients.stored()
    bins = {"batch": BATCH_EDGES, "context": CONTEXT_EDGES}
    cells = tables.decode_attention(folder)
    told = cells.assign(predicted=coefficients.predict("attention", cells, data))
    yield from _rows(told, "attention of a decode step", "unfitted", bins, UNSPLIT)
    x = fit.fit_form(operators.DECODE_LATENCY, cells[tables.in_fit(cells.batch)])
    latency = cells.assign(predicted=operators.DECODE_LATENCY.seconds(cells, x))[~tables.in_fit(cells.batch)]
    note = f"by {operators.DECODE_LATENCY.name}: not what the simulator has, such kernels run in no engine"
    yield from _rows(latency, "attention of a decode step", "held-out", {}, note)
    eager = tables.h800_attention(folder)
    for operator in sorted(set(eager.operator)):
        mine = eager[eager.operator == operator]
        told = mine.assign(predicted=coefficients.predict("attention", mine, data))
        yield from _rows(told, operator, "unfitted", {}, CALLED)


def _reduces(folder: Path) -> Iterator[Row]:
    for role, cells in _predicted("all_reduce", fit.all_reduce_roles(folder)):
        named = cells.assign(model=[f"{size} devices" for size in cells.tensor_parallel])
        yield from _rows(named, "all-reduce, called one by one", role, {"message": MESSAGE_EDGES}, CALLS)


def _steps(folder: Path) -> Iterator[Row]:
    bins = {"batch": BATCH_EDGES, "context_each": CONTEXT_EDGES}
    for role, cells in _predicted("decode_step", fit.served_roles(folder)):
        plain = cells.joining < JOINED
        for size in sorted(set(cells.tensor_parallel)):
            mine = cells.tensor_parallel == size
            quantity = "decode step" if size == 1 else f"decode step, {size} devices"
            yield from _rows(cells[mine & plain], quantity, role, bins)
            yield from _rows(cells[mine & ~plain], quantity + ", prompts joining", role, {}, PROMPTS)
        if role == "unfitted":
            together = cells.assign(model="all unfitted")
            yield from _rows(together, "decode step, all", role, bins)
    yield from _rows(_apertus(folder), "decode step, 4 devices", "unfitted", {}, ELSEWHERE)


def _apertus(folder: Path) -> pd.DataFrame:
    """Price the plain decode steps of Apertus-70B, whose layers have as many weights as those of Llama-3.1-70B."""
    cells = tables.apertus(folder)
    shape = replace(get_shape("llama-3.1-70b"), vocabulary=131_072)
    gh200 = replace(H100_SXM, name="gh200", title="NVIDIA GH200 96 GB", bandwidth=4.0e12)
    step = roofline_step(shape, gh200, tensor_parallel=4)
    return cells.assign(predicted=step.step_seconds(cells.batch, cells.batch, cells.batch * tables.APERTUS_CONTEXT))


def anchors() -> list[Anchor]:
    """Set steps beside the constants published with SpecDecode-Bench for Llama-3.1-8B and EAGLE on an H100.

    Verify: 5.886 ms + 21.0 us a batched token + 0.0393 us a cached token, linear where a roofline bends. A round of
    EAGLE's drafts, here of three: 2.135 ms + 0.84 us a drafted + 0.0024 us a cached token. Their 1.207 ms of the host
    a step is left out on both sides.
    """
    step = roofline_step("llama-3.1-8b", "h100-sxm", host_overhead_s=0.0, host_per_sequence_s=0.0)
    head = roofline_step("llama-3.1-8b", "h100-sxm", layers=1, operation="draft")
    found = []
    for batch in (1, 16, 64, 128):
        for drafted in (0, 3):
            new, context = batch * (drafted + 1), batch * 500
            published = 5.886e-3 + 21.0e-6 * new + 0.0393e-6 * context
            found.append(
                Anchor("verify", batch, new, context, float(step.step_seconds(batch, new, context)), published)
            )
        drafting = 3 * float(head.step_seconds(batch, batch, context))
        published = 2.135e-3 + 0.84e-6 * 3 * batch + 0.0024e-6 * context
        found.append(Anchor("draft of three", batch, 3 * batch, context, drafting, published))
    return found
