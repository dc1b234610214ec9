"""The TraceSet contract: round trip, refusal of every kind of broken file, atomic writing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import iid_traces, manifest, restate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.common.errors import TraceError
from calibration.traces import TABLES, TraceSet, arrow_schema, make_table

PROBABILITY = st.none() | st.floats(0, 1, width=32)
NATS = st.none() | st.floats(0, 20, width=32)


@st.composite
def trace_sets(draw: st.DrawFn) -> TraceSet:
    """Any TraceSet that keeps the contract: ragged sequences, missing values, several drafters."""
    mode = draw(st.sampled_from(["greedy", "sampled"]))
    drafters = ("a", "b")[: draw(st.integers(1, 2))]
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    names = [f"s{i}-é" for i in range(len(lengths))]
    columns: dict[str, list[object]] = {c.name: [] for c in TABLES["positions"]}
    for name, length in zip(names, lengths, strict=True):
        for drafter in drafters:
            for t in range(draw(st.integers(0, 1)) if length > 1 else 0, length):
                run = draw(st.integers(0, length - t))
                proposed = draw(st.none() | st.integers(run, 9))
                numbers = (
                    None if proposed is None else st.lists(st.integers(1, 9), min_size=proposed, max_size=proposed)
                )
                known = mode == "greedy" or draw(st.booleans())
                row = {
                    "sequence_id": name,
                    "drafter": drafter,
                    "position": t,
                    "run_length": run if known else None,
                    "proposal_length": proposed,
                    "proposal_nodes": None if numbers is None else draw(st.none() | numbers),
                    "draft_layers": None if numbers is None else draw(st.none() | numbers),
                    "accept_probability": draw(PROBABILITY if known else st.floats(0, 1, width=32)),
                    "emitted_rank": draw(st.none() | st.integers(0, 9)),
                    "drafter_confidence": draw(PROBABILITY),
                    "drafter_entropy": draw(NATS),
                    "verifier_confidence": draw(PROBABILITY),
                    "verifier_entropy": draw(NATS),
                    "overlap": draw(PROBABILITY),
                }
                for key, value in row.items():
                    columns[key].append(value)
    ids = [draw(st.none() | st.just(list(range(n)))) for n in lengths]
    timings = draw(st.integers(0, 3))
    return TraceSet.build(
        manifest(drafters=drafters, mode=mode),
        {
            "sequences": make_table(
                "sequences",
                {
                    "sequence_id": names,
                    "domain": [draw(st.text(min_size=1, max_size=4)) for _ in names],
                    "prompt_tokens": [draw(st.integers(1, 9)) for _ in names],
                    "output_tokens": lengths,
                    "finish_reason": [draw(st.sampled_from(["stop", "length", "unknown"])) for _ in names],
                    "output_token_ids": ids,
                    "quality": [draw(PROBABILITY) for _ in names],
                },
            ),
            "positions": make_table("positions", columns),
            "timings": make_table(
                "timings",
                {
                    "model": ["verifier"] * timings,
                    "operation": ["verify"] * timings,
                    "batch": [1] * timings,
                    "new_tokens": [draw(st.integers(1, 9)) for _ in range(timings)],
                    "context_tokens": [0] * timings,
                    "repeat": list(range(timings)),
                    "seconds": [draw(st.floats(1e-9, 1e3)) for _ in range(timings)],
                },
            ),
        },
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(traces=trace_sets())
def test_round_trip_is_exact(traces: TraceSet, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round") / "trip"
    back = TraceSet.read(traces.write(folder))
    for name in TABLES:
        assert getattr(back, name).equals(getattr(traces, name))
        assert getattr(back, name).schema.equals(arrow_schema(name))
    assert back.manifest.model_copy(update={"tables": {}}) == traces.manifest


def test_equal_sets_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        iid_traces(0.6, np.random.default_rng(1)).write(tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_readable_without_our_code(tmp_path: Path) -> None:
    iid_traces(0.6, np.random.default_rng(1), sequences=3, output_tokens=5).write(tmp_path / "set")
    frame = pq.read_table(tmp_path / "set" / "positions.parquet").to_pandas()
    assert list(frame["position"][:5]) == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["tables"]["positions"]["rows"] == 15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A written set of two sequences of four tokens."""
    return iid_traces(0.5, np.random.default_rng(3), sequences=2, output_tokens=4).write(tmp_path / "set")


