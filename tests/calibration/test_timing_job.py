"""Timing jobs: faults with their places, the order of the cells, the bundled recipes and what they will take."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from timing_estimate import EFFICIENCY, H100, expected_run_s, expected_step_s, step_floor_s

from calibration.common.errors import CalibrationError
from calibration.timing import SHAPES, StepCell, TimingJob, load_timing_job, parse_timing_job
from calibration.timing.gridfile import timed_layers

RECIPES = Path(__file__).parents[2] / "recipes" / "timing"
TABLE = {
    "shapes": ["tiny"],
    "dtypes": ["fp32"],
    "graphs": [False],
    "batches": [1, 4, 2],
    "new_tokens": [1, 5],
    "contexts": [8],
}


def job(**changes):
    return parse_timing_job({"grid": [{**TABLE, **changes}]})


def test_every_fault_is_told_at_once_with_its_place():
    data = {
        "repeats": 0,
        "budgets": 3,
        "device": "cude",
        "grid": [
            {**TABLE, "shapes": ["llama-3-8", "tiny"], "dtypes": ["bf8"], "batches": [0, 1024], "energie": True},
            {**TABLE, "contexts": [8, 8], "new_tokens": "1", "graphs": [1]},
            {"shapes": [], "dtypes": ["fp8"]},
            7,
        ],
    }
    with pytest.raises(CalibrationError) as fault:
        parse_timing_job(data, where="job.toml")
    assert sorted(str(fault.value).splitlines()) == sorted(
        [
            "job.toml: device: must be one of auto, cpu, cuda, got 'cude'; did you mean 'cuda'?",
            "job.toml: repeats: must be >= 1, got 0",
            "job.toml: budgets: no such key; did you mean 'budget_s'?",
            "job.toml: grid[0].shapes: no such shape, got 'llama-3-8'; did you mean 'llama-3-8b'?",
            "job.toml: grid[0].dtypes[0]: must be one of bf16, fp16, fp32, fp8, got 'bf8'; did you mean 'fp8'?",
            "job.toml: grid[0].batches[0]: must be >= 1, got 0",
            "job.toml: grid[0].batches[1]: must be <= 512, got 1024",
            "job.toml: grid[0].energie: no such key; did you mean 'energy'?",
            "job.toml: grid[1].contexts: must not name anything twice",
            "job.toml: grid[1].new_tokens: must be a list, got '1'",
            "job.toml: grid[1].graphs[0]: must be a boolean, got 1",
            "job.toml: grid[2].shapes: must have at least 1 item",
            "job.toml: grid[2].graphs: must be given",
            "job.toml: grid[3]: must be a table, got 7",
        ]
    )


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"contexts": []}, "batches, contexts and one of new_tokens, trees go together"),
        ({"prefill_batches": [1]}, "prefill_batches and prefill_tokens go together"),
        (
            {"batches": [], "new_tokens": [], "contexts": []},
            "batches, new_tokens and contexts, or prefill_batches and prefill_tokens",
        ),
    ],
)
def test_lists_that_leave_nothing_to_time_are_refused(changes, rule):
    with pytest.raises(CalibrationError) as fault:
        job(**changes)
    assert str(fault.value) == f"timing job: grid[0]: must name steps: {rule}"


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "job.toml"
    with pytest.raises(CalibrationError, match=r"job\.toml: not found$"):
        load_timing_job(path)
    path.write_text("grid = [")
    with pytest.raises(CalibrationError, match=r"job\.toml: not valid TOML \("):
        load_timing_job(path)
    path.write_bytes(b"\xff")
    with pytest.raises(CalibrationError, match=r"job\.toml: not UTF-8 text$"):
        load_timing_job(path)
    with pytest.raises(CalibrationError, match=r": cannot be read \("):
        load_timing_job(tmp_path)


def test_a_table_is_all_combinations_of_its_lists():
    table = {"trees": [3, 4], "prefill_batches": [1, 2], "prefill_tokens": [16], "parts": ["whole"]}
    cells = list(job(**table).cells())
    wanted = {StepCell("tiny", "whole", "fp32", False, "chain", "verify", b, n, 8) for b in (1, 4, 2) for n in (1, 5)}
    wanted |= {
        StepCell("tiny", "whole", "fp32", False, "tree", "verify", b, n + 1, 8, n) for b in (1, 4, 2) for n in (3, 4)
    }
    wanted |= {StepCell("tiny", "whole", "fp32", False, "chain", "prefill", b, 16, 0) for b in (1, 2)}
    assert set(cells) == wanted
    assert len(cells) == len(wanted)


def test_heads_are_timed_once_for_all_contexts_and_trees():
    cells = list(job(parts=["head"], contexts=[8, 16, 32], trees=[4]).cells())
    assert len(cells) == 3 * 2  # a tree of 4 nodes and a chain of 5 tokens are the same head
    assert {(cell.context_tokens, cell.tree_nodes, cell.attention) for cell in cells} == {(0, None, "chain")}


def test_wherever_a_run_stops_it_has_timed_the_first_entries_of_all_lists():
    """The cells done before any given one include every cell that stands before it in each list."""
    lists = {"batches": [1, 4, 2, 8], "new_tokens": [5, 1, 9], "contexts": [64, 8], "parts": ["whole"]}
    cells = list(job(**lists).cells())
    place = {
        cell: tuple(
            values.index(got)
            for values, got in zip(
                (lists["batches"], lists["new_tokens"], lists["contexts"]),
                (cell.batch, cell.new_tokens, cell.context_tokens),
                strict=True,
            )
        )
        for cell in cells
    }
    for number, cell in enumerate(cells):
        before = {c for c in cells if c != cell and all(a <= b for a, b in zip(place[c], place[cell], strict=True))}
        assert before <= set(cells[:number])


def test_a_cell_of_two_tables_is_timed_once_at_its_first_place_with_energy_if_either_asks():
    twice = parse_timing_job({"grid": [TABLE, {**TABLE, "energy": True, "batches": [4]}]})
    cells = twice.cells()
    assert list(cells) == list(job().cells())
    assert {cell.batch for cell, energy in cells.items() if energy} == {4}


def test_groups_that_share_weights_stand_together_in_a_table():
    cells = list(job(shapes=["tiny", "tiny-qwen"], dtypes=["fp32", "bf16"]).cells())
    groups = [cell.group for cell in cells]
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    assert changes + 1 == len(set(groups)) == 2 * 2 * 3


def test_the_small_recipe_runs_on_any_machine():
    small = load_timing_job(RECIPES / "tiny.toml")
    assert small.device == "cpu"
    assert {cell.shape for cell in small.cells()} == {"tiny", "tiny-qwen"}
    assert not any(cell.graph or cell.dtype == "fp8" for cell in small.cells())


def test_the_recipe_of_a_large_card_covers_what_it_should_within_the_time_it_states():
    path = RECIPES / "h100.toml"
    large = load_timing_job(path)
    cells = large.cells()
    assert {cell.dtype for cell in cells} == {"bf16", "fp8"}
    assert {cell.graph for cell in cells} == {True, False}
    assert {cell.part for cell in cells} == {"whole", "layer", "head"}
    assert {"llama-2-70b", "llama-3-70b", "codellama-34b", "llama-2-13b", "llama-3-8b"} <= {c.shape for c in cells}
    assert {name for name in SHAPES if name.startswith("qwen")} <= {cell.shape for cell in cells}
    assert (min(c.batch for c in cells), max(c.batch for c in cells)) == (1, 512)
    assert {1, 64} <= {cell.new_tokens for cell in cells if cell.operation == "verify"}
    assert max(cell.context_tokens for cell in cells) == 32_768
    assert any(cell.attention == "tree" for cell in cells)
    assert any(cells.values())
    minutes = expected_run_s(large, H100) / 60
    assert minutes <= 25
    assert large.budget_s is not None
    assert minutes <= 3 * large.budget_s / 60
    stated = re.search(r"takes about (\d+) minutes", path.read_text(encoding="utf-8"))
    assert stated is not None
    assert int(stated[1]) == round(minutes)


def test_the_recipes_hold_nothing_twice():
    for path in RECIPES.glob("*.toml"):
        assert TimingJob.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).repeats >= 3


def test_the_roofline_of_one_token_is_reading_the_weights_and_of_a_prompt_the_arithmetic():
    shape = SHAPES["llama-3-8b"]
    decode = StepCell("llama-3-8b", "whole", "bf16", True, "chain", "verify", 1, 1, 0)
    assert step_floor_s(shape, decode, 32, H100) == pytest.approx(2 * 8.03e9 / 3.35e12, rel=0.001)
    prompt = StepCell("llama-3-8b", "whole", "bf16", True, "chain", "prefill", 4, 2048, 0)
    matrices = 2 * 6.98e9 * 8192  # the head sees four tokens only
    scores = 32 * 8192 * 4 * 1024 * 4096  # half of the square, queries by keys and weights by values
    assert step_floor_s(shape, prompt, 32, H100) == pytest.approx((matrices + scores) / 9.9e14, rel=0.002)
    kernels = expected_step_s(shape, decode, 32, H100) - step_floor_s(shape, decode, 32, H100) / EFFICIENCY
    assert 0 < kernels < 0.003


def test_what_does_not_fit_or_is_skipped_costs_no_time_and_energy_costs_a_second():
    table = {"shapes": ["llama-3-70b"], "dtypes": ["bf16"], "batches": [1], "new_tokens": [1], "parts": ["whole"]}
    assert expected_run_s(job(**table), H100) == 0
    eight = {**table, "shapes": ["llama-3-8b"]}
    seconds = expected_run_s(job(**eight), H100)
    assert 0 < seconds < 5
    assert expected_run_s(job(**eight, energy=True), H100) == pytest.approx(seconds + 1)
    assert expected_run_s(job(**{**eight, "batches": [512], "new_tokens": [64]}), H100) == 0
    assert timed_layers(SHAPES["llama-3-8b"], "whole", "bf16", H100.cache_bytes) == 32
