"""A slow-down: Apertus 70B with an 8B draft model on four GPUs (vLLM), where 63 to 79% acceptance does not pay.

Plain decoding at both concurrencies and speculation on code at concurrency 1 give the prices; speculation on chat,
and at concurrency 8, is predicted. What is accepted comes from the counters of the very cell (rates by position, of
all rounds), made into a recording. Every cell was measured twice; the spread is half their range over their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fidelity.table import Compared, Condition, Crossover, Role, Source
from calibration.importers.aggregates import acceptance_law, synthesize
from calibration.importers.origin import Origin, prompt_source
from calibration.importers.rounds import Kind, groups, read_columns
from calibration.traces import TraceSet
from studies.public.runs import serve, table_path

NAME = "vLLM, 70B with an 8B draft model (Apertus)"
DRAFTER = "draft-n3-tp4"
DRAFT_TOKENS = 3
FITTED = ("code", 1)
CONCURRENCY = (1, 8)
_FOLDER = "apertus-70b"
_REQUESTS, _TOKENS = 40, 512
Cell = tuple[str, int]
"""Workload and concurrency."""


@dataclass(frozen=True)
class Measured:
    """One cell, repeat by repeat: ms per token, plain and with the draft model; tokens per round; their rates."""

    plain_ms: tuple[float, ...]
    drafted_ms: tuple[float, ...]
    accepted: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def speedups(self) -> tuple[float, ...]:
        """Plain over drafted time per token, repeat by repeat."""
        return tuple(plain / drafted for plain, drafted in zip(self.plain_ms, self.drafted_ms, strict=True))

    @property
    def rounds_ms(self) -> tuple[float, ...]:
        """Time of a round, repeat by repeat: ms per token x tokens per round."""
        return tuple(ms * tokens for ms, tokens in zip(self.drafted_ms, self.accepted, strict=True))

    @property
    def round_ms(self) -> float:
        """Time of a round, mean over repeats."""
        return float(np.mean(self.rounds_ms))


_KEYS: dict[str, Kind] = {"variant": "text", "workload": "text", "concurrency": "count"}


def read_cells(data: Path) -> dict[Cell, Measured]:
    """Read the cells of plain decoding and of the draft model."""
    cells = read_columns(
        table_path(data, _FOLDER, "cells.dev.csv"),
        {**_KEYS, "tpot_p50_ms": "seconds", "mean_acceptance_length": "text"},
    )
    counted = read_columns(
        table_path(data, _FOLDER, "per_position.dev.csv"),
        {**_KEYS, **{f"pos{j}_uncond": "seconds" for j in range(DRAFT_TOKENS)}},
    )
    rows, counts = (groups(*(table[name] for name in _KEYS)) for table in (cells, counted))
    found = {}
    for variant, workload, concurrency in rows:
        if variant != DRAFTER:
            continue
        mine, plain = rows[variant, workload, concurrency], rows["baseline", workload, concurrency]
        law = counts[variant, workload, concurrency]
        found[workload, concurrency] = Measured(
            tuple(cells["tpot_p50_ms"][plain].tolist()),
            tuple(cells["tpot_p50_ms"][mine].tolist()),
            tuple(float(text) for text in cells["mean_acceptance_length"][mine]),
            tuple(float(counted[f"pos{j}_uncond"][law].mean()) for j in range(DRAFT_TOKENS)),
        )
    return found


def fit_costs(cells: Mapping[Cell, Measured]) -> dict[str, Any]:
    """Give the ``[costs]`` of a scenario: plain steps by sequences, and drafting per round from the fitted cell."""
    one, many = (np.mean([np.mean(cells[w, c].plain_ms) for w in ("code", "open_chat")]) for c in CONCURRENCY)
    token_ms = max(float(many - one) / (CONCURRENCY[1] - CONCURRENCY[0]), 0.0)
    base_ms = float(one) - token_ms
    drafting_ms = cells[FITTED].round_ms - base_ms - token_ms * (1 + DRAFT_TOKENS)
    return {
        "overhead_s": 0.0,
        "verifier": {"kind": "linear", "base_s": base_ms / 1e3, "per_token_s": token_ms / 1e3},
        "drafter": {"kind": "linear", "base_s": drafting_ms / 1e3, "charged": "per_round"},
    }


def compare_slow_drafter(data: Path) -> tuple[Source, list[Condition], list[Crossover]]:
    """Compare speed-ups (below 1) with their predictions."""
    cells = read_cells(data)
    costs = fit_costs(cells)
    told = {cell: _speedup(data, cell, measured, costs) for cell, measured in cells.items()}
    conditions = [_condition(cell, measured, told[cell]) for cell, measured in cells.items()]
    crossovers = [_crossover(workload, cells, told) for workload in ("code", "open_chat")]
    chat, code = (np.mean([cells[workload, c].round_ms for c in CONCURRENCY]) for workload in ("open_chat", "code"))
    apart = max(np.ptp(one.rounds_ms) / np.mean(one.rounds_ms) for one in cells.values())
    ratio = costs["drafter"]["base_s"] / costs["verifier"]["base_s"]
    source = Source(
        name=NAME,
        title="vLLM, Apertus 70B, drafts of 3 tokens by Apertus 8B",
        kind="published",
        device="4 x NVIDIA GH200",
        clock="wall time per output token, median over requests",
        fitted_on=(
            "plain decoding at both concurrencies; speculation on code at concurrency 1: "
            f"{costs['drafter']['base_s'] * 1e3:.0f} ms of drafting a round"
        ),
        explained=(
            f"A round on chat takes {chat:.0f} ms, one on code {code:.0f} ms (means of both concurrencies): the "
            f"error on chat, for which the table gives no reason. Repeats of a cell differ by up to {apart:.1%}.",
            f"Drafting three tokens takes {ratio:.0f} times as long as a step of the verifier; even if all were "
            f"accepted, the speed-up would be {(1 + DRAFT_TOKENS) / (1 + ratio):.2f}.",
            "The n-gram cells are left out: the counters tell nothing of rounds in which nothing was found.",
        ),
        citation="apertus-70b (transcribed, rounded)",
    )
    return source, conditions, crossovers


def recording(data: Path, cell: Cell, measured: Measured, seed: int = 0) -> TraceSet:
    """Give a made-up recording with the cell's acceptance by position."""
    file = table_path(data, _FOLDER, "per_position.dev.csv")
    law = acceptance_law(measured.rates, f"{file}: {cell[0]} {cell[1]}")
    return synthesize(
        [(1, _TOKENS)] * _REQUESTS,
        [law] * _REQUESTS,
        "counters by position",
        origin=Origin("Apertus-70B", DRAFTER, "draft_model", temperature=0.0, device="4 x NVIDIA GH200"),
        seed=seed,
        rng=np.random.default_rng(seed),
        prompts=[prompt_source(file, cell[0], _REQUESTS)],
        domain=cell[0],
    )


