"""Accepted length against the tokens that a drafter was trained on, from the learning curves of a distillation."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from analysis.common.bootstrap import Estimate
from analysis.laws.law import Law, LawPoint, compare_curves, fit_all
from calibration.common.errors import ReportError

COLUMNS = ("student", "tokens", "tokens_per_round", "held_out_tokens")
"""What the table must have; `calibration.training` writes them, tokens per round with drafts of 4, bonus included."""

CURVE_DRAFT_TOKENS = 4


def training_law(path: str | Path, *, seed: int = 0) -> Law:
    """Give accepted tokens per round (bonus not included) against training tokens, one curve a student.

    `path` is a CSV with the columns of `COLUMNS`, one row a student and checkpoint; its tokens per round are those
    of `calibration.training`, for drafts of 4, and are counted here less one. Rows before any training (0 tokens)
    have no logarithm and are left out. The points carry no interval: the table has none. Raises `ReportError` for a
    table that cannot be used.
    """
    rows = _read(Path(path))
    held_out = {int(row["held_out_tokens"]) for row in rows}
    grouped: dict[str, list[LawPoint]] = defaultdict(list)
    for row in rows:
        if float(row["tokens"]) > 0:
            accepted = float(row["tokens_per_round"]) - 1
            grouped[row["student"]].append(LawPoint(float(row["tokens"]), Estimate(accepted, None, None, 0)))
    scale = float(CURVE_DRAFT_TOKENS)
    ordered = sorted(grouped.items(), key=lambda item: -max(p.y.value or 0.0 for p in item[1]))
    curves = tuple(fit_all(name, points, scale=scale) for name, points in ordered)
    if not curves:
        raise ReportError(f"{path}: at least one row must have tokens > 0, got none")
    levels = max(len(curve.points) for curve in curves)
    reach = max(p.x for c in curves for p in c.points) / min(p.x for c in curves for p in c.points)
    return Law(
        key="training-tokens",
        title="Accepted length against training tokens",
        x_name="Training tokens",
        y_name=f"Accepted tokens per round of {CURVE_DRAFT_TOKENS} drafted (bonus not included)",
        kind="measured",
        source=f"{len(curves)} students at up to {levels} checkpoints, on {_span(held_out)} held-out tokens each",
        requests=None,
        curves=curves,
        compared="students",
        comparison=compare_curves(curves, scale=scale, seed=seed),
        caution=(
            f"the tokens span a factor of {reach:.3g} only; checkpoints of one run under one learning-rate schedule, "
            "not runs trained for each number of tokens; every student is measured on the same held-out text"
        ),
    )


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ReportError(
                    f"{path}: learning curves need the columns {', '.join(COLUMNS)}, got no {missing[0]}"
                )
            rows = list(reader)
    except OSError as fault:
        raise ReportError(f"{path}: learning curves must be a readable CSV file, got {fault.strerror}") from None
    for line, row in enumerate(rows, start=2):
        for name in COLUMNS[1:]:
            try:
                float(row[name])
            except (TypeError, ValueError):
                raise ReportError(f"{path}, line {line}: {name} must be a number, got '{row[name]}'") from None
    return rows


def _span(values: set[int]) -> str:
    return f"{min(values):,}" if len(values) == 1 else f"{min(values):,} to {max(values):,}"
