"""Record measured runs: repeat by repeat, in any order of conditions, and resumable.

A condition that is not complete yet keeps its finished repeats in ``.<name>.partial`` beside its folder; the measured
run appears there, whole, when all repeats are through. To compare conditions on a machine whose speed drifts, take
one repeat of each in turn:

    recordings = [Recording(folder, condition, engine) for ...]
    for _ in range(repeats):
        for recording in recordings:
            recording.take(make_source(...), prompts)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.errors import CalibrationError, TraceError
from calibration.common.files import begin_job, whole_file
from calibration.common.progress import StageProgress
from calibration.common.version import paceline_version
from calibration.engines.drive import Clock, Engine, EngineRequest, check_engine, drain, drive
from calibration.measured.run import MARKER, TABLES, Manifest, MeasuredRun
from calibration.observe.prompts import Prompt
from calibration.observe.server import R, Source
from calibration.traces.surroundings import software_versions
from calibration.traces.validate import build_table

_SOFTWARE = ("numpy", "pyarrow", "torch", "transformers", "openvino", "openvino-genai", "openvino-tokenizers")


@dataclass(frozen=True)
class Condition:
    """What is to be measured: what the manifest of the measured run says, and neither the engine nor a repeat knows.

    `scenario`: text of the resolved scenario that predicts it, with `scenario_hash`. Other fields as in
    `calibration.measured.Manifest`.
    """

    name: str
    role: Literal["fit", "held-out"]
    scenario: str
    scenario_hash: str
    repeats: int = 3
    clock: Clock = "thread-cpu"
    command: str = ""
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Recording:
    """One condition on its way into `folder`, run on `engine`.

    Goes on where an earlier recording of the same condition on the same engine was interrupted.

    Raises:
        CalibrationError: another condition, engine or device began this folder, or it holds other files.
    """

    def __init__(self, folder: str | os.PathLike[str], condition: Condition, engine: Engine) -> None:
        self.folder, self.condition = Path(folder), condition
        self._engine = engine
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        if condition.repeats < 1:
            raise CalibrationError(
                f"condition {condition.name}: repeats: must be at least 1, got {condition.repeats}"
            )
        if self.complete:
            self._check_complete()
        else:
            if self.folder.exists() and (self.folder.is_file() or any(self.folder.iterdir())):
                raise CalibrationError(f"{self.folder}: must be new or an older measured run, it holds other files")
            begin_job(self._partial, self._identity())

    @property
    def complete(self) -> bool:
        """Whether the measured run is there."""
        return (self.folder / MARKER).is_file()

    @property
    def taken(self) -> int:
        """How many repeats are through."""
        if self.complete:
            return self.condition.repeats
        return sum(self._has(repeat) for repeat in range(self.condition.repeats))

    def take(self, source: Source[R], prompts: Sequence[Prompt], *, progress: StageProgress | None = None) -> None:
        """Run the next repeat on `source`, which must be fresh; after the last one the measured run is written.

        Does nothing where all is through.
        """
        if self.complete:
            return
        repeat = self.taken
        came = drive(self._engine, source, prompts, clock=self.condition.clock, progress=progress)
        # A repeat counts as taken once all of its tables are there.
        for name, columns in (("requests", came.requests), ("steps", came.steps)):
            rows = max((len(values) for values in columns.values()), default=0)
            table = build_table(name, {"repeat": [repeat] * rows, **columns}, TABLES[name])
            with whole_file(self._path(repeat, name)) as scratch:
                pq.write_table(table, scratch, compression="zstd")
        if self.taken == self.condition.repeats:
            self._finish()

    def _has(self, repeat: int) -> bool:
        return all(self._path(repeat, name).is_file() for name in TABLES)

    def _path(self, repeat: int, name: str) -> Path:
        return self._partial / f"{repeat}.{name}.parquet"

    def _finish(self) -> None:
        told = self.condition
        manifest = Manifest(
            paceline_version=paceline_version(),
            name=told.name,
            role=told.role,
            engine=self._engine.info,
            model=self._engine.model,
            device=self._engine.device,
            clock=told.clock,
            repeats=told.repeats,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=told.command,
            software=software_versions(_SOFTWARE),
            scenario_hash=told.scenario_hash,
            unknown=told.unknown,
            notes=told.notes,
        )
        columns = {name: self._columns(name) for name in TABLES}
        MeasuredRun.build(manifest, columns["requests"], columns["steps"], told.scenario).write(self.folder)
        shutil.rmtree(self._partial)

    def _columns(self, name: str) -> dict[str, Any]:
        parts = [pq.read_table(self._path(i, name)) for i in range(self.condition.repeats)]
        table = pa.concat_tables(parts)
        return {column: table[column].combine_chunks() for column in table.column_names}

    def _identity(self) -> dict[str, Any]:
        """Everything that must be the same where another process goes on."""
        engine, told = self._engine, self.condition
        return {
            "name": told.name,
            "role": told.role,
            "scenario_hash": told.scenario_hash,
            "repeats": told.repeats,
            "clock": told.clock,
            "engine": engine.info.model_dump(),
            "model": engine.model,
            "device": engine.device.model_dump(),
        }

    def _check_complete(self) -> None:
        """Refuse a measured run of something else in the folder."""
        try:
            manifest = MeasuredRun.read(self.folder).manifest
        except TraceError as fault:
            raise CalibrationError(f"{self.folder}: must be a measured run that can be read, {fault}") from None
        begun = manifest.model_dump()
        for key, mine in json.loads(json.dumps(self._identity())).items():
            theirs = json.loads(json.dumps(begun[key]))
            if theirs != mine:
                rule = f"holds a measured run with {key} = {theirs!r}"
                raise CalibrationError(f"{self.folder}: {rule}, got {mine!r}; choose another folder")


def measure(
    folder: str | os.PathLike[str],
    condition: Condition,
    engine: Engine,
    make_source: Callable[[], Source[R]],
    prompts: Sequence[Prompt],
    *,
    progress: StageProgress | None = None,
) -> MeasuredRun:
    """Record all repeats of `condition` that are not there yet, after a warm-up; give the measured run."""
    recording = Recording(folder, condition, engine)
    if not recording.complete:
        warm_up(engine, prompts)
    while not recording.complete:
        recording.take(make_source(), prompts, progress=progress)
    return MeasuredRun.read(recording.folder)


def warm_up(engine: Engine, prompts: Sequence[Prompt], *, requests: int = 4, output_tokens: int = 16) -> None:
    """Serve a few requests that nobody records: first one alone, then all at once."""
    check_engine(engine)
    chosen = [prompts[i % len(prompts)] for i in range(requests)]
    for batch in (chosen[:1], chosen):
        for number, prompt in enumerate(batch):
            engine.submit(EngineRequest(number, prompt.token_ids or (), output_tokens))
        drain(engine)
