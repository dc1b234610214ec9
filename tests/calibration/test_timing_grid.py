"""The timing grid's file format, whole steps composed of parts, and the timings it gives a TraceSet."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.common.errors import CalibrationError
from calibration.timing import SHAPES, GridManifest, StepGrid, composed, composing_errors, read_grid, step_times
from calibration.timing import to_timings as timings_of
from calibration.timing.compose import torch_dtype_name
from calibration.timing.gridfile import cells_of, grid_table
from calibration.traces.manifest import DeviceInfo

MANIFEST = GridManifest(
    paceline_version="test",
    created="2026-01-01T00:00:00+00:00",
    device=DeviceInfo(name="paper", kind="unknown"),
    software={},
    job={},
    shapes=(SHAPES["llama-3-70b"], SHAPES["llama-3-8b"]),
)


def row(**changes):
    base = {
        "shape": "llama-3-70b",
        "part": "layer",
        "dtype": "bf16",
        "graph": True,
        "attention": "chain",
        "operation": "verify",
        "batch": 2,
        "new_tokens": 5,
        "context_tokens": 100,
        "tree_nodes": None,
        "layers": 4,
        "repeat": 0,
        "seconds": 0.004,
        "joules": None,
    }
    return base | changes


def head(**changes):
    return row(part="head", context_tokens=0, layers=0, **changes)


def grid(*rows, **manifest):
    return StepGrid.build(MANIFEST.model_copy(update=manifest), grid_table("steps", rows), grid_table("skipped", []))


def test_a_grid_comes_back_as_it_was_written(tmp_path):
    skipped = row(batch=512)
    for name in ("layers", "repeat", "seconds", "joules"):
        del skipped[name]
    tables = grid_table("steps", [row(), head(joules=2.5)]), grid_table("skipped", [skipped | {"reason": "memory"}])
    first = StepGrid.build(MANIFEST, *tables)
    first.write(tmp_path / "grid")
    again = read_grid(tmp_path / "grid")
    assert again.steps.equals(first.steps)
    assert again.skipped.equals(first.skipped)
    assert again.manifest.shapes == MANIFEST.shapes
    assert again.manifest.tables["steps"].rows == 2
    assert again.complete
    assert [str(cell) for cell in cells_of(again.skipped)] == [
        "llama-3-70b layer bf16 graph verify 512 x 5 after 100"
    ]
    plain = pq.read_table(tmp_path / "grid" / "steps.parquet").to_pandas()  # nothing of ours is needed
    assert plain["seconds"].tolist() == [0.004, 0.004]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"part": "half"}, "column 'part', row 1: must be one of whole, layer, head, composed, got 'half'"),
        ({"dtype": "int4"}, "column 'dtype', row 1: must be one of bf16, fp16, fp32, fp8, got 'int4'"),
        ({"operation": "draft"}, "column 'operation', row 1: must be one of prefill, verify, got 'draft'"),
        ({"batch": 0}, "column 'batch', row 1: must be >= 1, got 0"),
        ({"seconds": 0.0}, "column 'seconds', row 1: must be >= 1e-12, got 0.0"),
        ({"seconds": float("inf")}, "column 'seconds', row 1: must be finite, got inf"),
        ({"joules": -1.0}, "column 'joules', row 1: must be >= 0, got -1.0"),
        ({"shape": "gpt-2"}, "column 'shape', row 1: must be in manifest.json, got 'gpt-2'"),
        ({"tree_nodes": 4}, "column 'tree_nodes', row 1: must be given for trees and only for trees, got 4"),
        ({"attention": "tree"}, "column 'tree_nodes', row 1: must be given for trees and only for trees"),
        ({"attention": "tree", "tree_nodes": 5}, "column 'tree_nodes', row 1: must be new_tokens - 1, got 5"),
    ],
)
def test_a_broken_row_is_refused_with_its_place(changes, fault):
    with pytest.raises(CalibrationError) as refusal:
        grid(row(), row(**changes))
    assert str(refusal.value) == f"steps.parquet: {fault}"


def test_a_broken_table_is_refused():
    table = grid_table("steps", [row()])
    for broken, fault in (
        (table.drop_columns(["joules"]), "column 'joules': is missing"),
        (table.append_column("watts", pa.array([1.0])), "column 'watts': no such column in the schema"),
        (table.set_column(6, "batch", pa.array([2.5])), "column 'batch': must be int32, got DataType(double)"),
        (
            table.set_column(6, "batch", pa.array([None], pa.int32())),
            "column 'batch', row 0: must not be missing",
        ),
    ):
        with pytest.raises(CalibrationError) as refusal:
            StepGrid.build(MANIFEST, broken, grid_table("skipped", []))
        assert str(refusal.value) == f"steps.parquet: {fault}"


def test_a_folder_that_is_no_grid_or_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="not found; a timing grid is a folder with"):
        read_grid(tmp_path)
    folder = grid(row()).write(tmp_path / "grid")
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text("{")
    with pytest.raises(CalibrationError, match=r"manifest\.json: not valid JSON"):
        read_grid(folder)
    path.write_text(json.dumps(json.loads(text) | {"schema_version": 2}))
    with pytest.raises(CalibrationError, match="schema_version must be at most 1, got 2; a newer paceline"):
        read_grid(folder)
    path.write_text(json.dumps(json.loads(text) | {"shapes": 3, "colour": "red"}))
    with pytest.raises(CalibrationError) as refusal:
        read_grid(folder)
    assert [line.split(": ")[1] for line in str(refusal.value).splitlines()] == ["shapes", "colour"]
    path.write_text(text)
    table = folder / "steps.parquet"
    pq.write_table(grid_table("steps", [row(seconds=1.0)]), table)
    with pytest.raises(CalibrationError, match=r"steps\.parquet: must have the sha256 that manifest\.json says"):
        read_grid(folder)
    table.write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match=r"steps\.parquet: not a readable Parquet file"):
        read_grid(folder)
    table.unlink()
    with pytest.raises(CalibrationError, match=r"steps\.parquet: is missing"):
        read_grid(folder)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CalibrationError, match="must be new, empty or an older timing grid"):
        grid(row()).write(tmp_path)


def test_a_whole_step_is_its_layers_and_its_head():
    """80 layers of 1 ms each, timed 4 at a time, and a head of 3 ms: 83 ms; repeats paired, energy likewise."""
    rows = [row(repeat=r, seconds=0.004 + r / 1000, joules=1.0) for r in (0, 1)]
    rows += [head(repeat=r, seconds=0.003, joules=0.5) for r in (0, 1)]
    whole = composed(grid(*rows)).to_pandas()
    assert whole["seconds"].tolist() == pytest.approx([0.083, 0.103])
    assert whole["joules"].tolist() == pytest.approx([20.5, 20.5])
    assert whole["part"].unique().tolist() == ["composed"]
    assert whole["layers"].unique().tolist() == [80]
    assert whole["repeat"].tolist() == [0, 1]


def test_layers_meet_the_head_of_their_own_kind_only():
    """Other types, graphs, batches, token counts or operations do not serve; any context and tree does."""
    layers = [row(), row(context_tokens=900), row(attention="tree", tree_nodes=4)]
    strangers = [
        head(dtype="fp8"),
        head(graph=False),
        head(batch=3),
        head(new_tokens=6),
        head(operation="prefill"),
        head(shape="llama-3-8b"),
    ]
    assert composed(grid(*layers, *strangers)).num_rows == 0
    made = composed(grid(*layers, *strangers, head(seconds=0.001)))
    assert made["seconds"].to_pylist() == pytest.approx([0.081] * 3)
    assert cells_of(made)[2].tree_nodes == 4
    assert made["joules"].to_pylist() == [None] * 3  # missing is not zero


def both_ways():
    """A cell timed whole and in parts, one in parts only, one whole only."""
    small = {"shape": "llama-3-8b"}
    rows = [
        row(**small, part="whole", layers=32, repeat=r, seconds=s) for r, s in enumerate((0.0200, 0.0208, 0.0203))
    ]
    rows += [row(**small, repeat=r, seconds=0.0024) for r in range(3)]
    rows += [head(**small, repeat=r, seconds=0.0010) for r in range(3)]
    rows += [row(**small, context_tokens=7, repeat=r) for r in range(3)]
    rows += [row(**small, part="whole", layers=32, batch=9)]
    return grid(*rows)


def test_the_error_of_composing_is_measured_where_both_are_there():
    errors = composing_errors(both_ways())
    assert len(errors) == 1
    assert errors["whole_s"].item() == pytest.approx(0.0203)
    assert errors["composed_s"].item() == pytest.approx(8 * 0.0024 + 0.0010)
    assert errors["relative_error"].item() == pytest.approx(0.0202 / 0.0203 - 1)
    assert errors["context_tokens"].item() == 100


def test_a_measured_whole_step_is_preferred_to_a_composed_one():
    steps = step_times(both_ways()).to_pandas()
    parts = steps.groupby(["batch", "context_tokens"])["part"].unique().map(list).to_dict()
    assert parts == {(2, 7): ["composed"], (2, 100): ["whole"], (9, 100): ["whole"]}
    assert (steps["layers"] == 32).all()


def test_timings_of_a_trace_set_come_out_of_a_grid():
    table = timings_of(both_ways(), "llama-3-8b", "big").to_pandas()
    assert set(table["model"]) == {"big"}
    assert set(table["operation"]) == {"verify"}
    assert list(zip(table["batch"], table["context_tokens"], table["repeat"], strict=True)) == [
        *((2, 7, r) for r in range(3)),
        *((2, 100, r) for r in range(3)),
        (9, 100, 0),
    ]
    assert table["joules"].isna().all()


def test_a_drafter_drafts_with_steps_of_one_token():
    rows = [row(part="whole", layers=80, new_tokens=n, seconds=n / 100) for n in (1, 5)]
    rows.append(row(part="whole", layers=80, operation="prefill", new_tokens=64, context_tokens=0))
    table = timings_of(grid(*rows), "llama-3-70b", "d", role="drafter").to_pandas()
    assert table["operation"].tolist() == ["draft"]
    assert table["new_tokens"].tolist() == [1]
    assert table["seconds"].tolist() == [0.01]
    verifier = timings_of(grid(*rows), "llama-3-70b", "v").to_pandas()
    assert verifier["operation"].tolist() == ["prefill", "verify", "verify"]


def test_a_grid_of_several_kinds_asks_which():
    rows = [row(part="whole", layers=80, dtype=d, graph=g) for d in ("bf16", "fp8") for g in (True, False)]
    several = grid(*rows)
    with pytest.raises(CalibrationError, match=r"^dtype: must be given where the grid has several; .* bf16, fp8$"):
        timings_of(several, "llama-3-70b", "v", graph=True)
    with pytest.raises(CalibrationError, match=r"^graph: must be given where the grid has several; .* false, true$"):
        timings_of(several, "llama-3-70b", "v", dtype="fp8")
    assert timings_of(several, "llama-3-70b", "v", dtype="fp8", graph=False).num_rows == 1
    with pytest.raises(CalibrationError, match=r"^dtype: 'llama-3-70b' was not timed so, got fp16; did you mean"):
        timings_of(several, "llama-3-70b", "v", dtype="fp16", graph=True)
    with pytest.raises(CalibrationError, match=r"^shape 'llama-3-80b': not in this timing grid; did you mean"):
        timings_of(several, "llama-3-80b", "v")
    with pytest.raises(CalibrationError, match="has no whole step of it, measured or composed"):
        timings_of(several, "llama-3-8b", "v")
    with pytest.raises(CalibrationError, match="dtype: not known, got 'fp4'"):
        torch_dtype_name("fp4")
    assert torch_dtype_name("bf16") == "bfloat16"


def test_the_simulator_prices_a_model_that_was_only_timed_in_parts():
    """Layers of 0.5 + 0.02 N ms and a head of 1 ms: the fitted cost of a verify step is 80 of them and a head."""
    from simulator.pricing.fitted import fit_step

    rows = []
    for batch in (1, 2, 4):
        for new in (1, 4, 8):
            rows += [head(batch=batch, new_tokens=new, seconds=1e-3)]
            rows += [
                row(batch=batch, new_tokens=new, context_tokens=c, seconds=4 * (0.5e-3 + 2e-5 * batch * new))
                for c in (10, 100)
            ]
    cost = fit_step(timings_of(grid(*rows), "llama-3-70b", "v"), "v", "verify")
    tokens = np.array([1, 8, 32])
    seconds = cost.step_seconds(np.array([1, 2, 4]), tokens, np.array([10, 100, 200]))
    assert seconds == pytest.approx(80 * (0.5e-3 + 2e-5 * tokens) + 1e-3, rel=1e-6)


def test_a_grid_reads_without_torch():
    import subprocess
    import sys

    code = "import sys, calibration.timing; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_frames_keep_missing_tree_nodes_missing():
    rows = [row(part="whole", layers=80), row(part="whole", layers=80, attention="tree", tree_nodes=4)]
    nodes = step_times(grid(*rows)).to_pandas()["tree_nodes"]
    assert nodes.isna().tolist() == [True, False]
    assert pd.isna(timings_of(grid(*rows), "llama-3-70b", "v").to_pandas()["tree_nodes"]).sum() == 1
