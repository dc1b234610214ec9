"""Running a timing job on a CPU: every cell, resumption, budgets, memory, and what a device must refuse."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

import calibration.models.clock as clock
import calibration.timing.bench as bench
import calibration.timing.run as run
from calibration.common.errors import CalibrationError
from calibration.timing import (
    StepCell,
    composing_errors,
    load_timing_job,
    parse_timing_job,
    read_grid,
    step_times,
    time_shapes,
)
from calibration.timing.gridfile import cells_of

TABLE = {
    "shapes": ["tiny"],
    "dtypes": ["fp32"],
    "graphs": [False],
    "parts": ["layer", "head"],
    "batches": [1, 2],
    "new_tokens": [1, 3],
    "contexts": [8],
    "trees": [2],
}


def job(top=None, **changes):
    return parse_timing_job({"device": "cpu", "repeats": 2, "warmups": 1, **(top or {}), "grid": [TABLE | changes]})


@pytest.fixture(scope="module", autouse=True)
def _four_layers(tmp_path_factory):
    """Tiny layers all fit a cache: let no system's own size decide how many are timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_CPU_CACHES", tmp_path_factory.getbasetemp() / "none")
        yield


@pytest.fixture
def timed(monkeypatch):
    """The cells whose steps were made, in order."""
    seen = []
    original = bench.Bench.timed

    def noted(self, cell):
        seen.append(cell)
        return original(self, cell)

    monkeypatch.setattr(bench.Bench, "timed", noted)
    return seen


def rows(grid):
    names = [name for name in grid.steps.column_names if name not in ("seconds", "joules")]
    return grid.steps.select(names).to_pylist()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    from pathlib import Path

    path = Path(__file__).parents[2] / "recipes" / "timing" / "tiny.toml"
    stages = []
    chosen = load_timing_job(path)
    out = tmp_path_factory.mktemp("recipe") / "grid"
    return chosen, time_shapes(chosen, out, lambda *stage: stages.append(stage)), out, stages


def test_the_small_recipe_gives_every_cell_in_every_repeat(recipe):
    chosen, grid, out, stages = recipe
    assert grid.complete
    assert cells_of(grid.steps) == list(chosen.cells())
    assert grid.skipped.num_rows == 0
    assert grid.steps.num_rows == chosen.repeats * len(chosen.cells())
    assert grid.steps["joules"].null_count == grid.steps.num_rows  # a CPU reports none: missing, not zero
    assert min(grid.steps["seconds"].to_pylist()) > 0
    assert stages[0] == ("time shapes", 0, len(chosen.cells()))
    assert stages[-1] == ("time shapes", len(chosen.cells()), len(chosen.cells()))
    assert read_grid(out).steps.equals(grid.steps)
    assert sorted(path.name for path in out.parent.iterdir()) == ["grid"]  # the partial folder is gone
    layers = {(r["shape"], r["part"], r["layers"]) for r in rows(grid)}
    assert layers == {
        ("tiny", "whole", 6),
        ("tiny", "layer", 4),
        ("tiny", "head", 0),
        ("tiny-qwen", "whole", 4),
        ("tiny-qwen", "layer", 4),
        ("tiny-qwen", "head", 0),
    }


def test_composed_steps_are_near_the_whole_ones(recipe):
    """A loose bound: a shared CPU disturbs steps of half a millisecond."""
    errors = composing_errors(recipe[1])
    whole = {cell for cell in recipe[0].cells() if cell.part == "whole"}
    assert len(errors) == len(whole)
    assert abs(errors["relative_error"].median()) < 0.5
    assert set(step_times(recipe[1]).column("part").to_pylist()) == {"whole"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, timed):
    chosen = job()
    straight = time_shapes(chosen, tmp_path / "straight")
    timed.clear()

    def stop(stage, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_shapes(chosen, tmp_path / "out", stop)
    assert not (tmp_path / "out").exists()
    parts = sorted((tmp_path / "out.partial").glob("part-*"))
    assert pq.read_table(parts[0] / "steps.parquet").num_rows == 5 * 2
    again = time_shapes(chosen, tmp_path / "out")
    assert rows(again) == rows(straight)
    assert len(timed) == len(set(timed)) == len(chosen.cells())  # nothing was timed twice
    assert not (tmp_path / "out.partial").exists()


def test_a_budget_stops_between_cells_and_says_what_is_missing(tmp_path, timed, monkeypatch):
    """A clock that moves 1 s a look; every run of 3 s or more does a few cells, and all of them come in the end."""
    now = iter(range(10**6))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(now)))
    chosen = job({"budget_s": 12})
    total, calls, done = len(chosen.cells()), 0, 0
    while True:
        grid = time_shapes(chosen, tmp_path / "out")
        calls += 1
        now_done = len(cells_of(grid.steps))
        assert now_done > done
        done = now_done
        missing = sum(group.cells for group in grid.manifest.missing)
        assert done + missing == total
        assert grid.complete == (missing == 0)
        assert cells_of(grid.steps) == list(chosen.cells())[:done]  # the most useful first
        if grid.complete:
            break
        assert read_grid(tmp_path / "out").manifest.missing == grid.manifest.missing
        assert (tmp_path / "out.partial").is_dir()
    assert calls > 1
    assert len(timed) == len(set(timed)) == total
    assert rows(grid) == rows(time_shapes(job(), tmp_path / "straight"))


