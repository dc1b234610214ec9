"""Every example of the README runs as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
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
        "pip install -c constraints.txt '.[calibration,engines,observe,test]' && pytest",
    ]


def test_picture_is_there() -> None:
    for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).read_text(encoding="utf-8").lstrip().startswith("<?xml")


@pytest.mark.parametrize("file", ["scenario", "calibrate", "distill", "heads", "time-shapes", "cascade"])
def test_reference_is_fresh(file: str) -> None:
    """`paceline keys FILE > docs/FILE.md` writes it again."""
    result = CliRunner().invoke(paceline.main, ["keys", file])
    assert result.exit_code == 0
    assert (README.parent / "docs" / f"{file}.md").read_text(encoding="utf-8") == result.output


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
    (command,) = [c for block in blocks("sh")[1:] for c in commands(block) if "specdecode-bench" in c]
    invoke(command)
    assert Path("imported/manifest.json").is_file()


def test_commands_that_need_files_of_the_reader_are_understood() -> None:
    """Names and options of every command in a shell block, without running it."""
    found = [command for block in blocks("sh")[1:] for command in commands(block)]
    assert len(found) >= 8
    for command in found:
        group: click.Command = paceline.main
        rest = command[1:]
        while isinstance(group, click.Group):
            name, *rest = rest
            assert name in group.commands, shlex.join(command)
            group = group.commands[name]
        group.make_context(command[1], list(rest))


@pytest.mark.model
def test_calibrate_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = [c for block in blocks("sh")[1:] for c in commands(block) if "calibrate" in c]
    (job,) = [block for block in blocks("toml") if block.startswith("# job.toml")]
    # As it stands, but for the amount of work: one prompt, few tokens, one repeat of few timings.
    small = job.replace("limit_per_domain = 4", 'limit_per_domain = 1\ndomains = ["chat"]')
    small = small.replace("max_new_tokens = 128", "max_new_tokens = 8")
    small += "\n[timings]\nbatches = [1]\nnew_tokens = [1]\ncontexts = [8]\nprefill_tokens = [8]\nrepeats = 1\n"
    Path("job.toml").write_text(small, encoding="utf-8")
    invoke(command)
    invoke(["paceline", "traces", "validate", "traces"])


def test_time_shapes_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [c for block in blocks("sh")[1:] for c in commands(block) if "time-shapes" in c]
    shutil.copytree(README.parent / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    invoke(command)
    assert Path("grid/steps.parquet").is_file()


def test_recipes_can_be_read() -> None:
    """Every job file that comes with the package is one that its command accepts."""
    from calibration.jobs.jobfile import load_job
    from calibration.timing import load_timing_job
    from calibration.training.head_job import load_heads_job
    from calibration.training.jobfile import load_distill_job

    readers = {
        "calibrate": load_job,
        "distill": load_distill_job,
        "drafters": load_job,
        "heads": load_heads_job,
        "timing": load_timing_job,
    }
    files = sorted((README.parent / "recipes").rglob("*.toml"))
    assert {file.parent.name for file in files} <= set(readers)
    assert len(files) >= 6
    for file in files:
        readers[file.parent.name](file)
