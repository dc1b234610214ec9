"""The fit of power: recovered from a table made by a known law, and its errors on the public table."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data

from calibration.common.errors import CostError
from calibration.shapes.shapes import get_shape
from simulator.pricing.power import figures
from studies.roofline.energy import (
    CHOSEN,
    IDLE,
    LAWS,
    SHAPES,
    demand,
    energy_figures,
    energy_table,
    fit_law,
    law_table,
    predicted_token_joules,
    predicted_watts,
    read_rows,
    splits,
)
from studies.roofline.tables import PROMPT_TOKENS, SPREAD

TRUTH = np.array([0.7, 0.8, 0.04])


def itl_of(model: str, batch: int) -> float:
    """A step that no device is too slow for: 2 ps a parameter on each of them, 0.2 ms a sequence."""
    return get_shape(SHAPES[model]).parameters / (4 if "70B" in model else 1) * 2e-12 + 0.0002 * batch


def write(path: Path, watts: np.ndarray | None = None, joules: np.ndarray | None = None) -> Path:
    """Write a table of 5 models x 2 tasks x 3 batches; a row's power is 1 W a GPU and its energy 1 J unless given."""
    lines = []
    for i, (model, task, batch) in enumerate(itertools.product(SHAPES, sorted(SPREAD), (8, 32, 128))):
        gpus = 4 if "70B" in model else 1
        itl_s = itl_of(model, batch)
        lines.append(
            {
                "model": model,
                "task": task,
                "num_gpus": gpus,
                "avg_batch_size": batch,
                "avg_output_len": 400 if task != "gpqa" else 2000,
                "output_throughput_tokens_per_sec": batch / itl_s,
                "median_itl_ms": itl_s * 1e3,
                "avg_power_watts": gpus * (1.0 if watts is None else watts[i]),
                "energy_per_token_joules": 1.0 if joules is None else joules[i],
            }
        )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_a_row_asks_what_was_worked_out_by_hand(tmp_path: Path) -> None:
    """Llama-3.1-8B, batch 32, chat: 131,072 bytes of cache a token; matrices and head 7,504,658,432 entries."""
    rows = read_rows(write(tmp_path / "t.csv"))
    i = int(np.flatnonzero((rows.model == "llama-3.1-8b") & (rows.task == "lm-arena-chat") & (rows.batch == 32))[0])
    context = PROMPT_TOKENS + 200 * (1 + SPREAD["lm-arena-chat"])
    step, prompt = demand(rows).step[i], demand(rows).prompt[i]
    assert step[1] == pytest.approx(131_072 * 32 * (context + 2) / 3.35e12)
    attention = 32 * 4 * 4096 * 32 * (context + 1)
    assert step[2] == pytest.approx((2 * 32 * 7_504_658_432 + attention) / 989.5e12)
    assert step[3] == 0.032
    assert step[0] > 2 * 7_504_658_432 / 3.35e12
    layer = 12 * 4096 + 6 * (4096 + 1024) + 6 * 14_336
    activations = PROMPT_TOKENS * (32 * layer + 5 * 4096) + 4096 + 128_256
    assert prompt[0] == pytest.approx(2 * activations / 3.35e12)  # no weights: they are read for those that decode
    head = 128_256 * 4096
    prefill = PROMPT_TOKENS * (7_504_658_432 - head) + head
    assert prompt[2] == pytest.approx(2 * prefill / 989.5e12, rel=0.01)
    assert prompt[3] == 0
    use = demand(rows).use(rows)[i]
    itl_s = itl_of("meta-llama/Llama-3.1-8B-Instruct", 32)
    assert use[3] == pytest.approx(32 / itl_s / 1e3)
    assert use[1] == pytest.approx(step[1] / itl_s + prompt[1] * 32 / itl_s / 400)


