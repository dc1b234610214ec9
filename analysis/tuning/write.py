"""The folder of a search: findings, candidates, the best scenario, exports, figures. Whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from analysis.tuning.findings import Scored, TuneFindings
from calibration.common.errors import ScenarioError
from calibration.common.files import fresh_folder
from simulator.scenario.loading import parse_scenario
from simulator.scenario.scenario import Scenario

MARKER = "tune.json"


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Give `folder`; `ScenarioError` where `write_findings` would refuse it, so that no search is made in vain."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ScenarioError(f"{target}: must be a folder, got a file")
    if target.exists() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise ScenarioError(f"{target}: must be new, empty or an older result with {MARKER}; it holds other files")
    return target


def write_findings(
    findings: TuneFindings, scenario: Scenario, folder: str | os.PathLike[str], files: Mapping[str, str] | None = None
) -> Path:
    """Write tune.json, candidates.csv, best.toml, the exports, and `files` (texts by name) to `folder`.

    `scenario` is the one that was tuned: paths of best.toml are rewritten to start from `folder`.
    """
    target = check_folder(folder)
    texts = {
        MARKER: findings.to_json(),
        "candidates.csv": _table(findings),
        "best.toml": best_scenario(findings, scenario, target.absolute()),
    }
    for one in findings.exports:
        if one.file is not None:
            texts[one.file] = one.content
        texts |= one.extra_files
    with fresh_folder(target, MARKER, error=ScenarioError) as scratch:
        for name, text in (texts | dict(files or {})).items():
            (scratch / name).write_text(text, encoding="utf-8")
    return target


def best_scenario(findings: TuneFindings, scenario: Scenario, folder: Path) -> str:
    """Give the best candidate as a scenario that ``simulate`` runs, with what was found of it in comments."""
    best = parse_scenario(tomllib.loads(findings.best_toml), where="best.toml", folder=scenario.locate("."))
    goal, value = findings.goal, findings.best.value
    lines = [
        f"{findings.best.name}: the best found for {goal.objective}.",
        f"{findings.judged.unit}: {findings.judged.best.text} ({findings.judged.how}).",
        f"In the search {goal.unit}: {value.text} over {findings.best.replications} seeds"
        + ("." if findings.first_run is None else f"; {findings.first_run:.6g} on this one."),
        *(f"{key} is {why}." for key, why in findings.plan.changed.items()),
    ]
    comments = "".join(f"# {_one_line(line)}\n" for line in lines)
    return f"{comments}\n{best.to_toml(folder)}"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _table(findings: TuneFindings) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    unit = findings.goal.unit
    rows.writerow(
        [
            "candidate",
            "kind",
            "drafters",
            "status",
            "replications",
            unit,
            "low",
            "high",
            "behind_best_share",
            "behind_low",
            "behind_high",
            "attainment",
            "settings",
        ]
    )
    rows.writerows(_row(one) for one in findings.candidates)
    return out.getvalue()


def _row(one: Scored) -> list[object]:
    settings = json.dumps({key: value for key, value in one.overrides.items() if value is not None})
    return [
        one.name,
        one.kind,
        " + ".join(one.drafters),
        one.status,
        one.replications,
        one.value.value,
        one.value.low,
        one.value.high,
        one.behind.value,
        one.behind.low,
        one.behind.high,
        one.attainment,
        settings,
    ]
