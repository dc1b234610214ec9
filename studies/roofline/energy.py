"""Energy of decoding, fitted on part of the ML.ENERGY table and tested on the rest.

The table (one row a configuration: vLLM on 1 to 4 H100 SXM, bf16, steady state) gives watts, tokens/s, the mean
batch, the mean output and the median ITL. The work of a row follows from its model's shape: decode steps of that
batch and one prefill for every output. `simulator.pricing.power.PowerModel` has the law that came out.

What it leaves unexplained: runs with the same rates differ by up to a tenth (Qwen3-14B and Llama-3.1-8B at batch 8
move as many bytes a second and draw 443 and 486 W), other GPUs and temperatures among the causes that the table does
not tell; long contexts at a middle batch (Qwen3-8B, gpqa) draw up to 11 % more than the law gives, as reading the
cache costs more a byte than reading weights. Prompts and the spread of outputs are assumed; twice the prompt, or half
of it and half of the spread, move the error over all held-out rows (4.8 %) by no more than 0.5 points.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats
from calibration.common.errors import CostError
from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import get_device
from simulator.hardware.work import Work, step_work
from studies.roofline.tables import PROMPT_TOKENS, SPREAD

SOURCE = "ML.ENERGY Benchmark v3 (ml-energy/leaderboard): vLLM on H100 SXM, bf16, sampled, steady state"
SHAPES = {
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
}
"""The shape behind every name of a model in the table."""
SMALL_AND_MIDDLE = ("qwen3-8b", "llama-3.1-8b", "qwen3-32b")
"""Fitted on where 14B and 70B are to be predicted."""
FOLDS = 6
"""Every sixth row, in the table's order of batch sizes, is held out in turn."""
DEVICE, DTYPE = get_device("h100-sxm"), "bf16"


def _idle() -> float:
    """Give the idle power as a part of the TDP: that of the H200, which has the same chip. No row says it."""
    device = get_device("h200")
    assert device.idle_watts is not None
    assert device.tdp_watts is not None
    return device.idle_watts / device.tdp_watts


IDLE = _idle()


@dataclass(frozen=True)
class Rows:
    """Rows of the table. Watts are those of one GPU; `itl_s` is the median, `tokens_s` the throughput."""

    model: NDArray[np.str_]
    task: NDArray[np.str_]
    gpus: Floats
    batch: Floats
    output_tokens: Floats
    tokens_s: Floats
    itl_s: Floats
    watts: Floats
    token_joules: Floats

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self.watts)

    def __getitem__(self, keep: NDArray[np.bool_]) -> Rows:
        """Give the rows that a mask keeps."""
        return Rows(*(getattr(self, field.name)[keep] for field in fields(self)))


_COLUMNS = (
    "model",
    "task",
    "num_gpus",
    "avg_batch_size",
    "avg_output_len",
    "output_throughput_tokens_per_sec",
    "median_itl_ms",
    "avg_power_watts",
    "energy_per_token_joules",
)


