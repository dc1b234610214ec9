"""Measured runs: what is written is read back, and what breaks the contract is refused with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import damages, restate

from calibration.common.errors import TraceError
from calibration.measured import EngineInfo, Manifest, MeasuredRun
from calibration.measured.run import seal as seal_run
from calibration.traces import DeviceInfo

MANIFEST = Manifest(
    paceline_version="0",
    name="batch-2",
    role="fit",
    engine=EngineInfo(name="an engine", version="1", settings={"threads": 1}),
    model="verifier",
    device=DeviceInfo(name="none", kind="unknown"),
    clock="thread-cpu",
    repeats=2,
    created="2026-01-01T00:00:00+00:00",
    command="tests",
    scenario_hash="abc",
    unknown=("energy",),
)
REQUESTS: dict[str, list[Any]] = {
    "repeat": [0, 0, 1],
    "request_id": [0, 1, 0],
    "sequence_id": ["a", "b", "a"],
    "domain": ["chat", "code", "chat"],
    "counted": [True, False, True],
    "arrival_s": [0.0, 0.5, 0.0],
    "first_token_s": [1.0, 2.0, 1.0],
    "finish_s": [3.0, 3.0, 2.5],
    "prompt_tokens": [4, 5, 4],
    "output_tokens": [3, 2, 2],
    "drafts": [1, 0, None],
    "drafted_tokens": [2, 0, None],
    "accepted_tokens": [1, 0, None],
    "emission_s": [[1.0, 3.0], [2.0, 3.0], None],
    "emitted": [[1, 2], [1, 1], None],
    "output_token_ids": [[7, 8, 9], [1, 2], [7, 8]],
}
STEPS: dict[str, list[Any]] = {
    "repeat": [0, 0, 0, 1],
    "step": [0, 1, 1, 0],
    "operation": ["prefill", "draft", "mixed", "prefill"],
    "model": ["verifier", "drafter", "verifier", "verifier"],
    "start_s": [0.0, 1.0, 1.5, 0.0],
    "seconds": [1.0, 0.5, 1.5, 1.0],
    "wall_s": [1.1, 0.6, 1.6, 1.1],
    "sequences": [0, 1, 1, 0],
    "new_tokens": [0, 1, 3, 0],
    "context_tokens": [0, 4, 4, 0],
    "prefill_sequences": [1, 0, 1, 1],
    "prefill_tokens": [4, 0, 5, 4],
    "prefill_context_tokens": [0, 0, 0, 0],
    "drafted_tokens": [0, None, 2, 0],
    "accepted_tokens": [0, None, 1, 0],
    "emitted_tokens": [1, 0, 4, 2],
}


def build(requests: Mapping[str, Any] | None = None, steps: Mapping[str, Any] | None = None) -> MeasuredRun:
    """The run above with some columns replaced."""
    return MeasuredRun.build(MANIFEST, {**REQUESTS, **(requests or {})}, {**STEPS, **(steps or {})}, "x = 1\n")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = build()
    for _ in range(2):  # an older one is replaced
        again = MeasuredRun.read(run.write(tmp_path / "batch-2"))
    assert again.manifest == MANIFEST
    assert again.requests.equals(run.requests)
    assert again.steps.equals(run.steps)
    assert again.scenario == "x = 1\n"
    assert again.requests["emission_s"].to_pylist() == REQUESTS["emission_s"]
    names = {"measured.json", "requests.parquet", "steps.parquet", "scenario.toml"}
    assert {path.name for path in (tmp_path / "batch-2").iterdir()} == names


def test_steps_may_be_unseen(tmp_path: Path) -> None:
    run = MeasuredRun.build(MANIFEST, REQUESTS, None, "")
    assert MeasuredRun.read(run.write(tmp_path / "x")).steps.num_rows == 0


REQUEST_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({name: [] for name in REQUESTS}, "'request_id': must hold at least one row"),
    "a repeat too many": ({"repeat": [0, 0, 2]}, "'repeat', row 2: must be below repeats = 2, got 2"),
    "a repeat is gone": ({"repeat": [0, 0, 0], "request_id": [0, 1, 2]}, "every repeat of 2, 1 is missing"),
    "twice": ({"request_id": [1, 1, 0]}, "'request_id', row 1: must be unique in repeat 0, got 1"),
    "early": ({"first_token_s": [1.0, 0.25, 1.0]}, "'first_token_s', row 1: must not lie before arrival_s"),
    "ends early": ({"finish_s": [3.0, 3.0, 0.5]}, "'finish_s', row 2: must not lie before first_token_s, got 0.5"),
    "accepted": ({"accepted_tokens": [3, 0, None]}, "'accepted_tokens', row 0: must not exceed drafted_tokens"),
    "drafts": ({"drafts": [1, 3, None]}, "'drafts', row 1: must not exceed drafted_tokens, got 3"),
    "ragged": (
        {"emitted": [[3], [1, 1], None]},
        r"'emitted', row 0: must hold as many as entries of .* \(2\), got 1",
    ),
    "counts": ({"emitted": [[1, 3], [1, 1], None]}, "'emitted', row 0: must add up to output_tokens = 3, got 4"),
    "nothing": ({"emitted": [[3, 0], [1, 1], None]}, "'emitted', row 0: must hold counts of at least 1"),
    "times unknown": ({"emitted": [[1, 2], [1, 1], [2]]}, "'emitted', row 2: must be missing where emission_s is"),
    "backwards": ({"emission_s": [[1.0, 3.0], [3.0, 2.0], None]}, "'emission_s', row 1: must never go back"),
    "begins": (
        {"emission_s": [[1.5, 3.0], [2.0, 3.0], None]},
        "'emission_s', row 0: must begin at first_token_s = 1",
    ),
    "ends": (
        {"emission_s": [[1.0, 2.5], [2.0, 3.0], None]},
        "'emission_s', row 0: must end at finish_s = 3, got 2.5",
    ),
    "infinite": ({"emission_s": [[1.0, float("inf")], [2.0, 3.0], None]}, "must hold at least one time, all finite"),
    "ids": ({"output_token_ids": [[7], [1, 2], None]}, r"row 0: must hold as many as output_tokens \(3\), got 1"),
    "type": ({"prompt_tokens": ["a", 5, 4]}, "requests: column 'prompt_tokens': must be int32"),
    "bound": ({"output_tokens": [0, 2, 2]}, r"'output_tokens', row 0: must lie in \[1, inf\], got 0"),
    "missing": ({"domain": ["chat", None, "chat"]}, "'domain', row 1: must not be missing"),
    "unknown column": ({"speed": [1, 2, 3]}, "no such column: speed"),
}


@pytest.mark.parametrize("fault", REQUEST_FAULTS)
def test_faults_of_requests_name_their_place(fault: str) -> None:
    columns, message = REQUEST_FAULTS[fault]
    with pytest.raises(TraceError, match=message):
        build(columns)


STEP_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "repeat": ({"repeat": [0, 0, 0, 7]}, "'repeat', row 3: must be below repeats = 2"),
    "repeat goes back": ({"repeat": [0, 1, 1, 0]}, "'repeat', row 3: must never go back"),
    "number": ({"step": [1, 0, 0, 0]}, "'step', row 1: must never go back in a repeat, got 0"),
    "overlap": ({"start_s": [0.0, 0.5, 1.5, 0.0]}, "'start_s', row 1: must not lie before the end of the row above"),
    "operation": ({"operation": ["prefill", "think", "mixed", "prefill"]}, "'operation', row 1: must be one of"),
    "tokens": ({"new_tokens": [0, 1, 0, 0]}, "'new_tokens', row 2: must be at least one for each of sequences"),
    "prompts": ({"prefill_tokens": [0, 0, 5, 4]}, "'prefill_tokens', row 0: must be at least one a prefill_seq"),
    "prefill": (
        {"sequences": [1, 1, 1, 0], "new_tokens": [1, 1, 3, 0]},
        "'sequences', row 0: must be 0 in a prefill",
    ),
    "draft": (
        {"prefill_sequences": [1, 1, 1, 1], "prefill_tokens": [4, 4, 5, 4]},
        "'prefill_sequences', row 1: must be 0 in a decode or draft step",
    ),
    "accepted": ({"accepted_tokens": [0, None, 3, 0]}, "steps.*'accepted_tokens', row 2: must not exceed"),
    "tokens from nowhere": (
        {"emitted_tokens": [1, 0, 3, 2]},
        "'emitted_tokens': must add up to the 5 tokens that requests of repeat 0 received, got 4",
    ),
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_faults_of_steps_name_their_place(fault: str) -> None:
    columns, message = STEP_FAULTS[fault]
    with pytest.raises(TraceError, match=message):
        build(steps=columns)


def change(folder: Path, **fields: Any) -> None:
    """Change fields of the manifest in `folder`."""
    path = folder / "measured.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_faults_of_files_name_them(tmp_path: Path) -> None:
    folder = build().write(tmp_path / "run")
    with pytest.raises(TraceError, match=r"none/measured\.json: not found; a measured run is a folder"):
        MeasuredRun.read(tmp_path / "none")
    change(folder, role="test", clock=3)
    with pytest.raises(TraceError) as caught:
        MeasuredRun.read(folder)
    assert "measured.json: role: Input should be 'fit' or 'held-out', got 'test'" in str(caught.value)
    assert "measured.json: clock: " in str(caught.value)
    change(folder, role="fit", clock="wall", schema_version=9, new="field")
    with pytest.raises(TraceError, match="schema_version must be at most 1, got 9; a newer paceline"):
        MeasuredRun.read(folder)
    (folder / "measured.json").write_text("{")
    with pytest.raises(TraceError, match=r"measured\.json:1: not valid JSON"):
        MeasuredRun.read(folder)


@pytest.mark.parametrize("name", ["requests.parquet", "steps.parquet", "scenario.toml"])
def test_a_file_that_is_gone_or_damaged_is_named(tmp_path: Path, name: str) -> None:
    folder = build().write(tmp_path / "run")
    (folder / name).write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(TraceError, match=f"{name}: not"):
        MeasuredRun.read(folder)
    (folder / name).unlink()
    with pytest.raises(TraceError, match=f"{name}: is missing"):
        MeasuredRun.read(folder)


def test_a_table_of_somebody_elses_is_checked_too(tmp_path: Path) -> None:
    folder = build().write(tmp_path / "run")
    table = pq.read_table(folder / "requests.parquet")
    pq.write_table(table.drop_columns(["domain"]), folder / "requests.parquet")
    with pytest.raises(TraceError, match=r"requests\.parquet: must have the sha256 that measured\.json says"):
        MeasuredRun.read(folder)
    restate(folder, "measured.json")
    with pytest.raises(TraceError, match=r"requests\.parquet: column 'domain': is missing"):
        MeasuredRun.read(folder)


def test_damaged_measured_runs_are_refused_and_edits_sealed(tmp_path: Path) -> None:
    folder, rng = build().write(tmp_path / "run"), np.random.default_rng(3)
    for name in ("requests", "steps"):
        path = folder / f"{name}.parquet"
        whole = path.read_bytes()
        for damaged in damages(whole, rng, 40):
            path.write_bytes(damaged)
            with pytest.raises(TraceError, match=rf"{name}\.parquet: (must have the sha256|not a readable)"):
                MeasuredRun.read(folder)
        path.write_bytes(whole)
    pq.write_table(pq.read_table(folder / "steps.parquet").slice(0, 4), folder / "steps.parquet")
    assert [one.tables for one in seal_run(folder)] == [("steps",)]
    found = MeasuredRun.read(folder)
    assert (found.unverified, found.manifest.sealed[0].reason) == ((), "edited by hand")
    told = json.loads((folder / "measured.json").read_text())
    del told["tables"]
    (folder / "measured.json").write_text(json.dumps(told))
    assert MeasuredRun.read(folder).unverified == ("requests", "steps")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match=r"must be new, empty or an older measured run with measured\.json"):
        build().write(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_no_torch_and_no_engine_is_needed_to_import_any_of_it() -> None:
    modules = (
        "calibration.measured, calibration.traces.surroundings, calibration.importers.measured_run, "
        "calibration.engines.drive, calibration.engines.record, calibration.engines.openvino"
    )
    code = f"import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'openvino'), None)\nimport {modules}"
    told = (
        "from calibration.traces.surroundings import cpu_info, software_versions\n"
        "print(cpu_info(1).threads, 'torch' in software_versions())"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\n{told}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "1"