def test_a_known_law_is_recovered_and_leaves_no_error(tmp_path: Path) -> None:
    blank = write(tmp_path / "blank.csv")
    truth = predicted_watts(blank, CHOSEN, TRUTH)
    assert truth.max() < 700
    path = write(tmp_path / "t.csv", truth)
    everything = np.ones(len(truth), dtype=np.bool_)
    assert fit_law(path, CHOSEN, everything) == pytest.approx(TRUTH, rel=1e-4)
    assert all(line.worst < 1e-3 for line in energy_table(path) if line.quantity == "watts")
    errors = {law: pooled for law, _, pooled in law_table(path)}
    assert errors["a constant"] > 0.05
    assert errors["bytes, operations"] > 10 * errors[CHOSEN]
    found = energy_figures(path)
    assert (found["memory"], found["arithmetic"]) == (0.7, 0.8)
    assert found["token_bytes"] == pytest.approx(0.04e-3 * 3.35e12 / 0.7, rel=0.01)


def test_joules_of_a_token_are_those_of_its_share_of_a_step_and_of_a_prefill(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    rows = read_rows(path)
    asked = demand(rows)
    busy = 0.7 * asked.step[:, :2].sum(1) + 0.8 * asked.step[:, 2] + 0.04 * asked.step[:, 3]
    prefill = 0.7 * asked.prompt[:, :2].sum(1) + 0.8 * asked.prompt[:, 2]
    wanted = 700 * rows.gpus * ((IDLE * rows.itl_s + busy) / rows.batch + prefill / rows.output_tokens)
    assert predicted_token_joules(path, TRUTH) == pytest.approx(wanted)


def test_every_row_is_held_out_once_in_every_role(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "t.csv"))
    times: dict[str, np.ndarray] = {}
    for split in splits(rows):
        times[split.role] = times.get(split.role, 0) + split.held_out.astype(int)
        assert 0 < split.held_out.sum() < len(rows)
    assert all((times[role] == 1).all() for role in ("cells", "model", "task"))
    assert set(rows.model[times["sizes"] == 1]) == {"qwen3-14b", "llama-3.1-70b"}


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("median_itl_ms", "itl"), encoding="utf-8")
    with pytest.raises(CostError, match=r"^t.csv: must have rows with a column 'median_itl_ms', got none$"):
        read_rows(path)
    path.write_text(text.replace("Qwen/Qwen3-8B", "Qwen/Qwen4-8B"), encoding="utf-8")
    with pytest.raises(CostError, match=r"^t.csv: model: must be one of .*, got 'Qwen/Qwen4-8B'$"):
        read_rows(path)


@pytest.fixture(scope="module")
def public() -> Path:
    return shared_data("ml-energy", "llm_energy_configs.dev.csv")


def test_held_out_errors_on_the_public_table_are_within_the_targets(public: Path) -> None:
    """At most 10 % on cells of a fitted model, at most 20 % on a model or task that was not fitted to."""
    lines = energy_table(public)
    assert {line.quantity for line in lines} == {"watts", "joules per token"}
    for line in lines:
        assert line.mape <= (0.10 if line.role == "cells" else 0.20), line
        assert line.mape <= line.worst
    sums = {(line.quantity, line.role): line.n for line in lines if line.model == "all" and line.note == ""}
    assert set(sums.values()) == {66}


def test_the_chosen_law_has_the_least_error_on_rows_held_out(public: Path) -> None:
    errors = {law: pooled for law, _, pooled in law_table(public)}
    assert set(errors) == set(LAWS)
    assert min(errors, key=lambda law: errors[law]) == CHOSEN


def test_the_figures_that_are_shipped_are_those_of_the_table(public: Path) -> None:
    found, shipped = energy_figures(public), figures()
    assert set(found) == set(shipped)
    for name in ("idle", "memory", "arithmetic", "token_bytes"):
        assert shipped[name] == pytest.approx(found[name], rel=0.005)
    for quantity, errors in found["held_out_mean_errors"].items():
        assert shipped["held_out_mean_errors"][quantity] == pytest.approx(errors, abs=5e-4)
    assert (shipped["n"], shipped["models"]) == (found["n"], found["models"])
