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

from calibration.common.checksums import file_sha256, sha256
from calibration.common.errors import ScenarioError
from calibration.common.files import fresh_folder
from simulator.scenario.scenario import Scenario

SUMMARY = "summary.json"
FILES = ("scenario.toml", SUMMARY, "requests.parquet", "iterations.parquet")

DIGESTS = "files_sha256"
"""Key of summary.json, in the folder only: sha256 of the other files, and of the text of its other keys."""


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
        with fresh_folder(target, SUMMARY, error=ScenarioError) as scratch:
            (scratch / "scenario.toml").write_text(self.scenario.to_toml(target.absolute()), encoding="utf-8")
            for name in ("requests", "iterations"):
                pq.write_table(getattr(self, name), scratch / f"{name}.parquet", compression="zstd")
            digests = {name: file_sha256(scratch / name) for name in FILES if name != SUMMARY}
            digests[SUMMARY] = sha256(_text(self.summary).encode())
            (scratch / SUMMARY).write_text(_text({**self.summary, DIGESTS: digests}) + "\n", encoding="utf-8")
        return target

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunResult:
        """Read the result in `folder`; `ScenarioError` names a file that is missing, damaged or edited.

        Results of versions that stated no sha256 are read as they are.
        """
        root = Path(folder)
        for name in FILES:
            if not (root / name).is_file():
                raise ScenarioError(f"{root / name}: is missing; a result is a folder with {', '.join(FILES)}")
        place = root / SUMMARY
        try:
            text = place.read_bytes().decode()
            summary = json.loads(text)
            if DIGESTS in summary and text != _text(summary) + "\n":
                raise ValueError("edited since it was written")
            digests = summary.pop(DIGESTS, {})
            found = {name: (root / name).read_bytes() for name in FILES if name != SUMMARY}
            for name, data in {**found, SUMMARY: _text(summary).encode()}.items():
                place = root / name
                if name in digests and sha256(data) != digests[name]:
                    raise ValueError(f"edited, or not the one of this run: {SUMMARY} says another sha256")
            place = root / "scenario.toml"
            scenario = Scenario.model_validate(tomllib.loads(found["scenario.toml"].decode())).placed(root)
            tables = []
            for name in FILES[2:]:
                place = root / name
                tables.append(pq.read_table(pa.BufferReader(found[name])))
        except (ValueError, AttributeError, pa.ArrowException, OSError) as fault:
            raise ScenarioError(f"{place}: not readable, truncated or damaged ({fault})") from None
        return cls(scenario, summary, *tables)


def _text(summary: dict[str, Any]) -> str:
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
