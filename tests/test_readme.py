"""Every example of the README runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from shared_data import shared_data

import paceline

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def commands(text: str) -> list[list[str]]:
    """Commands of a block, without prompts, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.strip()]


def invoke(arguments: list[str]) -> None:
    assert arguments[0] == "paceline"
    result = CliRunner().invoke(paceline.main, arguments[1:])
    assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}\n{result.exception!r}"


def test_first_block_is_the_two_set_up_commands() -> None:
    assert blocks("sh")[0].splitlines() == [
        "pip install . && paceline demo",
        "pip install -c constraints.txt '.[calibration,test]' && pytest",
    ]


def test_picture_is_there() -> None:
    for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_scenario_reference_is_fresh() -> None:
    """`paceline keys > docs/scenario.md` writes it again."""
    result = CliRunner().invoke(paceline.main, ["keys"])
    assert result.exit_code == 0
    assert (README.parent / "docs" / "scenario.md").read_text(encoding="utf-8") == result.output


def test_scenario_console_and_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for scenario in blocks("toml"):
        name = scenario.splitlines()[0].removeprefix("# ")
        assert name.endswith(".toml")
        Path(name).write_text(scenario, encoding="utf-8")
    for block in blocks("console"):
        for arguments in commands(block):
            invoke(arguments)
    assert Path("run/summary.json").is_file()
    assert Path("study/report.pdf").stat().st_size > 10_000
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})


def test_import_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_data("specdecode-bench-simulator", "data", "llama3.1-8B", "combined_gsm8k.jsonl")
    monkeypatch.chdir(tmp_path)
    Path(path.name).symlink_to(path)
    (command,) = [c for block in blocks("sh")[1:] for c in commands(block) if "import" in c]
    invoke(command)
    assert Path("imported/manifest.json").is_file()


@pytest.mark.model
def test_calibrate_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = [c for block in blocks("sh")[1:] for c in commands(block) if "calibrate" in c]
    # As it stands, but for the amount of work: one prompt, few tokens, one repeat of the timings.
    invoke([*command, "--limit", "1", "--domain", "chat", "--max-new-tokens", "8", "--timing-repeats", "1"])
    invoke(["paceline", "traces", "validate", "traces"])
