"""`paceline cascade` as a user drives it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from cascade_made import graded_by_difficulty, write_long
from click.testing import CliRunner, Result

from analysis.cascade import CascadeFindings, bundled_tables
from analysis.cascade.rules import CascadeRule
from analysis.common.records import from_json
from paceline.commands.cascade import FILES, cascade_command
from paceline.terminal.progress import Failsafe


def run(*words: str) -> Result:
    group = Failsafe("paceline")
    group.add_command(cascade_command)
    return CliRunner().invoke(group, ["cascade", *words])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = graded_by_difficulty(np.random.default_rng(5), 80, (1.0, 4.0))
    return write_long(table, tmp_path_factory.mktemp("answers") / "answers.csv")


@pytest.fixture(scope="module")
def studied(answers: Path) -> tuple[Result, Path]:
    out = answers.parent / "study"
    return run(str(answers), "--out", str(out), "--lambda", "2, 8,20", "--runs-at", "8"), out


def test_it_writes_findings_frontier_and_rule(studied: tuple[Result, Path]) -> None:
    result, out = studied
    assert result.exit_code == 0, result.output
    runs = [f"runs-{policy}.csv" for policy in ("sequential", "cascade-routing", "route-once")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, *runs])
    found = from_json(CascadeFindings, (out / "cascade.json").read_text(), "cascade.json")
    assert found.lambdas == (2.0, 8.0, 20.0)
    assert found.items == 80
    rows = list(csv.DictReader((out / "frontier.csv").read_text().splitlines()))
    assert {"always stage-0", "sequential", "oracle"} <= {row["policy"] for row in rows}
    rule = from_json(CascadeRule, (out / "policy.json").read_text(), "policy.json")
    assert rule.runs_on("stage-0", {"stage-0.confidence": 0.02}, 1000.0)
    assert not rule.runs_on("stage-0", {"stage-0.confidence": 0.98}, 0.5)


def test_what_every_item_runs_comes_to_the_points_of_the_frontier(
    studied: tuple[Result, Path], answers: Path
) -> None:
    table = {(row["item"], row["stage"]): row for row in csv.DictReader(answers.read_text().splitlines())}
    points = list(csv.DictReader((studied[1] / "frontier.csv").read_text().splitlines()))
    for policy in ("sequential", "cascade-routing", "route-once"):
        rows = list(csv.DictReader((studied[1] / f"runs-{policy}.csv").read_text().splitlines()))
        ran = [(row["item"], row["stages"].split(";")) for row in rows]
        point = next(one for one in points if one["policy"] == policy and float(one["lambda"] or 0) == 8.0)
        quality = np.mean([float(table[item, stages[-1]]["correct"]) for item, stages in ran])
        cost = np.mean([sum(float(table[item, stage]["cost"]) for stage in stages) for item, stages in ran])
        assert quality == pytest.approx(float(point["quality"]), rel=1e-5)
        assert cost == pytest.approx(float(point["cost"]), rel=1e-5)


def test_it_prints_the_policies(studied: tuple[Result, Path]) -> None:
    output = studied[0].output
    assert "80 items, 2 stages" in " ".join(output.split())
    assert "sequential" in output
    assert "cascade.json" in output


def test_an_older_study_is_replaced_and_other_files_are_left(answers: Path, studied: tuple[Result, Path]) -> None:
    again = run(str(answers), "--out", str(studied[1]), "--lambda", "20", "--cost", "stage-1=6", "--continued")
    assert again.exit_code == 0, again.output
    found = json.loads((studied[1] / "cascade.json").read_text())
    assert found["lambdas"] == [20.0]
    assert found["continued"] is True
    assert found["stages"][1]["cost"]["value"] == 6.0
    other = run(str(answers), "--out", str(answers.parent), "--lambda", "8")
    assert other.exit_code == 1
    assert "must be new, empty or an older cascade study" in other.output
    assert answers.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file or bundled table"),
        (["TABLE", "--cost", "stage-1"], "--cost: must be STAGE=NUMBER, got 'stage-1'"),
        (["TABLE", "--cost", "stage-1=much"], "--cost: must be STAGE=NUMBER"),
        (["TABLE", "--cost", "stage1=3"], "did you mean 'stage-1'"),
        (["TABLE", "--lambda", "1;2"], "--lambda: must be numbers between commas, got '1;2'"),
        (["TABLE", "--lambda", "-1"], "lambda: must be above 0 and finite, got -1"),
        (["TABLE", "--stages", "stage-0"], "needs two stages or more, got 1"),
        ([], "give either TABLE or --bundled"),
        (["TABLE", "--bundled"], "give either TABLE or --bundled"),
    ],
)
def test_mistakes_are_told_in_one_sentence(answers: Path, tmp_path: Path, words: list[str], said: str) -> None:
    given = [str(answers) if word == "TABLE" else word for word in words]
    result = run(*given, "--out", str(tmp_path / "out"))
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    assert said in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_the_bundled_table_is_found_by_name() -> None:
    assert "smollm2-135m" in bundled_tables()
    result = run("smollm2-13", "--out", "unused")
    assert "did you mean 'smollm2-135m'?" in " ".join(result.output.split())
