"""RunResult: what a simulation gives, in memory and as a folder of files."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.errors import ScenarioError
from calibration.folder import fresh_folder
from simulator.scenario import Scenario

FILES = ("scenario.toml", "summary.json", "requests.parquet", "iterations.parquet")


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    `summary` has the keys of ``vllm bench serve`` where it has a name for the thing; `requests` and `iterations`
    are tables with a row per finished request and per engine iteration (units in their names).
    """

    scenario: Scenario
    summary: dict[str, Any]
    requests: pa.Table
    iterations: pa.Table

    @property
    def scenario_hash(self) -> str:
        """sha256 of the resolved scenario that was run."""
        return str(self.summary["scenario_hash"])

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the four files to `folder`, which appears whole or not at all; give its path.

        A folder that holds an older result is replaced; any other that is not empty is refused.
        """
        target = Path(folder)
        with fresh_folder(target, "summary.json", error=ScenarioError) as scratch:
            (scratch / "scenario.toml").write_text(self.scenario.to_toml(target.absolute()), encoding="utf-8")
            text = json.dumps(self.summary, indent=2, ensure_ascii=False, allow_nan=False)
            (scratch / "summary.json").write_text(text + "\n", encoding="utf-8")
            for name in ("requests", "iterations"):
                pq.write_table(getattr(self, name), scratch / f"{name}.parquet", compression="zstd")
        return target

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunResult:
        """Read the result in `folder`; `ScenarioError` names a file that is missing or damaged."""
        root = Path(folder)
        for name in FILES:
            if not (root / name).is_file():
                raise ScenarioError(f"{root / name}: is missing; a result is a folder with {', '.join(FILES)}")
        place = root / "scenario.toml"
        try:
            scenario = Scenario.model_validate(tomllib.loads(place.read_text(encoding="utf-8"))).placed(root)
            place = root / "summary.json"
            summary = json.loads(place.read_text(encoding="utf-8"))
            tables = []
            for name in FILES[2:]:
                place = root / name
                tables.append(pq.read_table(place))
        except (ValueError, pa.ArrowException, OSError) as fault:
            raise ScenarioError(f"{place}: not readable, truncated or damaged ({fault})") from None
        return cls(scenario, summary, *tables)
