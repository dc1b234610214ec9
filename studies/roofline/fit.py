"""Fit every form of the roofline on part of the tables, and say how it does on the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pandas as pd
from scipy.optimize import least_squares, nnls

from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import H100_SXM
from simulator.hardware.work import Efficiencies
from simulator.pricing.roofline import RooflineStep
from studies.roofline import operators, tables
from studies.roofline.operators import Form

FITTED_MODELS = ("llama-3.1-8b", "llama-2-7b")
"""Models that a fit may see; larger ones, and Qwen's, are only predicted."""
FITTED_BATCHES = (8, 32, 96, 192)
"""Batch limits of Llama-3.1-8B in ML.ENERGY that the host's time is fitted to."""
DIGITS = 4
"""Significant digits kept of a coefficient: more would differ between linear-algebra libraries."""


class Roles(NamedTuple):
    """Cells by what the fit may do with them; ``other`` are those of a table that it never saw."""

    fitted: pd.DataFrame
    held_out: pd.DataFrame
    unfitted: pd.DataFrame
    other: pd.DataFrame


class Errors(NamedTuple):
    """Mean absolute relative errors by role; None where there are no such cells."""

    fitted: float | None
    held_out: float | None
    unfitted: float | None
    other: float | None


class Choice(NamedTuple):
    """How one form of one part did.

    The chosen form has the least mean of its errors on held-out cells and on unfitted models, but for matrices: see
    `simulator.hardware.work.matmul_s`.
    """

    part: str
    form: str
    coefficients: int
    errors: Errors
    chosen: bool


def matrix_roles(folder: Path) -> Roles:
    """LLMServingSim's 8B is fitted to, its 70B unfitted; Vidur's tables are the others."""
    cells = tables.matrices(folder)
    mine = cells.table == tables.LLMSERVINGSIM
    own = _by_model(cells[mine], tables.in_fit(cells.tokens[mine]))
    return own._replace(other=cells[~mine])


def attention_roles(folder: Path) -> Roles:
    """LLMServingSim's prefills of 8B are fitted to, those of 70B unfitted."""
    cells = operators.attention_bounds(tables.prefill_attention(folder))
    return _by_model(cells, tables.in_fit(cells.tokens))


def elementwise_roles(folder: Path) -> Roles:
    """Kernels of Vidur's 7B are fitted to, those of 70B unfitted."""
    cells = tables.elementwise(folder)
    return _by_model(cells, tables.in_fit(cells.tokens))


def all_reduce_roles(folder: Path) -> Roles:
    """Two and four devices are fitted to, eight unfitted."""
    cells = tables.all_reduces(folder)
    few, fit = cells.tensor_parallel < 8, tables.in_fit(cells.message)
    return Roles(cells[few & fit], cells[few & ~fit], cells[~few], cells[:0])


def served_roles(folder: Path) -> Roles:
    """Four batch sizes of Llama-3.1-8B are fitted to, its others held out, other models unfitted."""
    cells = tables.served(folder)
    return _by_model(cells, cells.limit.isin(FITTED_BATCHES))


def _by_model(cells: pd.DataFrame, fit: pd.Series[bool]) -> Roles:
    small = cells.model.isin(FITTED_MODELS)
    return Roles(cells[small & fit], cells[small & ~fit], cells[~small], cells[:0])


class _Candidate(Protocol):
    @property
    def chosen(self) -> bool: ...


Candidate = TypeVar("Candidate", bound=_Candidate)


def chosen(forms: Iterable[Candidate]) -> Candidate:
    """Give the one that the simulator prices with."""
    return next(form for form in forms if form.chosen)


def fit_form(form: Form, cells: pd.DataFrame) -> tuple[float, ...]:
    """Give the coefficients of least robust logarithmic error (soft L1 beyond 10 %).

    Every operator and every quarter octave of it weighs the same, however many cells it has.
    """
    size = cells.message if "message" in cells else cells.tokens
    groups = [cells.model, cells.tensor_parallel, cells.operator, np.floor(4 * np.log2(size))]
    weight = 1 / np.sqrt(cells.seconds.groupby(groups).transform("size"))
    measured = np.log(cells.seconds)

    def error(x: Any) -> Any:
        return (np.log(form.seconds(cells, x)) - measured) * weight

    bounds = (np.full(len(form.start), 1e-3), np.full(len(form.start), 1e3))
    found = least_squares(error, form.start, bounds=bounds, loss="soft_l1", f_scale=0.1).x
    return tuple(digits(value) for value in found)


