"""paceline grade and paceline simulate-cascade as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from paceline.commands.cascade import simulate_cascade
from paceline.commands.record import grade
from paceline.terminal.progress import Failsafe

main = Failsafe("paceline", commands={"grade": grade, "simulate-cascade": simulate_cascade})


def call(command: click.Command, *words: str) -> Any:
    return CliRunner().invoke(command, words)


def test_grade_needs_no_model_to_refuse(tmp_path: Path) -> None:
    out = str(tmp_path / "table.csv")
    for words, message in {
        ("--verifier", "v", "--exits", "2,x", "--out", out): "exits: must be numbers of layers with commas",
        ("--verifier", "v", "--out", out): "exits: must name a number of layers",
        ("--models", "a", "--out", out): "models: must be two or more, got 1",
        ("--models", "a,b", "--out", str(tmp_path / "t.txt")): "out: must end in .csv, got 't.txt'",
        ("--models", "a,b", "--items", "none.jsonl", "--out", out): "none.jsonl: must be a JSONL file of items",
    }.items():
        found = call(main, "grade", *words)
        assert found.exit_code == 1
        assert message in found.output
        assert "Traceback" not in found.output
    assert not any(tmp_path.iterdir())


def test_grade_writes_table_and_manifest(tiny: Any, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer.save_pretrained(tmp_path / "tiny")
    items = [
        {"id": f"i{n}", "domain": "x", "question": f"say {n}", "options": ["a", "bc", "d"], "answer": "bc"}
        for n in range(4)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    out = tmp_path / "table.csv"
    words = ["--verifier", str(tmp_path / "tiny"), "--exits", "2", "--items", str(tmp_path / "items.jsonl")]
    found = call(main, "grade", *words, "--device", "cpu", "--out", str(out))
    assert found.exit_code == 0, found.output
    assert "exit-2" in found.output
    assert "[measured]" in found.output
    assert len(out.read_text().splitlines()) == 1 + 2 * 4
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["items"] == {"source": "items.jsonl", "count": 4, "sha256": told["items"]["sha256"]}
    assert told["stages"]["tiny"]["chance"] == pytest.approx(1 / 3, abs=1e-4)


SCENARIO = """
[traces]
bundled = "smollm2-135m-cpu-greedy"
[workload]
kind = "poisson"
rate_rps = 0.5
requests = 60
order = "shuffled"
[policy]
kind = "threshold"
threshold = 0.9
[[stage]]
name = "exit-24"
output_tokens = 8
[stage.costs.verifier]
kind = "linear"
base_s = 0.01
per_token_s = 0.001
[[stage]]
name = "smollm2-135m"
output_tokens = 8
[stage.costs.verifier]
kind = "linear"
base_s = 0.0125
per_token_s = 0.00125
""".lstrip()


def test_simulate_cascade_on_the_bundled_table(tmp_path: Path) -> None:
    (tmp_path / "cascade.toml").write_text(SCENARIO)
    words = (str(tmp_path / "cascade.toml"), "--items", "smollm2-135m", "--out", str(tmp_path / "out"))
    found = call(main, "simulate-cascade", *words)
    assert found.exit_code == 0, found.output
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["completed"] == 60
    assert 0.3 < told["quality"] < 0.9
    assert 0 < told["stages"]["exit-24"]["answered"] < 1
    assert "[simulated" in found.output


def test_simulate_cascade_tells_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "cascade.toml").write_text(SCENARIO)
    found = call(main, "simulate-cascade", str(tmp_path / "cascade.toml"), "--out", str(tmp_path / "out"))
    assert found.exit_code == 1
    assert "items.path: must be given" in found.output
    found = call(
        main, "simulate-cascade", str(tmp_path / "cascade.toml"), "--items", "smollm", "--out", str(tmp_path / "out")
    )
    assert "no such file or bundled table, got 'smollm'; did you mean 'smollm2-135m'?" in found.output
    assert not (tmp_path / "out").exists()