def _replace(folder: Path, table: str, column: str, values: object, dtype: pa.DataType | None = None) -> None:
    path = folder / f"{table}.parquet"
    old = pq.read_table(path)
    index = old.column_names.index(column)
    array = pa.array(values, type=dtype or old.schema.field(column).type)
    pq.write_table(old.set_column(index, column, array), path)
    restate(folder)


BROKEN = {
    "out of order": ("position", [0, 1, 3, 2, 0, 1, 2, 3], "row 2: must follow position 1"),
    "past the end": ("run_length", [0, 0, 0, 2, 0, 0, 0, 0], "row 3: must not run past the end"),
    "accepted over drafted": ("proposal_length", [9, 9, 9, 9, 9, 9, 9, -1], "row 7: must lie in"),
    "probability": ("accept_probability", [0, 0, 0, 0, 0, 1.5, 0, 0], "row 5: must lie in [0.0, 1.0], got 1.5"),
    "not a number": ("overlap", [None, float("nan")] + [None] * 6, "row 1: must be finite"),
    "negative entropy": ("drafter_entropy", [1.0, -0.5] + [None] * 6, "row 1: must lie in [0.0, inf], got -0.5"),
    "unknown request": ("sequence_id", ["request-0"] * 4 + ["request-9"] * 4, "row 4: must be in sequences"),
    "unknown drafter": ("drafter", ["drafter"] * 7 + ["drafted"], "row 7: must be in manifest.json"),
    "split group": (
        "sequence_id",
        ["request-0", "request-1", "request-0", "request-0"] + ["request-1"] * 4,
        "must stand together",
    ),
    "missing value": ("position", [None, 1, 2, 3, 0, 1, 2, 3], "row 0: must not be missing"),
    "missing run": ("run_length", [0, 0, None, 0, 0, 0, 0, 0], "row 2: must be present for drafter"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_positions_are_refused_with_their_place(folder: Path, fault: str) -> None:
    column, values, message = BROKEN[fault]
    _replace(folder, "positions", column, values)
    with pytest.raises(TraceError) as caught:
        TraceSet.read(folder)
    assert "positions.parquet: column '" in str(caught.value)
    assert message in str(caught.value)


def test_accepted_beyond_drafted_is_refused(folder: Path) -> None:
    _replace(folder, "positions", "run_length", [1, 3, 1, 1, 0, 0, 0, 0])
    _replace(folder, "positions", "proposal_length", [1, 2, 1, 1, 0, 0, 0, 0])
    with pytest.raises(TraceError, match=r"row 1: accepted must not exceed drafted \(proposal_length = 2\), got 3"):
        TraceSet.read(folder)


def test_wrong_type_is_refused(folder: Path) -> None:
    _replace(folder, "positions", "run_length", ["0"] * 8, pa.string())
    with pytest.raises(TraceError, match=r"positions.parquet: column 'run_length': must be int32, got string"):
        TraceSet.read(folder)


def test_missing_column_is_refused(folder: Path) -> None:
    path = folder / "sequences.parquet"
    pq.write_table(pq.read_table(path).drop_columns("domain"), path)
    restate(folder)
    with pytest.raises(TraceError, match=r"sequences.parquet: column 'domain': is missing"):
        TraceSet.read(folder)


def test_surplus_column_is_refused(folder: Path) -> None:
    path = folder / "sequences.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("extra", pa.array([1, 2])), path)
    restate(folder)
    with pytest.raises(TraceError, match=r"column 'extra': no such column"):
        TraceSet.read(folder)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_truncated_parquet_is_refused(folder: Path, kept: float) -> None:
    path = folder / "positions.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(TraceError, match=r"positions.parquet: not a readable Parquet file"):
        TraceSet.read(folder)


def test_lost_rows_are_refused(folder: Path) -> None:
    path = folder / "positions.parquet"
    pq.write_table(pq.read_table(path).slice(0, 4), path)
    restate(folder)
    with pytest.raises(TraceError, match=r"must hold 8 rows as manifest.json says, got 4"):
        TraceSet.read(folder)


def test_missing_file_and_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "timings.parquet").unlink()
    with pytest.raises(TraceError, match=r"timings.parquet: is missing"):
        TraceSet.read(folder)
    with pytest.raises(TraceError, match=r"manifest.json: not found"):
        TraceSet.read(tmp_path / "nowhere")


def _edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_newer_schema_is_refused(folder: Path) -> None:
    _edit_manifest(folder, schema_version=3, brand_new_field=1)
    with pytest.raises(TraceError, match=r"schema_version must be at most 2, got 3; a newer paceline"):
        TraceSet.read(folder)


def test_every_fault_of_a_manifest_is_named(folder: Path) -> None:
    _edit_manifest(folder, kind="guessed", seed="one", surprise=1)
    with pytest.raises(TraceError) as caught:
        TraceSet.read(folder)
    text = str(caught.value)
    assert "kind: " in text
    assert "got 'guessed'" in text
    assert "seed: " in text
    assert "surprise: " in text


def test_garbage_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema_version": 1,')
    with pytest.raises(TraceError, match=r"manifest.json:1: not valid JSON"):
        TraceSet.read(folder)


def test_quality_and_token_counts_are_checked(folder: Path) -> None:
    _replace(folder, "sequences", "output_token_ids", [[1, 2, 3], None])
    with pytest.raises(TraceError, match=r"row 0: must hold output_tokens = 4 ids, got 3"):
        TraceSet.read(folder)


def test_capped_run_lengths(folder: Path) -> None:
    traces = TraceSet.read(folder)
    tables = {name: getattr(traces, name) for name in TABLES}
    runs = make_table("positions", {**_columns(tables["positions"]), "run_length": [3, 2, 1, 0, 0, 0, 0, 0]})
    with pytest.raises(TraceError, match=r"row 0: must not exceed max_draft_tokens = 2 of 'drafter', got 3"):
        TraceSet.build(manifest(max_draft_tokens=2), {**tables, "positions": runs})


def test_sampled_one_hot_drafters_need_run_lengths(folder: Path) -> None:
    traces = TraceSet.read(folder)
    positions = make_table(
        "positions",
        {**_columns(traces.positions), "run_length": [None] * 8, "accept_probability": [0.5] * 8},
    )
    tables = {"sequences": traces.sequences, "positions": positions}
    assert TraceSet.build(manifest(mode="sampled"), tables).positions.num_rows == 8
    with pytest.raises(TraceError, match=r"run_length.*must be present for drafter 'drafter'"):
        TraceSet.build(manifest(mode="sampled", deterministic=True), tables)


def _columns(table: pa.Table) -> dict[str, object]:
    return {name: table[name].to_pylist() for name in table.column_names}


def test_rollout_steps_count_from_one(folder: Path) -> None:
    traces = TraceSet.read(folder)
    rows = {"sequence_id": ["request-0"] * 3, "drafter": ["drafter"] * 3, "position": [0, 0, 2]}
    rest = {"drafter_confidence": [0.5] * 3, "drafter_entropy": [1.0] * 3}
    tables = {"sequences": traces.sequences, "positions": traces.positions}
    good = make_table("rollouts", {**rows, "step": [1, 2, 1], **rest})
    assert TraceSet.build(traces.manifest, {**tables, "rollouts": good}).rollouts.num_rows == 3
    bad = make_table("rollouts", {**rows, "step": [1, 2, 3], **rest})
    with pytest.raises(TraceError, match=r"rollouts.parquet: column 'step', row 2"):
        TraceSet.build(traces.manifest, {**tables, "rollouts": bad})


def test_a_failed_write_leaves_the_old_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.traces.traceset.pq.write_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        iid_traces(0.9, np.random.default_rng(4)).write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_foreign_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TraceError, match=r"must be new, empty or an older TraceSet"):
        iid_traces(0.5, np.random.default_rng(5)).write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_wrong_value_names_its_column() -> None:
    with pytest.raises(TraceError, match=r"rollouts: column 'position': must be int32"):
        make_table("rollouts", {"sequence_id": ["a"], "drafter": ["d"], "position": ["many"]})