def read_rows(path: Path) -> Rows:
    """Read the table at `path`; `CostError` where a column is missing, or a model or task is not known."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise CostError(f"{path.name}: must have rows with a column '{missing[0]}', got none")
    for column, known in (("model", set(SHAPES)), ("task", set(SPREAD))):
        unknown = sorted({row[column] for row in rows} - known)
        if unknown:
            raise CostError(f"{path.name}: {column}: must be one of {', '.join(sorted(known))}, got '{unknown[0]}'")
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in _COLUMNS[2:]}
    gpus, batch, output, tokens_s, itl_ms, watts, joules = numbers.values()
    model = np.array([SHAPES[row["model"]] for row in rows])
    task = np.array([row["task"] for row in rows])
    return Rows(model, task, gpus, batch, output, tokens_s, itl_ms / 1e3, watts / gpus, joules)


class Demand(NamedTuple):
    """What a decode step (`step`) and a prefill (`prompt`) of each row ask of each device, [rows, 4].

    Seconds at the peak bandwidth of weights and activations, and of keys and values; seconds at the peak FLOP/s;
    thousands of scored tokens.
    """

    step: Floats
    prompt: Floats

    def use(self, rows: Rows) -> Floats:
        """Give the same a second, at the measured throughput: shares of peaks, and thousands of tokens/s."""
        steps_s, prompts_s = rows.tokens_s / rows.batch, rows.tokens_s / rows.output_tokens
        return np.asarray(self.step * steps_s[:, None] + self.prompt * prompts_s[:, None])


def demand(rows: Rows) -> Demand:
    """Give what steps and prefills of `rows` ask of each device.

    The mean context is the prompt and half of the output, more where outputs vary, as `studies.roofline.tables` has
    it for the same rows: an assumption. A prefill shares its step with decoding sequences and reads no weights.
    """
    step, prompt = [], []
    for i, name in enumerate(rows.model):
        shape, size, batch, task = get_shape(str(name)), int(rows.gpus[i]), float(rows.batch[i]), str(rows.task[i])
        cached = batch * (PROMPT_TOKENS + float(rows.output_tokens[i]) / 2 * (1 + SPREAD[task]))
        step.append(_asked(step_work(shape, batch, batch, cached, tensor_parallel=size), 1.0))
        prefill = step_work(shape, 1, PROMPT_TOKENS, 0, tensor_parallel=size, logits=1)
        prompt.append(_asked(prefill, 0.0))
    return Demand(np.array(step), np.array(prompt))


def _asked(work: Work, own: float) -> tuple[float, float, float, float]:
    """Give a row of `Demand`; `own`: 0 for a step that shares weights and the count of tokens with another."""
    moved = work.activation_bytes + own * work.weight_bytes
    flops = DEVICE.flops_per_s(DTYPE)
    return (
        moved / DEVICE.bandwidth,
        work.kv_bytes / DEVICE.bandwidth,
        work.flops / flops,
        own * work.scored_tokens / 1e3,
    )


Law = Callable[[Floats, Floats], Any]
"""Gives the part of the TDP, from coefficients and a table of use [rows, 4]."""

_TOGETHER = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).T
"""Sums up a table of use to bytes, operations and tokens."""


def _linear(use: Floats, c: Floats, idle: float = IDLE) -> Any:
    return np.minimum(idle + use @ c, 1)


LAWS: Mapping[str, tuple[Law, int]] = {
    "a constant": (lambda c, use: np.full(len(use), c[0]), 1),
    "the busiest peak": (lambda c, use: _linear(np.maximum(use[:, :2].sum(1), use[:, 2])[:, None], c), 1),
    "bytes, operations": (lambda c, use: _linear((use @ _TOGETHER)[:, :2], c), 2),
    "bytes, KV cache apart, operations": (lambda c, use: _linear(use[:, :3], c), 3),
    "bytes, operations, tokens": (lambda c, use: _linear(use @ _TOGETHER, c), 3),
    "bytes, operations, tokens, idle fitted": (lambda c, use: _linear(use @ _TOGETHER, c[1:], c[0]), 4),
    "bytes, KV cache apart, operations, tokens": (lambda c, use: _linear(use, c), 4),
    "bytes, operations, tokens, saturating": (lambda c, use: 1 - (1 - IDLE) * np.exp(-(use @ _TOGETHER @ c)), 3),
}
"""Laws of power that were tried, with their numbers of coefficients; all but two above the same idle power."""
CHOSEN = "bytes, operations, tokens"
"""Least error over the held-out rows of all roles (`law_table`); chosen on them, so that they flatter it a little."""


@functools.lru_cache(maxsize=4)
def _table(path: Path) -> tuple[Rows, Demand]:
    rows = read_rows(path)
    return rows, demand(rows)


def _tdp() -> float:
    assert DEVICE.tdp_watts is not None
    return DEVICE.tdp_watts


def fit_law(path: Path, law: str, keep: NDArray[np.bool_]) -> Floats:
    """Fit `law` to the watts of the rows that `keep` keeps: least squared relative error, no coefficient below 0."""
    from scipy.optimize import least_squares

    rows, asked = _table(path)
    power, count = LAWS[law]
    use, measured = asked.use(rows)[keep], rows.watts[keep] / _tdp()

    def errors(c: Floats) -> Floats:
        return np.asarray(power(c, use) / measured - 1, dtype=np.float64)

    return np.asarray(least_squares(errors, np.full(count, 0.3), bounds=(0, np.inf)).x, dtype=np.float64)


def predicted_watts(path: Path, law: str, coefficients: Floats) -> Floats:
    """Give the watts of one GPU that a fitted law predicts for every row, at its measured throughput."""
    rows, asked = _table(path)
    return np.asarray(_tdp() * LAWS[law][0](coefficients, asked.use(rows)), dtype=np.float64)


def predicted_token_joules(path: Path, coefficients: Floats) -> Floats:
    """Give the joules of an output token that the chosen law predicts from the median ITL, without the throughput.

    Decode steps of one ITL each, shared by the batch, and the work of one prefill shared by an output: what a
    simulation adds up. The time of a prefill is not in the table: the idle power during it is left out.
    """
    rows, asked = _table(path)
    busy_s, prompt_s = asked.step @ _TOGETHER @ coefficients, asked.prompt @ _TOGETHER @ coefficients
    step_s = np.minimum(IDLE * rows.itl_s + busy_s, rows.itl_s)
    return np.asarray(rows.gpus * _tdp() * (step_s / rows.batch + prompt_s / rows.output_tokens))


class Split(NamedTuple):
    """Rows held out, and why: by `role`, and which part of it."""

    role: str
    part: str
    held_out: NDArray[np.bool_]


def splits(rows: Rows) -> Iterator[Split]:
    """Give every way in which rows are held out: cells, a model, a task, and two sizes at once."""
    for fold in range(FOLDS):
        yield Split("cells", f"fold {fold}", np.arange(len(rows)) % FOLDS == fold)
    for model in np.unique(rows.model):
        yield Split("model", str(model), rows.model == model)
    for task in np.unique(rows.task):
        yield Split("task", str(task), rows.task == task)
    yield Split("sizes", "14B and 70B from 8B and 32B", ~np.isin(rows.model, SMALL_AND_MIDDLE))


@dataclass(frozen=True)
class EnergyRow:
    """One line of the error table: mean (`mape`) and worst absolute relative error on `n` held-out rows.

    `quantity`: ``watts`` at the measured throughput, or ``joules per token`` at the measured median ITL. `model`: the
    shape predicted, or ``all``. `role`: ``cells`` (one row in six held out), ``model`` (all of its rows held out),
    ``task`` (all rows of the task in `note` held out), ``sizes`` (fitted on 8B and 32B).
    """

    quantity: str
    model: str
    role: str
    n: int
    mape: float
    worst: float
    note: str


_BATCHES = ((0, 24, "batch 8 to 16"), (24, 80, "batch 32 to 64"), (80, 200, "batch 96 to 192"), (200, 1e9, "larger"))


def energy_table(path: Path) -> list[EnergyRow]:
    """Give the held-out errors of the chosen law on the table at `path`: by role, model and, for cells, batch."""
    rows, _ = _table(path)
    measured = {"watts": rows.watts, "joules per token": rows.token_joules}
    errors: dict[tuple[str, str, str], Floats] = {}
    for split in splits(rows):
        fitted = fit_law(path, CHOSEN, ~split.held_out)
        predicted = (predicted_watts(path, CHOSEN, fitted), predicted_token_joules(path, fitted))
        for (quantity, truth), values in zip(measured.items(), predicted, strict=True):
            key = quantity, split.role, split.part if split.role in ("task", "sizes") else ""
            mine = errors.setdefault(key, np.full(len(rows), np.nan))
            mine[split.held_out] = np.abs(values / truth - 1)[split.held_out]
    order = list(measured)
    keys = sorted(errors, key=lambda key: order.index(key[0]))
    return [line for key in keys for line in _lines(rows, *key, errors[key])]


def _lines(rows: Rows, quantity: str, role: str, part: str, errors: Floats) -> Iterator[EnergyRow]:
    """Give the lines of one role: each model, each range of batches where cells are held out, and all."""
    known = ~np.isnan(errors)
    groups = [(str(model), part, known & (rows.model == model)) for model in np.unique(rows.model)]
    if role == "cells":
        groups += [("all", note, (low <= rows.batch) & (rows.batch < high)) for low, high, note in _BATCHES]
    for model, note, mine in [*groups, ("all", part, known)]:
        if mine.any():
            some = errors[mine]
            yield EnergyRow(quantity, model, role, len(some), _digits(some.mean()), _digits(some.max()), note)


def law_table(path: Path) -> list[tuple[str, dict[str, float], float]]:
    """Give, for every law tried, the mean error of its watts by role and over all held-out rows of all roles."""
    rows, _ = _table(path)
    lines = []
    for law in LAWS:
        errors: dict[str, list[Floats]] = {}
        for split in splits(rows):
            predicted = predicted_watts(path, law, fit_law(path, law, ~split.held_out))
            errors.setdefault(split.role, []).append(np.abs(predicted / rows.watts - 1)[split.held_out])
        by_role = {role: np.concatenate(parts) for role, parts in errors.items()}
        pooled = np.concatenate(list(by_role.values()))
        lines.append((law, {role: _digits(part.mean()) for role, part in by_role.items()}, _digits(pooled.mean())))
    return lines


def energy_figures(path: Path) -> dict[str, Any]:
    """Give what `simulator/hardware/efficiencies/energy.json` holds: the chosen law fitted to every row."""
    rows, asked = _table(path)
    memory, arithmetic, tokens = fit_law(path, CHOSEN, np.ones(len(rows), dtype=np.bool_))
    use = asked.use(rows) @ _TOGETHER
    errors: dict[str, dict[str, float]] = {}
    for line in energy_table(path):
        if line.model == "all" and line.role != "task" and line.note in ("", "14B and 70B from 8B and 32B"):
            errors.setdefault(line.quantity.replace(" ", "_"), {})[line.role] = line.mape
    return {
        "device": DEVICE.name,
        "dtype": DTYPE,
        "idle": _digits(IDLE),
        "memory": _digits(memory),
        "arithmetic": _digits(arithmetic),
        "token_bytes": _digits(tokens / 1e3 * DEVICE.bandwidth / memory),
        "source": SOURCE,
        "idle_source": get_device("h200").sources["idle_watts"],
        "n": len(rows),
        "models": sorted(set(rows.model.tolist())),
        "prompt_tokens_assumed": PROMPT_TOKENS,
        "spread_of_outputs_assumed": dict(SPREAD),
        "in_use": {
            name: [_digits(use[:, i].min()), _digits(use[:, i].max())]
            for i, name in enumerate(("bandwidth", "flops", "thousand_tokens_s"))
        },
        "held_out_mean_errors": errors,
    }


def _digits(value: Any, digits: int = 3) -> float:
    return float(f"{float(value):.{digits}g}")
