"""Drafters assigned from outside, and the bandit that forgets."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from several import COSTS, routed, several

from calibration.common.errors import ScenarioError
from calibration.traces import TraceSet
from simulator import load_scenario, simulate
from simulator.drafter_routing.choice import Bandit, Newcomer, SlidingUcb, Ucb1
from simulator.scenario.loading import parse_scenario

DRAFTERS = ("prompt-lookup", "student")


def alternating() -> TraceSet:
    """Of four requests the even ones suit one drafter, the odd ones the other."""
    good, bad = [39 - t for t in range(40)], [0] * 40
    return several({"prompt-lookup": [good, bad] * 2, "student": [bad, good] * 2}, domains=("chat", "math"))


def assigned(folder: Path, text: str, **settings: Any) -> Any:
    (folder / "choices.csv").write_text(text, encoding="utf-8")
    rule = {"policy": "assigned", "path": "choices.csv"}
    return routed(rule, 3, drafters=DRAFTERS, **settings).placed(folder)


def test_each_request_gets_the_drafter_of_its_row(tmp_path: Path) -> None:
    # The rows in any order, a column too many; the labels say the same, so by_domain must give the same run.
    text = (
        "drafter,note,sequence_id\nstudent,x,request-3\nprompt-lookup,,request-0\n"
        "student,,request-1\nprompt-lookup,y,request-2\n"
    )
    result = simulate(assigned(tmp_path, text), alternating())
    table = {"chat": "prompt-lookup", "math": "student"}
    same = simulate(routed({"policy": "by_domain", "table": table}, 3, drafters=DRAFTERS), alternating())
    assert result.requests.drop_columns(["replica"]).equals(same.requests.drop_columns(["replica"]))
    # 39 tokens after the first, four a round (three accepted and the bonus): ten rounds.
    assert result.requests["rounds"].to_pylist() == [10] * 4
    assert result.summary["drafter_routing"]["policy"] == "assigned"


def test_the_path_is_relative_to_the_scenario_file(tmp_path: Path) -> None:
    alternating().write(tmp_path / "traces")
    (tmp_path / "choices.csv").write_text(
        "sequence_id,drafter\n" + "".join(f"request-{i},student\n" for i in range(4)), encoding="utf-8"
    )
    prices = "\n".join(
        f"[costs.{name}]\n" + "\n".join(f"{k} = {v!r}" for k, v in COSTS[name].items())  # type: ignore[index]
        for name in ("verifier", "drafter")
    )
    (tmp_path / "scenario.toml").write_text(
        f"""
[traces]
path = "traces"
[stopping]
policy = "fixed"
draft_tokens = 3
[workload]
kind = "closed"
concurrency = 2
[routing.drafter]
drafters = ["prompt-lookup", "student"]
policy = "assigned"
path = "choices.csv"
[costs]
overhead_s = 0.002
{prices}
""",
        encoding="utf-8",
    )
    tally = simulate(load_scenario(tmp_path / "scenario.toml")).summary["drafter_routing"]["drafters"]
    assert tally["prompt-lookup"]["rounds"] == 0
    assert tally["student"]["rounds"] > 0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sequence,drafter\nrequest-0,student\n", "choices.csv: column 'sequence_id': is missing"),
        ("sequence_id,draftr\n", "choices.csv: column 'drafter': is missing; did you mean 'draftr'?"),
        ("", "choices.csv: column 'sequence_id': is missing"),
        (
            "sequence_id,drafter\nrequest-0,studnet\n",
            "choices.csv:2: column 'drafter': must be one of the drafters, got 'studnet'; did you mean 'student'?",
        ),
        (
            "sequence_id,drafter\nrequest-9,student\n",
            "choices.csv:2: column 'sequence_id': not in the TraceSet, got 'request-9'; did you mean 'request-",
        ),
        (
            "sequence_id,drafter\nrequest-0,student\nrequest-0,student\n",
            "choices.csv:3: column 'sequence_id': must name each sequence once, got 'request-0' again",
        ),
        (
            "sequence_id,drafter\nrequest-0,student\nrequest-2,student\nrequest-3,student\n",
            "choices.csv: column 'sequence_id': must have every sequence that is served, lacks 'request-1'",
        ),
        ("sequence_id,drafter\nrequest-0\n", "choices.csv:2: column 'drafter': must be one of the drafters, got ''"),
    ],
)
def test_every_fault_of_the_table_is_told_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        simulate(assigned(tmp_path, text), alternating())
    assert fault in str(caught.value)


def test_all_faults_at_once_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        simulate(assigned(tmp_path, "sequence_id,drafter\nrequest-9,student\nrequest-0,x\n"), alternating())
    assert len(str(caught.value).splitlines()) == 2
    (tmp_path / "choices.csv").unlink()
    rule = {"policy": "assigned", "path": "choices.csv"}
    with pytest.raises(ScenarioError, match=r"choices\.csv: not found \(routing\.drafter\.path\)"):
        simulate(routed(rule, 3, drafters=DRAFTERS).placed(tmp_path), alternating())


def test_the_file_is_looked_for_when_the_scenario_is_read_and_moves_with_it(tmp_path: Path) -> None:
    moved = tomllib.loads(assigned(tmp_path, "sequence_id,drafter\n").to_toml(tmp_path / "results" / "one"))
    assert moved["routing"]["drafter"]["path"] == "../../choices.csv"
    moved["traces"] = {"bundled": "smollm2-135m-cpu-greedy"}
    with pytest.raises(ScenarioError, match=r"routing\.drafter\.path: no such file, got '../../choices\.csv'"):
        parse_scenario(moved, folder=tmp_path)


def switching(bandit: Bandit, delay: int = 0) -> np.ndarray:
    """Which arm is played: arm 0 pays 100 and arm 1 pays 50 for 300 requests, then the other way round for 300."""
    played = np.zeros(600, dtype=int)
    late: list[tuple[int, float]] = []
    for number in range(600):
        arm = bandit.choose(Newcomer(number, 0, 0, 10))
        played[number] = arm
        late.append((arm, 100.0 if arm == (number >= 300) else 50.0))
        if len(late) > delay:
            heard, reward = late.pop(0)
            bandit.learn(heard, 0, reward)
    return played


@pytest.mark.parametrize("delay", [0, 7])
def test_the_window_recovers_after_a_switch_and_plain_ucb_later(delay: int) -> None:
    windowed, plain = (switching(b, delay) for b in (SlidingUcb(2, 0.1, 50), Ucb1(2, 0.1)))
    assert windowed[200:300].mean() < 0.15  # before the switch both play arm 0
    assert plain[200:300].mean() < 0.15
    assert windowed[360:].mean() > 0.85
    # Plain UCB remembers 300 rewards of 100 for arm 0: their mean falls below what arm 1 promises only slowly.
    assert plain[300:400].mean() < 0.3
    assert windowed[300:400].mean() > plain[300:400].mean() + 0.3


def test_a_window_longer_than_the_run_is_plain_ucb() -> None:
    assert switching(SlidingUcb(2, 2**0.5, 10_000)).tolist() == switching(Ucb1(2, 2**0.5)).tolist()


def test_window_is_a_key_of_ucb() -> None:
    traces = alternating()
    told = simulate(routed({"policy": "ucb", "window": 2}, 3, drafters=DRAFTERS, batch=1), traces)
    assert sum(told.summary["drafter_routing"]["rewards"]) == 2
