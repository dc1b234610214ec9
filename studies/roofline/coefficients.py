"""The file of coefficients that the simulator ships, made anew from the public data.

    python -m studies.roofline.coefficients FOLDER

writes `simulator/hardware/efficiencies/roofline.json`; FOLDER is that of the public data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import H100_SXM
from simulator.hardware.work import COEFFICIENTS, Efficiencies, attention_s, elementwise_s, matrices
from studies.roofline import fit, operators, tables
from studies.roofline.operators import US

BANDS = "sizes in even quarter octaves"


def coefficients(folder: Path) -> dict[str, Any]:
    """Fit every chosen form to its part of the public data in `folder`; give the content of the file."""
    data: dict[str, Any] = {
        "matmul": _matmul(fit.matrix_roles(folder).fitted),
        "attention": _attention(fit.attention_roles(folder).fitted),
        "elementwise": _elementwise(fit.elementwise_roles(folder).fitted),
        "all_reduce": _all_reduce(fit.all_reduce_roles(folder).fitted),
        "host": {"coefficients": {"step_s": 0.0, "per_logit_s": 0.0}},
        "tested": _tested(folder),
        "errors": {},
    }
    data["attention"]["coefficients"]["bytes"] = data["matmul"]["coefficients"]["bytes"]
    data["host"] = _host(fit.served_roles(folder).fitted, Efficiencies.from_json(data))
    data["errors"] = _errors(folder, data)
    return data


def bare(data: Mapping[str, Any]) -> Efficiencies:
    """Give the coefficients without any host time."""
    return Efficiencies.from_json({**data, "host": {"coefficients": {"step_s": 0.0, "per_logit_s": 0.0}}})


def _part(form: str, source: str, cells: pd.DataFrame, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"form": form, "source": source, "cells": len(cells), "coefficients": dict(found)}


def _us(value: float) -> float:
    return fit.digits(value * US)


def _matmul(cells: pd.DataFrame) -> dict[str, Any]:
    form = fit.chosen(operators.MATMUL)
    launch, flops, moved = fit.fit_form(form, cells)
    source = f"LLMServingSim, Llama-3.1-8B on one H100, {BANDS}"
    return _part(form.name, source, cells, {"launch_s": _us(launch), "flops": flops, "bytes": moved})


def _attention(cells: pd.DataFrame) -> dict[str, Any]:
    form = fit.chosen(operators.ATTENTION)
    launch, flops = fit.fit_form(form, cells)
    source = f"LLMServingSim, prefills of Llama-3.1-8B on one H100, {BANDS}; bytes: the share of matrices is assumed"
    return _part(f"max({form.name}, launch + memory)", source, cells, {"launch_s": _us(launch), "flops": flops})


def _elementwise(cells: pd.DataFrame) -> dict[str, Any]:
    form = fit.chosen(operators.ELEMENTWISE)
    found = {}
    for kind, part in cells.groupby("kind"):
        launch, moved = fit.fit_form(form, part)
        found[str(kind)] = {"launch_s": _us(launch), "bytes": moved}
    return _part(form.name, f"Vidur, Llama-2-7B on 1 to 8 H100s, {BANDS}", cells, found)


def _all_reduce(cells: pd.DataFrame) -> dict[str, Any]:
    form = fit.chosen(operators.ALL_REDUCE)
    call, link, latency = fit.fit_form(form, cells)
    source = (
        f"Vidur, 2 and 4 H100s with NVLink, {BANDS}; called one by one. In a step, from a captured graph, an "
        "all-reduce takes the launch of a matrix instead of call and latency: an assumption that ML.ENERGY's rows of "
        "2 and 4 devices agree with"
    )
    return _part(form.name, source, cells, {"link": link, "call_s": _us(call), "latency_s": _us(latency)})


def _host(cells: pd.DataFrame, without: Efficiencies) -> dict[str, Any]:
    form = fit.chosen(fit.HOSTS)
    step_s, logit_s = fit.fit_host(form, cells, without)
    batches = ", ".join(str(batch) for batch in fit.FITTED_BATCHES)
    source = f"ML.ENERGY, vLLM serving Llama-3.1-8B on one H100, median ITL at batches of {batches}"
    return _part(form.name, source, cells, {"step_s": float(step_s), "per_logit_s": float(logit_s)})


def _tested(folder: Path) -> dict[str, Any]:
    """Give how far the tables go: tokens of matrices, batches and contexts of steps, widths of either."""
    cells, runs = tables.matrices(folder), tables.served(folder)
    inner, outer = cells.inner.tolist(), cells.outer.tolist()
    for model, size in set(zip(runs.model, runs.tensor_parallel, strict=True)):
        inner += [width for _, width, _ in matrices(get_shape(model), int(size))]
        outer += [width for _, _, width in matrices(get_shape(model), int(size))]
    return {
        "new_tokens": int(cells.tokens.max()),
        "batch": int(runs.batch.max()),
        "context_tokens": int(fit.digits(runs.context_each.max(), 2)),
        "inner": [int(min(inner)), int(max(inner))],
        "outer": [int(min(outer)), int(max(outer))],
        "devices": [H100_SXM.name],
        "dtypes": ["bf16", "fp16"],
        "tensor_parallel": sorted({int(size) for size in runs.tensor_parallel}),
    }


def _errors(folder: Path, data: Mapping[str, Any]) -> dict[str, float]:
    """Give the mean absolute relative error of every part on what it was not fitted to."""
    found = {}
    for part, roles in (
        ("matrices", fit.matrix_roles(folder)),
        ("attention", fit.attention_roles(folder)),
        ("elementwise", fit.elementwise_roles(folder)),
        ("all_reduce", fit.all_reduce_roles(folder)),
        ("decode_step", fit.served_roles(folder)),
    ):
        for role in ("held_out", "unfitted", "other"):
            cells = getattr(roles, role)
            if len(cells):
                name = "other_table" if role == "other" else role
                found[f"{part}_{name}"] = fit.digits(fit.mean_error(predict(part, cells, data), cells), 3)
    return found


def predict(part: str, cells: pd.DataFrame, data: Mapping[str, Any]) -> Any:
    """Give the seconds of the cells of a `part` under the coefficients in `data`, by the simulator's own formulas."""
    known = Efficiencies.from_json(data)
    if part == "matrices":
        kernel = known.matmul
        x = (kernel.launch_s / US, kernel.flops, kernel.bytes)
        return fit.chosen(operators.MATMUL).seconds(cells, x)
    if part == "attention":
        bounds = operators.attention_bounds(cells)
        return attention_s(known.attention, bounds.flops_s, bounds.kv_s)
    if part == "elementwise":
        moved = 2 * cells.numbers / operators.BANDWIDTH
        found = [elementwise_s(known.elementwise[kind], value) for kind, value in zip(cells.kind, moved, strict=True)]
        return np.array(found)
    if part == "all_reduce":
        own = data["all_reduce"]["coefficients"]
        x = (own["call_s"] / US, own["link"], own["latency_s"] / US)
        return fit.chosen(operators.ALL_REDUCE).seconds(cells, x)
    return fit.predict_served(cells, known)


def stored() -> dict[str, Any]:
    """Give the content of the file that the package ships."""
    data: dict[str, Any] = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    return data


if __name__ == "__main__":
    COEFFICIENTS.write_text(json.dumps(coefficients(Path(sys.argv[1])), indent=2) + "\n", encoding="utf-8")
