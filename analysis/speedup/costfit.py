"""How well the fitted step costs describe the recorded timings.

What the error of fitted step costs does to a simulated throughput: the same schedule, priced by other fits.

In a closed loop that is kept full, the schedule of a fixed draft length does not depend on how long a step takes. So
the time of a run is a sum over its steps, and another cost gives another sum over the same steps: no simulation is
needed. A draw of the costs has two parts, multiplied:

- *a refit* to timings whose repeats were resampled within every configuration (bootstrap of the medians), read at the
  mean batch, new tokens and context of the steps concerned: what the noise of the timings does to the fit;
- *an error of the form* for each timed configuration of (batch, new tokens a sequence), normal in the logarithm with
  the root mean square of the held-out errors of that operation. All steps nearest to a configuration share its error,
  in every run, so the errors of two draft lengths cancel only as far as they use the same steps.

Approximate: errors of different configurations and operations are drawn as independent; held-out errors contain
timing noise once more, which errs to the wide side; draft steps of a round share the cost of its first one. Steps
outside the timed range carry the error of the nearest configuration, which says nothing of how wrong an extrapolation
may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.random import Generator
from numpy.typing import NDArray

from analysis.common.bootstrap import number
from analysis.speedup.grid import OPERATIONS, CellRun, Steps, weighted_mean
from calibration.common.arrays import Floats
from calibration.traces import TraceSet
from simulator.pricing.fitted import Cells, Curve, fit_curve, held_out_errors, repeated_cells

REFITS = 100
"""Refits to resampled timings; replicates of the requests take them in turn."""


class StepDraws:
    """Draws of the cost of one operation of one model, relative to the fitted cost."""

    def __init__(self, cells: Cells, repeats: Sequence[Floats], errors: Floats, rng: Generator, draws: int) -> None:
        self._curves = (fit_curve(cells), *(_refit(cells, repeats, rng) for _ in range(min(REFITS, draws))))
        self.configurations = np.unique(np.stack([cells.batch, cells.new_tokens], axis=1), axis=0)
        spread = float(np.sqrt(np.mean(errors**2)))
        self._form = np.exp(spread * rng.standard_normal((draws, len(self.configurations))))

    def nearest(self, batch: Floats, new_tokens: Floats) -> NDArray[np.int64]:
        """Give the timed configuration nearest to steps of `batch` with `new_tokens` in all, by ratio."""
        steps = np.log(np.stack([batch, new_tokens / batch], axis=1))
        away = np.abs(steps[:, None, :] - np.log(self.configurations)[None, :, :]).sum(axis=2)
        return np.asarray(away.argmin(axis=1))

    def factors(self, configuration: int, batch: float, new_tokens: float, context_tokens: float) -> Floats:
        """Give the drawn costs of such a step over the fitted one, shape (draws,)."""
        seconds = np.array([float(curve.seconds(batch, new_tokens, context_tokens)) for curve in self._curves])
        form = self._form[:, configuration]
        refits = seconds[1:] / seconds[0] if seconds[0] > 0 else np.ones(len(seconds) - 1)
        return np.asarray(np.resize(refits, len(form)) * form)


def _refit(cells: Cells, repeats: Sequence[Floats], rng: Generator) -> Curve:
    """The fit to the medians of repeats drawn with replacement."""
    medians = [np.median(one[rng.integers(0, len(one), len(one))]) for one in repeats]
    return fit_curve(Cells(cells.batch, cells.new_tokens, cells.context_tokens, np.array(medians), cells.repeats))


class CostDraws:
    """Draws of all fitted step costs of a TraceSet, the same for every run, so that comparisons are paired."""

    def __init__(self, traces: TraceSet, rng: Generator, *, draws: int) -> None:
        self._timings, self._verifier = traces.timings, traces.manifest.verifier.name
        self._draws = draws
        self._seed = int(rng.integers(0, 2**63))
        self._known: dict[tuple[str, str], StepDraws | None] = {}

    def of(self, model: str, operation: str) -> StepDraws | None:
        """Give the draws of one operation of `model`; None where nothing was fitted or held out."""
        key = (model, operation)
        if key not in self._known:
            self._known[key] = self._drawn(self._timings, model, operation)
        return self._known[key]

    def _drawn(self, timings: pa.Table, model: str, operation: str) -> StepDraws | None:
        cells, repeats = repeated_cells(timings, model, operation)
        errors = held_out_errors(cells)
        if errors is None:
            return None
        # A stream of its own for every operation: draws do not depend on which run asks first.
        words = [int.from_bytes(text.encode(), "big") for text in (model, operation)]
        return StepDraws(cells, repeats, errors, np.random.default_rng([self._seed, *words]), self._draws)

    def of_run(self, run: CellRun) -> tuple[Floats, Floats] | None:
        """Give (seconds by request and timed configuration, their drawn factors (draws, configurations)) of `run`.

        None where some of its time was spent in steps whose cost error is not known.
        """
        if run.steps is None:
            return None
        seconds, factors = [], []
        for index, operation in enumerate(OPERATIONS):
            mine = run.steps.operation == index
            if not run.steps.seconds[:, mine].any():
                continue
            draws = self.of(run.drafter if operation == "draft" else self._verifier, operation)
            if draws is None:
                return None
            for configuration, kinds in _by_configuration(run.steps, mine, draws):
                spent = run.steps.seconds[:, kinds]
                weight = spent.sum(axis=0)
                values = (run.steps.batch, run.steps.new_tokens, run.steps.context_tokens)
                means = (weighted_mean(value[kinds], weight) for value in values)
                seconds.append(spent.sum(axis=1))
                factors.append(draws.factors(configuration, *means))
        return np.stack(seconds, axis=1), np.stack(factors, axis=1)


def _by_configuration(steps: Steps, mine: NDArray[np.bool_], draws: StepDraws) -> list[tuple[int, NDArray[np.int64]]]:
    """Kinds of steps that took time, by the timed configuration nearest to them."""
    kinds = np.flatnonzero(mine & (steps.seconds.sum(axis=0) > 0))
    nearest = draws.nearest(steps.batch[kinds], steps.new_tokens[kinds])
    return [(int(one), kinds[nearest == one]) for one in np.unique(nearest)]


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
