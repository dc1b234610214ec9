"""Whole steps out of a timing grid: measured where the model fitted, else composed of layers and head."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import pyarrow as pa

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.timing.gridfile import CELL, TORCH_NAMES, StepGrid, grid_schema
from calibration.traces.validate import make_table

_KEY = [column.name for column in CELL]
_HEAD_KEY = ["shape", "dtype", "graph", "operation", "batch", "new_tokens", "repeat"]

Role = Literal["verifier", "drafter"]


def composed(grid: StepGrid) -> pa.Table:
    """Give whole steps composed of parts, as rows of part ``composed``: L / l * (step of l layers) + head.

    L is the shape's number of layers. Repeats are paired in order; a cell needs both its layers and its head. An
    approximation: what a step costs once (launching it, reading the clock) is counted L / l + 1 times;
    `composing_errors` measures what that comes to where the whole was timed as well.
    """
    steps = _frame(grid)
    layer, head = steps[steps["part"] == "layer"], steps[steps["part"] == "head"]
    both = layer.merge(head[[*_HEAD_KEY, "seconds", "joules"]], on=_HEAD_KEY, suffixes=("", "_head"))
    depth = both["shape"].map({shape.name: shape.layers for shape in grid.manifest.shapes}).astype("int64")
    factor = depth / both["layers"]
    both["seconds"] = factor * both["seconds"] + both["seconds_head"]
    both["joules"] = factor * both["joules"] + both["joules_head"]
    both["part"], both["layers"] = "composed", depth
    return _table(both)


def step_times(grid: StepGrid) -> pa.Table:
    """Give the rows of whole steps: of part ``whole`` where a cell was so measured, else ``composed``."""
    key = [name for name in _KEY if name != "part"]
    whole = _frame(grid).query("part == 'whole'")
    made = composed(grid).to_pandas().astype({"tree_nodes": "Int32"})
    known = pd.MultiIndex.from_frame(whole[key].fillna({"tree_nodes": 0}))
    new = ~pd.MultiIndex.from_frame(made[key].fillna({"tree_nodes": 0})).isin(known)
    return _table(pd.concat([whole, made[new]]) if new.any() else whole)


def composing_errors(grid: StepGrid) -> pd.DataFrame:
    """Give the cells that were timed whole and in parts: median seconds of both, and composed / whole - 1."""
    key = [name for name in _KEY if name != "part"]
    parts = {"whole": _frame(grid).query("part == 'whole'"), "composed": composed(grid).to_pandas()}
    medians = {
        name: rows.fillna({"tree_nodes": 0}).groupby(key)["seconds"].median().rename(f"{name}_s")
        for name, rows in parts.items()
    }
    errors: pd.DataFrame = pd.concat(list(medians.values()), axis=1, join="inner").reset_index()
    errors["relative_error"] = errors["composed_s"] / errors["whole_s"] - 1
    return errors


def to_timings(
    grid: StepGrid,
    shape: str,
    name: str,
    *,
    dtype: str | None = None,
    graph: bool | None = None,
    role: Role = "verifier",
) -> pa.Table:
    """Give the steps of `shape` as a TraceSet's table ``timings``, under the name `name`.

    A verifier's rows are its prefill and verify steps, a drafter's its draft steps (a draft step is a chain step of
    one new token). `dtype` and `graph` choose where the grid has several. Whether a row was measured whole or
    composed is not in that table; `step_times` has it.

    Raises:
        CalibrationError: the grid has no such steps, or several kinds and none was chosen.
    """
    grid.manifest.shape(shape)
    steps = step_times(grid).to_pandas()
    steps = steps[steps["shape"] == shape]
    if not len(steps):
        raise CalibrationError(f"shape '{shape}': this timing grid has no whole step of it, measured or composed")
    for column, choice in (("dtype", dtype), ("graph", graph)):
        found = sorted(steps[column].unique().tolist())
        if choice is None and len(found) > 1:
            known = ", ".join(str(value).lower() for value in found)
            raise CalibrationError(f"{column}: must be given where the grid has several; choose from {known}")
        if choice is not None and choice not in found:
            hint = did_you_mean(str(choice), [str(value) for value in found])
            raise CalibrationError(f"{column}: '{shape}' was not timed so, got {choice}{hint}")
        steps = steps if choice is None else steps[steps[column] == choice]
    if role == "drafter":
        steps = steps.query("operation == 'verify' and new_tokens == 1").assign(operation="draft")
    steps = steps.assign(model=name)
    columns = ("model", "operation", "batch", "new_tokens", "context_tokens", "tree_nodes")
    order = steps.sort_values([*columns[1:], "repeat"], kind="stable")
    return make_table("timings", {c: order[c].array for c in (*columns, "repeat", "seconds", "joules")})


def torch_dtype_name(dtype: str) -> str:
    """Give what a manifest calls the type that a grid names `dtype` (``bf16`` is ``bfloat16``)."""
    if dtype not in TORCH_NAMES:
        raise CalibrationError(f"dtype: not known, got '{dtype}'{did_you_mean(dtype, TORCH_NAMES)}")
    return TORCH_NAMES[dtype]


def _frame(grid: StepGrid) -> pd.DataFrame:
    frame: pd.DataFrame = grid.steps.to_pandas()
    return frame.astype({"tree_nodes": "Int32"})


def _table(frame: pd.DataFrame) -> pa.Table:
    schema = grid_schema("steps")
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