def _speedup(data: Path, cell: Cell, measured: Measured, costs: dict[str, Any]) -> float:
    traces = recording(data, cell, measured)
    policies: tuple[dict[str, Any], ...] = ({"policy": "none"}, {"policy": "fixed", "draft_tokens": DRAFT_TOKENS})
    plain, drafted = (
        serve(
            {
                "drafter": {"name": DRAFTER},
                "stopping": stopping,
                "engine": {"max_num_seqs": cell[1]},
                "workload": {"kind": "closed", "concurrency": cell[1], "keep_full": True},
                "costs": costs,
            },
            traces,
        )
        for stopping in policies
    )
    return float(np.median(plain.decode_s / (plain.tokens - 1)) / np.median(drafted.decode_s / (drafted.tokens - 1)))


def _condition(cell: Cell, measured: Measured, told: float) -> Condition:
    role: Role = "fit" if cell == FITTED else "held-out"
    real = np.array(measured.speedups)
    return Condition(
        source=NAME,
        name=f"{cell[0]}, concurrency {cell[1]}",
        role=role,
        repeats=len(real),
        compared=(Compared("speedup", float(real.mean()), told, float(np.ptp(real) / 2 / real.mean())),),
        labels={
            "drafter": "draft model",
            "draft_tokens": str(DRAFT_TOKENS),
            "batch": str(cell[1]),
            "domain": cell[0],
            "arrivals": "closed loop",
            "acceptance": "counted by position, made into a recording",
        },
        notes=("ratio of median times per token",),
    )


def _crossover(workload: str, cells: Mapping[Cell, Measured], told: Mapping[Cell, float]) -> Crossover:
    real = tuple(float(np.mean(cells[workload, c].speedups)) for c in CONCURRENCY)
    predicted = tuple(told[workload, c] for c in CONCURRENCY)
    first = [next((c for c, v in zip(CONCURRENCY, by, strict=True) if v <= 1), None) for by in (real, predicted)]
    return Crossover(
        NAME,
        f"draft model, {workload}",
        str(DRAFT_TOKENS),
        CONCURRENCY,
        first[0],
        first[1],
        real,
        predicted,
        fitted=workload == FITTED[0],
    )
