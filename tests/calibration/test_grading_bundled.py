"""The bundled table of graded quality says the same in all its files, and what the README promises."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

import analysis
from calibration.grading.builtin import builtin_items, digest
from calibration.grading.table import COLUMNS

FOLDER = Path(analysis.__file__).parent / "cascade" / "bundled"
ROWS = list(csv.DictReader((FOLDER / "smollm2-135m.csv").read_text(encoding="utf-8").splitlines()))
TOLD = json.loads((FOLDER / "smollm2-135m.json").read_text(encoding="utf-8"))


def test_it_is_graded_on_the_builtin_items() -> None:
    items = builtin_items(0)
    assert TOLD["items"]["sha256"] == digest(items)
    assert list(dict.fromkeys(row["item"] for row in ROWS)) == [item.id for item in items]
    assert tuple(ROWS[0]) == COLUMNS
    assert len(ROWS) == len(items) * len(TOLD["stages"])
    assert (FOLDER / "smollm2-135m.csv").stat().st_size < 400_000


def test_table_and_manifest_agree() -> None:
    for name, stage in TOLD["stages"].items():
        mine = [row for row in ROWS if row["stage"] == name]
        assert round(np.mean([int(row["correct"]) for row in mine]), 4) == stage["quality"]
        assert {float(row["cost"]) for row in mine} == {stage["cost_s"]}


def test_quality_and_cost_rise_from_stage_to_stage() -> None:
    stages = list(TOLD["stages"].values())
    quality, cost = [s["quality"] for s in stages], [s["cost_s"] for s in stages]
    assert quality == sorted(quality)
    assert cost == sorted(cost)
    assert all(pair["gain_95"][0] > 0 for pair in TOLD["neighbours"])
    assert all(stage["quality_95"][0] > stage["chance"] for stage in stages)
