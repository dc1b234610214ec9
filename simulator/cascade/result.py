"""CascadeResult: what the simulation of a cascade gives, in memory and as a folder of files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.common.errors import ScenarioError
from calibration.common.files import fresh_folder
from simulator.cascade.scenario import CascadeScenario


@dataclass(frozen=True)
class CascadeResult:
    """One finished run: `summary`, and `requests` with a row per answered request (units in the names)."""

    scenario: CascadeScenario
    summary: dict[str, Any]
    requests: pa.Table

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write scenario.toml, summary.json and requests.parquet to `folder`, which appears whole or not at all.

        A folder that holds an older result is replaced; any other that is not empty is refused.
        """
        target = Path(folder)
        with fresh_folder(target, "summary.json", error=ScenarioError) as scratch:
            (scratch / "scenario.toml").write_text(self.scenario.to_toml(target.absolute()), encoding="utf-8")
            text = json.dumps(self.summary, indent=2, ensure_ascii=False, allow_nan=False)
            (scratch / "summary.json").write_text(text + "\n", encoding="utf-8")
            pq.write_table(self.requests, scratch / "requests.parquet", compression="zstd")
        return target
