"""Scenarios: strict, frozen, all faults at once, and the same hash wherever they lie."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scenarios import scenario, traces_of

from calibration.common.errors import ScenarioError
from calibration.common.toml import dumps
from simulator import Scenario, load_scenario, parse_scenario, simulate

GOOD = """
name = "eight at once"
seed = 1
[traces]
path = "traces"
domains = ["chat"]
[drafter]
name = "drafter"
[stopping]
policy = "fixed"
draft_tokens = 2
[engine]
max_num_seqs = 2
[workload]
kind = "closed"
concurrency = 2
[costs]
overhead_s = 0.001
[costs.verifier]
kind = "linear"
base_s = 1
[costs.drafter]
kind = "fraction_of_verify"
fraction = 0.0059
"""

BAD = """
name = 3
sed = 1
[traces]
bundled = "smollm2-135m-cpu-greedi"
path = "traces"
[drafter]
nme = "drafter"
[stopping]
policy = "fixd"
[engine]
max_num_seqs = 0
[workload]
kind = "closed"
concurency = 8
order = "shufled"
copies = 3
keep_full = true
requests = 7
[costs]
overhead_s = -1.0
[costs.verifier]
kind = "linear"
base = 3
[costs.drafter]
kind = "fraction"
"""

FAULTS = (
    "name: must be a string, got 3",
    "sed: no such key; did you mean 'seed'?",
    "traces: must have bundled or path, not both",
    "traces: bundled TraceSet 'smollm2-135m-cpu-greedi': not found",
    "drafter.name: must be given",
    "drafter.nme: no such key; did you mean 'name'?",
    "stopping.policy: no such policy, got 'fixd'; did you mean 'fixed'?",
    "engine.max_num_seqs: must be >= 1, got 0",
    "engine.max_num_seqs: must be at least workload.copies = 3, got 0",
    "workload.concurrency: must be given",
    "workload.concurency: no such key; did you mean 'concurrency'?",
    "workload.order: must be one of shuffled, trace, got 'shufled'; did you mean 'shuffled'?",
    "workload.keep_full: must be false where copies > 1",
    "workload.requests: must be a multiple of copies = 3, got 7",
    "costs.overhead_s: must be >= 0, got -1.0",
    "costs.verifier.base_s: must be given",
    "costs.verifier.base: no such key; did you mean 'base_s'?",
    "costs.drafter.kind: no such kind, got 'fraction'; did you mean 'fraction_of_verify'?",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    traces_of([[1, 0, 1, 0], [0, 0]]).write(tmp_path / "traces")
    (tmp_path / "good.toml").write_text(GOOD)
    return tmp_path


def faults_of(folder: Path, text: str) -> list[str]:
    (folder / "bad.toml").write_text(text)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(folder / "bad.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{folder / 'bad.toml'}: ") for line in lines)
    return [line.removeprefix(f"{folder / 'bad.toml'}: ") for line in lines]


def test_every_fault_is_told_at_once_with_its_place(folder: Path) -> None:
    lines = faults_of(folder, BAD)
    for fault in FAULTS:
        assert any(line.startswith(fault) for line in lines), (fault, lines)
    assert len(lines) == len(FAULTS)


def test_names_are_checked_against_the_traces(folder: Path) -> None:
    lines = faults_of(folder, GOOD.replace('"drafter"', '"draftr"').replace('"chat"', '"chta"'))
    assert lines == [
        "drafter.name: not in the TraceSet, got 'draftr'; did you mean 'drafter'?",
        "traces.domains: not in the TraceSet, got 'chta'; did you mean 'chat'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('[drafter]\nname = "drafter"\n', "", "drafter: must be given for policy 'fixed'"),
        ("draft_tokens = 2", "draft_tokens = 2.5", "stopping.draft_tokens: must be an integer, got 2.5"),
        ("draft_tokens = 2\n", "", "stopping.draft_tokens: must be given"),
        ('policy = "fixed"\n', "", "stopping.policy: must be given; must be one of adaedl, budget, by_batch"),
        ('policy = "fixed"', 'policy = "none"', "stopping.draft_tokens: no such key"),
        ('kind = "closed"', 'kind = "poison"', "workload.kind: no such kind, got 'poison'; did you mean 'poisson'?"),
        ('kind = "closed"\nconcurrency = 2', 'kind = "csv"\npath = "no.csv"', "workload.path: no such file"),
        ('path = "traces"', 'path = "trace"', "traces: "),
        ("overhead_s = 0.001", "overhead_s = inf", "costs.overhead_s: must be a finite number"),
    ],
)
def test_single_faults(folder: Path, old: str, new: str, fault: str) -> None:
    assert old in GOOD
    (line,) = faults_of(folder, GOOD.replace(old, new))
    assert line.startswith(fault), line


def test_files_that_are_no_scenario(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.toml: not found"):
        load_scenario(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_text("a = ")
    with pytest.raises(ScenarioError, match=r"x\.toml: not valid TOML \(Invalid value"):
        load_scenario(tmp_path / "x.toml")


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    result = simulate(load_scenario(folder / "good.toml"))
    assert result.summary["completed"] == 2
    assert result.summary["name"] == "eight at once"


def test_a_scenario_is_frozen_and_strict() -> None:
    good = scenario(2)
    with pytest.raises(ValidationError):
        good.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Scenario.model_validate({**good.model_dump(exclude_none=True), "seed": "3"})
    with pytest.raises(ValidationError, match="drafter: must be given for policy 'oracle'"):
        Scenario.model_validate({"stopping": {"policy": "oracle"}, "workload": {"kind": "closed", "concurrency": 1}})


def test_without_traces_a_simulation_says_so() -> None:
    with pytest.raises(ScenarioError, match="traces: must have bundled or path"):
        simulate(scenario(1))


def test_the_hash_sees_settings_not_folders(folder: Path, tmp_path: Path) -> None:
    one = load_scenario(folder / "good.toml")
    moved = folder / "deeper"
    moved.mkdir()
    (moved / "same.toml").write_text(GOOD.replace('path = "traces"', 'path = "../traces"'))
    assert load_scenario(moved / "same.toml").hash == one.hash
    # Defaults count as if they were written.
    (folder / "explicit.toml").write_text(GOOD.replace("concurrency = 2", 'concurrency = 2\norder = "trace"'))
    assert load_scenario(folder / "explicit.toml").hash == one.hash
    for old, new in (
        ("seed = 1", "seed = 2"),
        ("draft_tokens = 2", "draft_tokens = 3"),
        ('"chat"', '"chat", "chat"'),
    ):
        (folder / "other.toml").write_text(GOOD.replace(old, new))
        assert load_scenario(folder / "other.toml").hash != one.hash
    assert len(one.hash) == 64


def test_a_resolved_scenario_reads_back_from_anywhere(folder: Path) -> None:
    one = load_scenario(folder / "good.toml")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "resolved.toml").write_text(one.to_toml(folder / "deeper"))
    again = load_scenario(folder / "deeper" / "resolved.toml")
    assert again.hash == one.hash
    assert simulate(again).requests.equals(simulate(one).requests)


values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
tables = st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), values | st.lists(values), max_size=4)


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), values | tables, max_size=5))
def test_what_is_written_as_toml_reads_back(data: dict[str, Any]) -> None:
    read = tomllib.loads(dumps(data))
    assert read == {key: value for key, value in data.items() if value != {}}


def test_parse_names_the_place_it_is_told() -> None:
    with pytest.raises(ScenarioError, match="cell 3: workload: must be given"):
        parse_scenario({}, where="cell 3")
