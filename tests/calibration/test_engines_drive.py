"""Driving an engine: the same requests at the same times as in the simulated run, and nothing lost on the way."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_toy import ToyEngine
from once import Once
from scenarios import scenario, traces_of

import calibration.engines.drive as drive_module
from calibration.common.errors import CalibrationError
from calibration.engines.drive import Drive, Step, drain, drive
from calibration.engines.record import Condition, Recording, measure, warm_up
from calibration.measured import MeasuredRun
from calibration.observe.prompts import Prompt
from simulator import Scenario, simulate
from simulator.playback.replay import select_sequences
from simulator.workload import make_source


@dataclass
class Asked:
    """A request of a workload."""

    id: int
    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    counted: bool = True


@dataclass
class Listed:
    """Requests at given times, as a workload."""

    requests: list[Asked]
    next: int = 0
    ended: list[tuple[int, float]] = field(default_factory=list)

    @property
    def counted(self) -> int:
        return sum(request.counted for request in self.requests)

    @property
    def done(self) -> bool:
        through = {number for number, _ in self.ended}
        return all(request.id in through for request in self.requests if request.counted)

    @property
    def next_arrival_s(self) -> float:
        return self.requests[self.next].arrival_s if self.next < len(self.requests) else math.inf

    def admit(self, now: float, slots: int) -> list[Asked]:
        first = self.next
        while self.next < len(self.requests) and self.requests[self.next].arrival_s <= now:
            self.next += 1
        return self.requests[first : self.next]

    def end(self, request: Asked, now: float) -> None:
        self.ended.append((request.id, now))


PROMPTS = [Prompt(f"s{i}", "chat", tuple(range(10 * i, 10 * i + 5 + i))) for i in range(4)]


def listed(*arrivals: float, output_tokens: int = 3) -> Listed:
    return Listed([Asked(i, i % 4, 5 + i % 4, output_tokens, at) for i, at in enumerate(arrivals)])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyEngine:
    return clocked(monkeypatch, ToyEngine())


def clocked(monkeypatch: pytest.MonkeyPatch, engine: ToyEngine) -> ToyEngine:
    """Let the driver read the clocks of `engine`."""
    monkeypatch.setattr(drive_module, "process_time", lambda: engine.cpu_s)
    monkeypatch.setattr(drive_module, "perf_counter", lambda: engine.wall_s)
    return engine


# --- Times, by hand.


def test_a_late_arrival_waits_for_the_step_and_idle_time_is_skipped(toy: ToyEngine) -> None:
    toy.base_s, toy.per_token_s, toy.per_context_token_s, toy.overhead_s = 1.0, 0.0, 0.0, 0.0
    came = drive(toy, listed(0.0, 0.5, 100.25), PROMPTS)
    # Request 0 is prefilled in [0, 1]; request 1 arrives within and is prefilled in [1, 2]; both decode in [2, 4];
    # then nothing is there to do before request 2.
    assert came.requests["first_token_s"] == [1.0, 2.0, 101.25]
    assert came.requests["emission_s"] == [[1.0, 3.0, 4.0], [2.0, 3.0, 4.0], [101.25, 102.25, 103.25]]
    assert came.requests["finish_s"] == [4.0, 4.0, 103.25]
    assert came.requests["arrival_s"] == [0.0, 0.5, 100.25]
    assert came.steps["start_s"] == [0.0, 1.0, 2.0, 3.0, 100.25, 101.25, 102.25]
    assert came.steps["operation"] == ["prefill", "prefill", "decode", "decode", "prefill", "decode", "decode"]
    assert came.steps["sequences"] == [0, 0, 2, 2, 0, 1, 1]
    assert came.steps["context_tokens"] == [0, 0, 11, 13, 0, 7, 8]


def test_requests_get_their_prompts_and_their_tokens(toy: ToyEngine) -> None:
    source = listed(0.0, 0.0)
    source.requests[1].prompt_tokens = 8  # two more than recorded: the end of the prompt, repeated
    came = drive(toy, source, PROMPTS)
    assert [request.prompt_token_ids for request in toy.arrived] == [
        [0, 1, 2, 3, 4],
        [14, 15, 10, 11, 12, 13, 14, 15],
    ]
    assert came.requests["output_token_ids"] == [[0, 1, 2], [100, 101, 102]]
    assert came.requests["sequence_id"] == ["s0", "s1"]
    assert [number for number, _ in source.ended] == [0, 1]


def test_draft_steps_are_rows_of_their_own_and_leave_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = clocked(
        monkeypatch, ToyEngine(draft_tokens=2, base_s=1.0, per_token_s=0, per_context_token_s=0, overhead_s=0)
    )
    came = drive(toy, listed(0.0, output_tokens=5), PROMPTS)
    # The first token, then a round that accepts both drafts, then one that accepts none.
    assert came.steps["operation"] == ["prefill", "draft", "draft", "decode", "draft", "draft", "decode"]
    assert came.steps["model"] == ["verifier", *["drafter", "drafter", "verifier"] * 2]
    assert came.steps["step"] == [0, 1, 1, 1, 2, 2, 2]
    assert came.steps["seconds"] == pytest.approx([1.0, 0.004, 0.004, 1.0, 0.004, 0.004, 1.0])
    assert came.steps["wall_s"] == pytest.approx([2 * s for s in came.steps["seconds"]])
    assert came.steps["start_s"] == pytest.approx([0.0, 1.0, 1.004, 1.008, 2.008, 2.012, 2.016])
    assert came.steps["drafted_tokens"] == [0, None, None, 2, None, None, 2]
    assert came.steps["accepted_tokens"] == [0, None, None, 2, None, None, 0]
    assert came.requests["emitted"] == [[1, 3, 1]]
    assert came.requests["emission_s"] == [pytest.approx([1.0, 2.008, 3.016])]
    assert [came.requests[name] for name in ("drafts", "drafted_tokens", "accepted_tokens")] == [[2], [4], [2]]


def test_what_an_engine_does_not_tell_about_drafts_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = clocked(monkeypatch, ToyEngine(draft_tokens=2, tells_drafts=False))
    came = drive(toy, listed(0.0), PROMPTS)
    assert came.requests["drafted_tokens"] == came.requests["drafts"] == [None]
    assert set(came.steps["drafted_tokens"]) == {None}


def test_the_clock_of_the_wall(toy: ToyEngine) -> None:
    cpu = drive(toy, listed(0.0), PROMPTS)
    wall = drive(toy, listed(0.0), PROMPTS, clock="wall")
    assert wall.requests["finish_s"] == pytest.approx([2 * cpu.requests["finish_s"][0]])
    assert wall.steps["seconds"] == wall.steps["wall_s"] == pytest.approx(cpu.steps["wall_s"])


def test_an_engine_may_tell_what_its_own_work_took(toy: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = toy.step

    def step() -> Step:
        toy.cpu_s += 5.0  # accounts of an adapter
        return replace(plain(), cpu_s=0.25, wall_s=0.5)

    monkeypatch.setattr(toy, "step", step)
    came = drive(toy, listed(0.0), PROMPTS)
    assert came.steps["seconds"] == [0.25] * 3
    assert came.steps["wall_s"] == [0.5] * 3


def test_the_garbage_collector_rests_during_a_repeat(toy: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = toy.step, []
    monkeypatch.setattr(toy, "step", lambda: (seen.append(gc.isenabled()), plain())[1])
    drive(toy, listed(0.0), PROMPTS)
    assert seen == [False] * 3
    assert gc.isenabled()


# --- The simulated engine, request by request: another scheduler, other arithmetic, the same workload.

WORKLOADS: dict[str, dict[str, Any]] = {
    "closed": {"kind": "closed", "concurrency": 3},
    "thinking": {"kind": "closed", "concurrency": 6, "think_s": 0.3, "think_law": "exponential", "requests": 20},
    "kept full": {"kind": "closed", "concurrency": 4, "keep_full": True, "requests": 9, "order": "shuffled"},
    "copies": {"kind": "closed", "concurrency": 3, "copies": 3},
    "poisson": {"kind": "poisson", "rate_rps": 6.0, "requests": 25},
    "few": {"kind": "poisson", "rate_rps": 0.4, "requests": 6},
}
COLUMNS = ("request_id", "sequence_id", "counted", "prompt_tokens", "output_tokens")
TIMES = ("arrival_s", "first_token_s", "finish_s")


def played(workload: dict[str, Any], engine: ToyEngine) -> tuple[Drive, Any]:
    """Drive `engine` with a workload, and simulate the same."""
    traces = traces_of([[0] * n for n in (7, 1, 12, 30, 4, 9)])
    told: Scenario = scenario(None, batch=engine.slots, workload=workload, seed=3)
    chosen = select_sequences(traces, drafter="drafter")
    prompts = [Prompt(name, "chat", (1,) * n) for name, n in zip(chosen.ids, chosen.prompt_tokens, strict=True)]
    return drive(engine, make_source(told, chosen), prompts), simulate(told, traces)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_requests_at_the_same_times_as_simulated(toy: ToyEngine, name: str) -> None:
    came, simulated = played(WORKLOADS[name], toy)
    expected = simulated.requests.to_pandas().sort_values("request_id")
    for column in COLUMNS:
        assert came.requests[column] == expected[column].tolist(), column
    for column in TIMES:
        assert came.requests[column] == pytest.approx(expected[column].tolist(), rel=1e-9), column
    assert not toy.busy


@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("name", WORKLOADS)
def test_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, name: str, draft_tokens: int) -> None:
    toy = clocked(monkeypatch, ToyEngine(draft_tokens=draft_tokens))
    began = toy.cpu_s
    came, _ = played(WORKLOADS[name], toy)
    busy = sum(came.steps["seconds"])
    if name != "kept full":  # there, the fillers that were cut short go on unseen
        assert sum(came.steps["emitted_tokens"]) == sum(came.requests["output_tokens"])
        assert busy == pytest.approx(toy.cpu_s - began)
    assert sum(came.steps["emitted_tokens"]) >= sum(came.requests["output_tokens"])
    assert [sum(counts) for counts in came.requests["emitted"]] == came.requests["output_tokens"]
    ends = np.array(came.steps["start_s"]) + came.steps["seconds"]
    assert (np.diff(came.steps["start_s"]) >= -1e-12).all()
    assert (np.array(came.steps["start_s"])[1:] >= ends[:-1] - 1e-9).all()
    every = {time for times in came.requests["emission_s"] for time in times}
    assert all(np.abs(ends - time).min() < 1e-9 for time in every)


def test_every_prompt_once_some_at_a_time(toy: ToyEngine) -> None:
    came = drive(toy, Once(PROMPTS, 3, concurrency=2), PROMPTS)
    assert came.requests["sequence_id"] == ["s0", "s1", "s2", "s3"]
    assert came.requests["output_tokens"] == [3] * 4
    assert came.requests["arrival_s"][2:] == came.requests["finish_s"][:2]
    assert max(came.steps["sequences"]) == 2
    for options, message in (
        ({"output_tokens": 0}, "output_tokens: must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency: must be at least 1, got 0"),
        ({"prompts": []}, "prompts: must be at least 1, got 0"),
        ({"prompts": [Prompt("x", "chat", text="hi")]}, "prompt of x: must have token ids"),
    ):
        with pytest.raises(CalibrationError, match=message):
            Once(**{"prompts": PROMPTS, "output_tokens": 3, **options})


# --- Engines and workloads that do what they must not.


def broken(monkeypatch: pytest.MonkeyPatch, engine: ToyEngine, **changes: Any) -> ToyEngine:
    """Let `engine` report other things than it did."""
    plain = engine.step
    monkeypatch.setattr(engine, "step", lambda: replace(plain(), **changes))
    return engine


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a stranger": ({"received": {7: [1]}}, "request 7: must be in service to receive tokens"),
    "nothing": ({"received": {0: []}}, "request 0: must receive at least one token"),
    "too many": ({"received": {0: [1, 2, 3, 4]}}, "request 0: must receive 3 tokens, got 4"),
    "long drafts": (
        {"drafts": ToyEngine(draft_tokens=1)._decode().drafts * 50},
        "draft steps must not take longer than the iteration",
    ),
    "a draft for nobody": ({"drafted_tokens": {9: 2}}, "request 9: must be in service to draft for"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_breaks_the_protocol_is_named(
    toy: ToyEngine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    changes, message = FAULTS[fault]
    with pytest.raises(CalibrationError, match=f"engine toy: .*{message}"):
        drive(broken(monkeypatch, toy, **changes), listed(0.0), PROMPTS)


def test_an_engine_that_never_serves_is_given_up(toy: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "step", lambda: Step("decode", {}))
    with pytest.raises(CalibrationError, match="must serve what it took, 1001 steps gave no token"):
        drive(toy, listed(0.0), PROMPTS)
    with pytest.raises(CalibrationError, match="must have nothing to do when a repeat begins"):
        drive(toy, listed(0.0), PROMPTS)
    with pytest.raises(CalibrationError, match="1001 steps gave no token"):
        drain(toy)


def test_other_faults(toy: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match=r"prompt of x: must have token ids"):
        drive(toy, listed(0.0), [Prompt("x", "chat", text="hello")])
    with pytest.raises(CalibrationError, match=r"request 1: sequence must be one of 1 prompts, got 1"):
        drive(ToyEngine(), listed(0.0, 0.0), PROMPTS[:1])
    never = Listed([Asked(0, 0, 5, 3, math.inf)])
    with pytest.raises(CalibrationError, match="no further one will arrive"):
        drive(ToyEngine(), never, PROMPTS)
    lost = ToyEngine()
    monkeypatch.setattr(lost, "submit", lambda request: None)
    with pytest.raises(CalibrationError, match="request 0 got lost"):
        drive(lost, listed(0.0), PROMPTS)


# --- Recording: repeats that stay, conditions that take turns.

CONDITION = Condition("plain-1", "fit", 'name = "x"\n', "abc", repeats=2, unknown=("nothing",))


def test_conditions_take_turns_and_go_on_after_an_interruption(toy: ToyEngine, tmp_path: Path) -> None:
    other = replace(CONDITION, name="plain-2", role="held-out")
    for turn in range(2):
        recordings = [Recording(tmp_path / c.name, c, toy) for c in (CONDITION, other)]  # a new process each time
        assert [recording.taken for recording in recordings] == [turn, turn]
        for recording in recordings:
            assert not recording.complete
            recording.take(listed(0.0, 0.0, output_tokens=3 + turn), PROMPTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain-1", "plain-2"]
    run = MeasuredRun.read(tmp_path / "plain-2")
    assert (run.manifest.role, run.manifest.engine.name, run.manifest.clock) == ("held-out", "toy", "thread-cpu")
    assert run.manifest.unknown == ("nothing",)
    assert run.requests["repeat"].to_pylist() == [0, 0, 1, 1]
    assert run.requests["output_tokens"].to_pylist() == [3, 3, 4, 4]
    assert run.steps["repeat"].to_pylist() == [0, 0, 0, 1, 1, 1, 1]
    assert run.scenario == 'name = "x"\n'
    again = Recording(tmp_path / "plain-2", other, toy)
    again.take(listed(0.0), PROMPTS)
    assert (again.complete, again.taken) == (True, 2)
    assert MeasuredRun.read(tmp_path / "plain-2").requests.equals(run.requests)


def test_measure_warms_up_and_runs_all_repeats_once(toy: ToyEngine, tmp_path: Path) -> None:
    run = measure(tmp_path / "a" / "plain-1", CONDITION, toy, lambda: listed(0.0, 0.0), PROMPTS)
    assert run.requests.num_rows == 4
    arrived = len(toy.arrived)
    assert arrived > 4  # the warm-up's
    assert measure(tmp_path / "a" / "plain-1", CONDITION, toy, lambda: listed(0.0), PROMPTS).requests.num_rows == 4
    assert len(toy.arrived) == arrived


def test_a_repeat_that_failed_leaves_no_trace(
    toy: ToyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(tmp_path / "plain-1", CONDITION, toy)
    with pytest.raises(CalibrationError):
        recording.take(listed(0.0), [Prompt("x", "chat", text="hello")])
    assert recording.taken == 0
    assert not recording.folder.exists()


def test_another_condition_or_engine_is_refused(toy: ToyEngine, tmp_path: Path) -> None:
    folder = tmp_path / "plain-1"
    Recording(folder, CONDITION, toy).take(listed(0.0), PROMPTS)
    with pytest.raises(CalibrationError, match="scenario_hash = 'abc', got 'other'"):
        Recording(folder, replace(CONDITION, scenario_hash="other"), toy)
    Recording(folder, CONDITION, toy).take(listed(0.0), PROMPTS)
    with pytest.raises(CalibrationError, match="holds a measured run with role = 'fit', got 'held-out'"):
        Recording(folder, replace(CONDITION, role="held-out"), toy)
    with pytest.raises(CalibrationError, match="holds a measured run with engine = "):
        Recording(folder, CONDITION, ToyEngine(info=toy.info.model_copy(update={"version": "2"})))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").write_text("")
    with pytest.raises(CalibrationError, match="it holds other files"):
        Recording(tmp_path / "other", CONDITION, toy)
    with pytest.raises(CalibrationError, match="repeats: must be at least 1, got 0"):
        Recording(tmp_path / "new", replace(CONDITION, repeats=0), toy)


def test_the_warm_up_leaves_nothing_behind(toy: ToyEngine) -> None:
    warm_up(toy, PROMPTS, requests=3, output_tokens=5)
    assert [len(request.prompt_token_ids) for request in toy.arrived] == [5, 5, 6, 7]
    assert not toy.busy