def test_the_budget_may_change_between_calls_but_nothing_else(tmp_path):
    first = time_shapes(job({"budget_s": 1e-6}), tmp_path / "out")
    assert len(cells_of(first.steps)) == 1
    (group, *_) = first.manifest.missing
    assert (group.shape, group.part, group.dtype) == ("tiny", "layer", "fp32")
    with pytest.raises(CalibrationError, match=r"partial: holds a job begun with job = .*, got .*delete the"):
        time_shapes(job({"seed": 1}), tmp_path / "out")
    assert time_shapes(job({"budget_s": 1000}), tmp_path / "out").complete


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(CalibrationError, match="must be new, empty or an older timing grid"):
        time_shapes(job(), tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").touch()
    with pytest.raises(CalibrationError, match="must be new or an interrupted job"):
        time_shapes(job(), tmp_path / "new")


def test_cells_beyond_the_memory_are_listed_and_not_tried(tmp_path, timed):
    chosen = job({"memory_gib": 0.01}, batches=[1, 512], contexts=[8, 32_768])
    grid = time_shapes(chosen, tmp_path / "out")
    assert grid.complete
    skipped = cells_of(grid.skipped)
    # KV cache of 4 layers, 32 keys and 32 values a token, 4 bytes each: 5.5 MiB for 512 x (8 + 3) tokens (which also
    # need 6.8 MiB to work), 32 MiB for 32,768
    assert {(cell.batch, cell.context_tokens) for cell in skipped if cell.part == "layer"} == {
        (1, 32_768),
        (512, 32_768),
        (512, 8),
    }
    assert StepCell("tiny", "layer", "fp32", False, "chain", "verify", 512, 1, 8) in timed
    assert {cell.part for cell in timed} == {"layer", "head"}
    assert set(timed) | set(skipped) == set(chosen.cells())
    assert not set(timed) & set(skipped)
    reasons = grid.skipped["reason"].to_pylist()
    assert all(reason.startswith("memory: needs 0.0") and reason.endswith("0.01 GiB are free") for reason in reasons)


def test_steps_of_too_many_tokens_are_listed(tmp_path):
    grid = time_shapes(job({"max_step_tokens": 3}), tmp_path / "out")
    assert {cell.batch * cell.new_tokens for cell in cells_of(grid.steps)} == {1, 2, 3}
    assert set(grid.skipped["reason"].to_pylist()) == {"tokens: 6 in the step exceed max_step_tokens = 3"}


@pytest.mark.parametrize("words", [None, "DefaultCPUAllocator: not enough memory", "CUDA error: out of memory"])
def test_an_allocation_that_fails_costs_its_cell_only(tmp_path, monkeypatch, words):
    fault = torch.OutOfMemoryError("CUDA out of memory") if words is None else RuntimeError(words)
    original = bench.Bench.work

    def work(self, cell):
        if cell.batch == 2 and cell.tree_nodes is None and self.part == "layer":
            raise fault
        return original(self, cell)

    monkeypatch.setattr(bench.Bench, "work", work)
    chosen = job()
    grid = time_shapes(chosen, tmp_path / "out")
    failed = [c for c in chosen.cells() if c.batch == 2 and c.tree_nodes is None and c.part == "layer"]
    assert cells_of(grid.skipped) == failed
    assert set(grid.skipped["reason"].to_pylist()) == {"memory: an allocation failed"}
    assert set(cells_of(grid.steps)) == set(chosen.cells()) - set(failed)


def test_weights_that_cannot_be_allocated_cost_their_part_and_are_tried_once(tmp_path, monkeypatch):
    tries = []
    original = bench.Bench.build

    def build(shape, part, *rest):
        tries.append(part)
        if part == "layer":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(shape, part, *rest)

    monkeypatch.setattr(bench.Bench, "build", build)
    grid = time_shapes(job(), tmp_path / "out")
    assert tries == ["layer", "head"]
    assert {cell.part for cell in cells_of(grid.skipped)} == {"layer"}
    assert {cell.part for cell in cells_of(grid.steps)} == {"head"}


def test_any_other_fault_stops_the_run_and_keeps_what_is_done(tmp_path, monkeypatch):
    original = bench.Bench.work

    def work(self, cell):
        if cell.batch == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(self, cell)

    monkeypatch.setattr(bench.Bench, "work", work)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        time_shapes(job(), tmp_path / "out")
    assert list((tmp_path / "out.partial").glob("part-*"))


def test_graphs_and_fp8_are_refused_on_a_cpu_before_anything_is_built(tmp_path, timed):
    with pytest.raises(CalibrationError) as refusal:
        time_shapes(job(graphs=[False, True], dtypes=["fp8", "fp32"]), tmp_path / "out")
    assert str(refusal.value).splitlines() == [
        "graphs: CUDA graphs need a CUDA device, got cpu; leave true out",
        "dtypes: fp8 needs a CUDA device of compute capability 8.9 or newer, got cpu",
    ]
    assert not timed
    assert not list(tmp_path.iterdir())
    cell = StepCell("tiny", "head", "fp32", True, "chain", "verify", 1, 1, 0)
    one = bench.Bench.build(run.SHAPES["tiny"], "head", "fp32", torch.device("cpu"), 0)
    with pytest.raises(CalibrationError, match="graph: CUDA graphs need a CUDA device, got cpu"):
        one.timed(cell)


def test_energy_is_read_for_the_cells_that_ask_and_only_there(tmp_path, monkeypatch):
    """A counter that rises by 3 J a step; cells without energy stay missing."""
    counter = {"mj": 0}
    original = bench.Bench.timed

    def metered(self, cell):
        step = original(self, cell)

        def run_once():
            counter["mj"] += 3000
            return step()

        return run_once

    monkeypatch.setattr(bench.Bench, "timed", metered)
    monkeypatch.setattr(clock, "energy_counter_mj", lambda device: lambda: counter["mj"])
    monkeypatch.setattr(clock, "ENERGY_WINDOW_S", 0.005)
    tables = [TABLE | {"energy": True, "batches": [2], "trees": []}, TABLE]
    chosen = parse_timing_job({"device": "cpu", "repeats": 2, "warmups": 1, "grid": tables})
    steps = time_shapes(chosen, tmp_path / "out").steps.to_pylist()
    for row in steps:
        wanted = 3.0 if row["batch"] == 2 and (row["tree_nodes"] is None) and row["new_tokens"] in (1, 3) else None
        assert row["joules"] == wanted
    assert any(row["joules"] is None for row in steps)


def test_the_grid_says_what_it_was_made_on(recipe):
    manifest = json.loads((recipe[2] / "manifest.json").read_text())
    assert manifest["format"] == "timing-grid"
    assert manifest["device"]["kind"] == "cpu"
    assert manifest["software"]["torch"] == torch.__version__
    assert manifest["job"]["repeats"] == recipe[0].repeats
    assert [shape["name"] for shape in manifest["shapes"]] == ["tiny", "tiny-qwen"]
    assert manifest["missing"] == []
    assert not any("/" in note for note in manifest["notes"])


def test_the_free_memory_is_a_number_of_bytes_where_the_system_says():
    free = bench.free_memory_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_the_last_cache_of_a_cpu_is_the_largest_that_the_system_names(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_CPU_CACHES", tmp_path)
    assert bench.last_cache_bytes(torch.device("cpu")) == 0
    for index, size in enumerate(("32K", "1024K", "36864K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert bench.last_cache_bytes(torch.device("cpu")) == 36 * 2**20
