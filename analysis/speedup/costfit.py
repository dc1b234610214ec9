"""How well the fitted step costs describe the recorded timings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from analysis.common.bootstrap import number
from calibration.traces import TraceSet


@dataclass(frozen=True)
class CostPoint:
    """One timed configuration: median of its repeats and what the fit says, seconds."""

    batch: int
    new_tokens: int
    context_tokens: int
    repeats: int
    measured_s: float
    fitted_s: float


@dataclass(frozen=True)
class CostFit:
    """The fit of one model and operation to its timings.

    Errors are absolute and relative: ``error`` the mean on the configurations fitted to, ``held_out_error`` the mean
    and ``held_out_worst`` the largest with each configuration predicted by a fit to the others; None where too few
    were timed. ``repeat_spread`` tells how noisy the timing was: the interquartile range of the repeats over their
    median, as the median over configurations; None where nothing was repeated.
    """

    model: str
    operation: str
    error: float
    held_out_error: float | None
    held_out_worst: float | None
    repeat_spread: float | None
    points: tuple[CostPoint, ...]


def cost_fits(traces: TraceSet) -> tuple[CostFit, ...]:
    """Fit what was timed, as the simulator does: the verifier's prefill and verify steps, then each drafter's."""
    timed = set(zip(traces.timings["model"].to_pylist(), traces.timings["operation"].to_pylist(), strict=True))
    manifest = traces.manifest
    wanted = [(manifest.verifier.name, "prefill"), (manifest.verifier.name, "verify")]
    wanted += [(name, "draft") for name in manifest.drafter_names]
    return tuple(_cost_fit(traces, *key) for key in wanted if key in timed)


def _cost_fit(traces: TraceSet, model: str, operation: str) -> CostFit:
    from simulator.pricing.fitted import fit_step

    fit = fit_step(traces.timings, model, operation)
    cells = fit.cells
    fitted = fit.step_seconds(cells.batch, cells.batch * cells.new_tokens, cells.batch * cells.context_tokens)
    columns = (cells.batch, cells.new_tokens, cells.context_tokens, cells.repeats, cells.seconds, fitted)
    points = zip(*(column.tolist() for column in columns), strict=True)
    return CostFit(
        model,
        operation,
        error=number(fit.error) or 0.0,
        held_out_error=number(fit.held_out_error),
        held_out_worst=number(fit.held_out_worst),
        repeat_spread=_repeat_spread(traces, model, operation),
        points=tuple(
            CostPoint(int(b), int(n), int(c), int(r), number(s) or 0.0, number(f) or 0.0)
            for b, n, c, r, s, f in points
        ),
    )


def _repeat_spread(traces: TraceSet, model: str, operation: str) -> float | None:
    timings = traces.timings
    rows = timings.filter(pc.and_(pc.equal(timings["model"], model), pc.equal(timings["operation"], operation)))
    seconds = rows["seconds"].to_numpy()
    keys = np.stack([rows[name].to_numpy() for name in ("batch", "new_tokens", "context_tokens")], axis=1)
    _, cell = np.unique(keys, axis=0, return_inverse=True)
    spreads = []
    for index in range(int(cell.max()) + 1):
        repeats = seconds[cell.ravel() == index]
        if len(repeats) > 1:
            low, middle, high = np.quantile(repeats, [0.25, 0.5, 0.75])
            spreads.append((high - low) / middle)
    return number(float(np.median(spreads))) if spreads else None
