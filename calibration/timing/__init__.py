"""Step times: of loaded models for a TraceSet, and of published shapes with random weights for a timing grid.

`measure` times a verifier and its drafters as they are loaded. `time_shapes` runs a job (`load_timing_job`) that
times shapes of `SHAPES` with random weights, whole or by their parts, and keeps them as a `StepGrid`: a folder that
`read_grid` reads, `composed` and `step_times` turn into whole steps, and `to_timings` into a TraceSet's timings.
Importing this needs no torch; timing does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.drafters.timing import Cell, TimingGrid, measure
    from calibration.shapes.shapes import SHAPES, Shape, get_shape
    from calibration.timing.compose import composed, composing_errors, step_times, to_timings
    from calibration.timing.gridfile import (
        GridManifest,
        StepCell,
        StepGrid,
        TimingJob,
        load_timing_job,
        parse_timing_job,
        read_grid,
    )
    from calibration.timing.run import time_shapes

_HOME = {
    "SHAPES": "calibration.shapes.shapes",
    "Cell": "calibration.drafters.timing",
    "GridManifest": "calibration.timing.gridfile",
    "Shape": "calibration.shapes.shapes",
    "StepCell": "calibration.timing.gridfile",
    "StepGrid": "calibration.timing.gridfile",
    "TimingGrid": "calibration.drafters.timing",
    "TimingJob": "calibration.timing.gridfile",
    "composed": "calibration.timing.compose",
    "composing_errors": "calibration.timing.compose",
    "get_shape": "calibration.shapes.shapes",
    "load_timing_job": "calibration.timing.gridfile",
    "measure": "calibration.drafters.timing",
    "parse_timing_job": "calibration.timing.gridfile",
    "read_grid": "calibration.timing.gridfile",
    "step_times": "calibration.timing.compose",
    "time_shapes": "calibration.timing.run",
    "to_timings": "calibration.timing.compose",
}

__all__ = [
    "SHAPES",
    "Cell",
    "GridManifest",
    "Shape",
    "StepCell",
    "StepGrid",
    "TimingGrid",
    "TimingJob",
    "composed",
    "composing_errors",
    "get_shape",
    "load_timing_job",
    "measure",
    "parse_timing_job",
    "read_grid",
    "step_times",
    "time_shapes",
    "to_timings",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used: the simulator reads shapes from here and need not pay for pandas.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'calibration.timing' has no attribute '{name}'")
