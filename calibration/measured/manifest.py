"""The manifest of a measured run: which engine, where, on which clock, and what could not be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from calibration.common.secrets import Command
from calibration.common.settings import Table
from calibration.traces.manifest import DeviceInfo, Sealing, TableInfo, parse_versioned

SCHEMA_VERSION = 1
"""Schema of measured runs that this version writes, and the newest that it reads."""

Setting = str | int | float | bool


class EngineInfo(Table):
    """The engine that was driven: its name, its version where known, and the settings that it ran with."""

    name: str
    version: str | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)


class Manifest(Table):
    """Everything about a measured run that is not a table.

    `role`: ``fit`` runs may be looked at before predicting, ``held-out`` ones may not. `clock`: what seconds mean,
    CPU time of the engine's thread (``thread-cpu``; idle time between arrivals is skipped) or ``wall`` time.
    `model`: what was served. `scenario_hash`: of the scenario beside it. `unknown`: what could not be seen from
    outside, one entry each. `counters`: how far the engine's own counters went over all repeats, by Prometheus name
    and labels. `tables`: rows and sha256 of the Parquet files, in the folder only; `sealed`: tables whose sha256 was
    stated after the run was written, see `calibration.measured.run.seal`.
    """

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    paceline_version: str
    name: str
    role: Literal["fit", "held-out"]
    engine: EngineInfo
    model: str
    device: DeviceInfo
    clock: Literal["thread-cpu", "wall"]
    repeats: Annotated[int, Field(ge=1)]
    created: str
    command: Command
    software: dict[str, str] = Field(default_factory=dict)
    scenario_hash: str
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counters: dict[str, float] = Field(default_factory=dict)
    tables: dict[str, TableInfo] = Field(default_factory=dict)
    sealed: tuple[Sealing, ...] = ()


def parse_manifest(text: str, path: Path) -> Manifest:
    """Read a manifest from JSON; `TraceError` names every fault, a newer schema version first of all."""
    return parse_versioned(Manifest, text, path, SCHEMA_VERSION, "run")