def mean_error(predicted: Any, cells: pd.DataFrame) -> float | None:
    """Give the mean absolute relative error, None where there are no cells."""
    return float(np.mean(np.abs(predicted / cells.seconds - 1))) if len(cells) else None


def compare(folder: Path, bare: Efficiencies) -> list[Choice]:
    """Fit every form of every part and give its errors; `bare` are the coefficients without any host time."""
    found = _compared("matrices", operators.MATMUL, matrix_roles(folder))
    found += _compared("prefill attention", operators.ATTENTION, attention_roles(folder))
    kinds = elementwise_roles(folder)
    for kind in sorted(set(kinds.fitted.kind)):
        found += _compared(kind, operators.ELEMENTWISE, Roles(*(cells[cells.kind == kind] for cells in kinds)))
    found += _compared("all-reduce", operators.ALL_REDUCE, all_reduce_roles(folder))
    return found + _compared_hosts(served_roles(folder), bare)


def _compared(part: str, forms: Iterable[Form], roles: Roles) -> list[Choice]:
    found = []
    for form in forms:
        x = fit_form(form, roles.fitted)
        errors = Errors(*(mean_error(form.seconds(cells, x), cells) if len(cells) else None for cells in roles))
        found.append(Choice(part, form.name, len(x), errors, form.chosen))
    return found


class Host(NamedTuple):
    """A form of the host's time: whether something per step, and what else it is proportional to."""

    name: str
    per_step: bool
    per: Callable[[pd.DataFrame], Any] | None
    chosen: bool = False

    def columns(self, cells: pd.DataFrame) -> Any:
        """Give what its coefficients multiply, (cells, coefficients)."""
        columns = [np.ones(len(cells))] if self.per_step else []
        if self.per is not None:
            columns.append(np.asarray(self.per(cells), dtype=float))
        return np.stack(columns, axis=1) if columns else np.zeros((len(cells), 0))


def _logits(cells: pd.DataFrame) -> Any:
    return cells.batch * [get_shape(model).vocabulary for model in cells.model]


HOSTS = (
    Host("nothing", False, None),
    Host("per step", True, None),
    Host("per sequence", False, lambda cells: cells.batch),
    Host("per step + per sequence", True, lambda cells: cells.batch),
    Host("per step + per sequence and entry of the vocabulary", True, _logits, chosen=True),
)


def _compared_hosts(roles: Roles, bare: Efficiencies) -> list[Choice]:
    found = []
    for host in HOSTS:
        x = fit_host(host, roles.fitted, bare)
        errors = (mean_error(predict_served(cells, bare) + host.columns(cells) @ x, cells) for cells in roles)
        found.append(Choice("host", host.name, len(x), Errors(*errors), host.chosen))
    return found


def fit_host(host: Host, cells: pd.DataFrame, bare: Efficiencies) -> Any:
    """Give its coefficients of least squared relative error, s, none below zero."""
    columns = host.columns(cells)
    if columns.shape[1] == 0:
        return np.zeros(0)
    measured = cells.seconds.to_numpy()
    rest = (measured - predict_served(cells, bare)) / measured
    scale = columns.max(axis=0)
    return np.array([digits(x) for x in nnls(columns / scale / measured[:, None], rest)[0] / scale])


def predict_served(cells: pd.DataFrame, fit: Efficiencies) -> Any:
    """Give the seconds that the simulator has for ML.ENERGY's decode steps."""
    seconds = pd.Series(0.0, index=cells.index)
    for model, size in sorted(set(zip(cells.model, cells.tensor_parallel, strict=True))):
        part, shape = cells[(cells.model == model) & (cells.tensor_parallel == size)], get_shape(model)
        each_s = fit.host_per_logit_s * shape.vocabulary
        step = RooflineStep(shape, H100_SXM, "bf16", int(size), "verify", fit.host_s, each_s, fit)
        seconds[part.index] = step.step_seconds(part.batch, part.tokens, part.context)
    return seconds.to_numpy()


def digits(value: Any, count: int = DIGITS) -> float:
    """Round to significant digits."""
    return float(f"{float(value):.{count}g}")
