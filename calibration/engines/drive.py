"""Drive an engine with a workload: one repeat, request by request as the simulated run of the same scenario has it.

The clock is virtual: now is the sum of the step times so far, on the clock that was chosen. Where nothing is there to
do it jumps to the next arrival, so that idle time costs none; a request that arrives during a step is submitted after
it, and the tokens of a step carry the time of its end. The repeat ends when every counted request has ended.

What an engine must do to be driven and measured: take requests, step, and say what each request received.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any, Generic, Literal, NamedTuple, Protocol

from calibration.common.errors import CalibrationError
from calibration.common.fetch import no_collection
from calibration.common.progress import StageProgress
from calibration.measured.run import EngineInfo
from calibration.observe.prompts import Prompt
from calibration.observe.server import R, Source
from calibration.traces.manifest import DeviceInfo

Operation = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True)
class EngineRequest:
    """One request: its prompt, and how many tokens it is to receive. An end token does not end it."""

    request_id: int
    prompt_token_ids: Sequence[int]
    output_tokens: int


class DraftStep(NamedTuple):
    """One step of a drafter within an iteration, all counts sums over its sequences; seconds of CPU and of the wall.

    On a device, the engine waits for it before it reads the clocks; both are then the same wall time.
    """

    model: str
    sequences: int
    new_tokens: int
    context_tokens: int
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Step:
    """What one iteration of an engine did. `received`: the tokens that each request got, by request id.

    Counts are sums over the sequences of their kind; `context_tokens` and `prefill_context_tokens` were in the cache
    before it, `new_tokens` include drafted ones. `drafted_tokens` and `accepted_tokens` (bonus excluded) are per
    request; None where the engine does not say. An empty `received` with no tokens is an iteration in vain.
    `cpu_s` and `wall_s`: what the engine's own work took, `drafts` included, given where `step` does more than that
    (an adapter that keeps accounts); None where all of it is the engine's, and its caller may take the time.
    """

    operation: Operation
    received: Mapping[int, Sequence[int]]
    sequences: int = 0
    new_tokens: int = 0
    context_tokens: int = 0
    prefill_sequences: int = 0
    prefill_tokens: int = 0
    prefill_context_tokens: int = 0
    drafted_tokens: Mapping[int, int] | None = None
    accepted_tokens: Mapping[int, int] | None = None
    drafts: tuple[DraftStep, ...] = field(default=())
    cpu_s: float | None = None
    wall_s: float | None = None


class Engine(Protocol):
    """A serving engine with continuous batching, driven from outside: nothing happens between steps.

    It decodes greedily. A request leaves it when it has received its output tokens.
    """

    info: EngineInfo
    device: DeviceInfo
    model: str
    """The verifier, as TraceSets name it."""

    def submit(self, request: EngineRequest) -> None:
        """Take a request; it waits until a step has room for it."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or being served."""
        ...

    def step(self) -> Step:
        """Run one iteration; to be called only while `busy`."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


Clock = Literal["thread-cpu", "wall"]
"""CPU time of this process, or time of the wall."""

_ALL = 1 << 60
_IN_VAIN = 1000
"""Iterations in a row that nobody gains from, before the engine is said to be stuck."""


@dataclass(frozen=True)
class Drive:
    """What came of one repeat: columns of both tables of a measured run (`calibration.measured.run`) without
    ``repeat``.

    `requests` holds those that ended, in the order of their ids. A filler that the end of the repeat cut short has no
    row, its steps have.
    """

    requests: dict[str, list[Any]]
    steps: dict[str, list[Any]]


def drive(
    engine: Engine,
    source: Source[R],
    prompts: Sequence[Prompt],
    *,
    clock: Clock = "thread-cpu",
    progress: StageProgress | None = None,
) -> Drive:
    """Serve the requests of `source`, a workload, with `engine`; `prompts` are those of the sequences it draws from.

    A request whose prompt is to have another length than its sequence's gets the end of that prompt, repeated where
    it is too short. The garbage collector stays off until all has ended. `CalibrationError` where the engine does
    what the protocol rules out, or a prompt has no token ids.
    """
    run = _Run(engine, source, prompts, clock)
    report: StageProgress = progress or (lambda stage, done, total: None)
    gc.collect()  # now, and not in a step, where it would be taken for the engine's
    with no_collection():
        while not source.done:
            run.deliver()
            if not engine.busy:
                run.wait()
                continue
            run.step()
            report(f"drive {engine.info.name}", run.ended, source.counted)
        drain(engine)
    return Drive(run.request_columns(), run.steps)


def drain(engine: Engine) -> None:
    """Step until the engine has nothing left to do; nobody looks at what comes of it."""
    vain = 0
    while engine.busy:
        vain = 0 if engine.step().received else vain + 1
        if vain > _IN_VAIN:
            raise CalibrationError(f"engine {engine.info.name}: must serve what it took, {vain} steps gave no token")


def check_engine(engine: Engine) -> None:
    """Refuse an engine that still has requests of somebody else."""
    if engine.busy:
        raise CalibrationError(f"engine {engine.info.name}: must have nothing to do when a repeat begins, it is busy")


@dataclass
class _Served(Generic[R]):
    """A request in the engine, or through with it: what it received, and when."""

    request: R
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    emission_s: list[float] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    def row(self, drafting_known: bool) -> dict[str, Any]:
        """Give its row of the table of requests."""
        r = self.request
        return {
            "request_id": r.id,
            "sequence_id": self.prompt.sequence_id,
            "domain": self.prompt.domain,
            "counted": r.counted,
            "arrival_s": r.arrival_s,
            "first_token_s": self.emission_s[0],
            "finish_s": self.emission_s[-1],
            "prompt_tokens": r.prompt_tokens,
            "output_tokens": len(self.tokens),
            "drafts": self.drafts if drafting_known else None,
            "drafted_tokens": self.drafted if drafting_known else None,
            "accepted_tokens": self.accepted if drafting_known else None,
            "emission_s": self.emission_s,
            "emitted": self.emitted,
            "output_token_ids": self.tokens,
        }


class _Run(Generic[R]):
    """The state of one repeat."""

    def __init__(self, engine: Engine, source: Source[R], prompts: Sequence[Prompt], clock: Clock) -> None:
        check_engine(engine)
        self.ended = 0
        self.steps: dict[str, list[Any]] = {name: [] for name in _STEP_COLUMNS}
        self._engine, self._source, self._prompts, self._clock = engine, source, prompts, clock
        self._now = 0.0
        self._number = self._vain = 0
        self._serving: dict[int, _Served[R]] = {}
        self._through: list[_Served[R]] = []
        self._drafting_known = True

    def deliver(self) -> None:
        """Submit what has arrived by now."""
        for request in self._source.admit(self._now, _ALL):
            if not 0 <= request.sequence < len(self._prompts):
                rule = f"request {request.id}: sequence must be one of {len(self._prompts)} prompts"
                raise CalibrationError(f"workload: {rule}, got {request.sequence}")
            prompt = self._prompts[request.sequence]
            if not prompt.token_ids:
                raise CalibrationError(
                    f"prompt of {prompt.sequence_id}: must have token ids to be submitted, has none"
                )
            self._serving[request.id] = _Served(request, prompt)
            ids = prompt.of_length(request.prompt_tokens)
            self._engine.submit(EngineRequest(request.id, ids, request.output_tokens))

    def wait(self) -> None:
        """Let the clock jump to the next arrival."""
        name, due_s = self._engine.info.name, self._source.next_arrival_s
        if self._serving:
            raise CalibrationError(f"engine {name}: must serve what it took, request {min(self._serving)} got lost")
        if math.isinf(due_s):
            raise CalibrationError("workload: must bring its counted requests, no further one will arrive")
        self._now = max(self._now, due_s)

    def step(self) -> None:
        """Let the engine run one iteration, and note what it took and gave."""
        wall_s, cpu_s = perf_counter(), process_time()
        step = self._engine.step()
        cpu_s, wall_s = process_time() - cpu_s, perf_counter() - wall_s
        cpu_s = cpu_s if step.cpu_s is None else step.cpu_s
        wall_s = wall_s if step.wall_s is None else step.wall_s
        self._note(step, cpu_s if self._clock == "thread-cpu" else wall_s, wall_s)
        self.deliver()  # before the requests that end now bring new ones, as in the simulated engine
        for number, tokens in step.received.items():
            self._receive(number, tokens)
        self._count(step)
        for served in [one for one in self._serving.values() if len(one.tokens) == one.request.output_tokens]:
            self._end(served)
        self._vain = 0 if step.received or step.prefill_tokens else self._vain + 1
        if self._vain > _IN_VAIN:
            name = self._engine.info.name
            raise CalibrationError(f"engine {name}: must serve what it took, {self._vain} steps gave no token")

    def _note(self, step: Step, seconds: float, wall_s: float) -> None:
        """Add the rows of an iteration, its draft steps first; the clock moves on."""
        for draft in step.drafts:
            taken = draft.cpu_s if self._clock == "thread-cpu" else draft.wall_s
            counts = {"sequences": draft.sequences, "new_tokens": draft.new_tokens}
            context = {"context_tokens": draft.context_tokens}
            self._row("draft", draft.model, taken, draft.wall_s, counts | context)
            seconds, wall_s = seconds - taken, wall_s - draft.wall_s
        if seconds < 0 or wall_s < 0:
            name = self._engine.info.name
            rule = f"step {self._number}: draft steps must not take longer than the iteration that they are part of"
            raise CalibrationError(f"engine {name}: {rule}, got {min(seconds, wall_s):g} s for the rest of it")
        counts = {name: getattr(step, name) for name in _COUNTS}
        for name, told in (("drafted_tokens", step.drafted_tokens), ("accepted_tokens", step.accepted_tokens)):
            if told is not None:
                counts[name] = sum(told.values())
        counts["emitted_tokens"] = sum(len(tokens) for tokens in step.received.values())
        self._row(step.operation, self._engine.model, seconds, wall_s, counts)
        self._number += 1

    def _row(self, operation: str, model: str, seconds: float, wall_s: float, counts: Mapping[str, int]) -> None:
        row: dict[str, Any] = dict.fromkeys(_STEP_COLUMNS, 0) | {"drafted_tokens": None, "accepted_tokens": None}
        row |= {"step": self._number, "operation": operation, "model": model, "start_s": self._now}
        row |= {"seconds": seconds, "wall_s": wall_s, **counts}
        for name, value in row.items():
            self.steps[name].append(value)
        self._now += seconds

    def _receive(self, number: int, tokens: Sequence[int]) -> None:
        where = f"engine {self._engine.info.name}: request {number}"
        served = self._serving.get(number)
        if served is None:
            raise CalibrationError(f"{where}: must be in service to receive tokens, it is not")
        if not tokens:
            raise CalibrationError(f"{where}: must receive at least one token where it is said to, got none")
        served.tokens += tokens
        served.emission_s.append(self._now)
        served.emitted.append(len(tokens))
        if len(served.tokens) > served.request.output_tokens:
            rule = f"must receive {served.request.output_tokens} tokens"
            raise CalibrationError(f"{where}: {rule}, got {len(served.tokens)}")

    def _count(self, step: Step) -> None:
        """Add up what was drafted for whom, where the engine tells both numbers in every step."""
        if step.drafted_tokens is None or step.accepted_tokens is None:
            self._drafting_known = False
            return
        for number, drafted in step.drafted_tokens.items():
            served = self._serving.get(number)
            if served is None:
                name = self._engine.info.name
                raise CalibrationError(f"engine {name}: request {number}: must be in service to draft for, it is not")
            served.drafts += drafted > 0
            served.drafted += drafted
            served.accepted += step.accepted_tokens.get(number, 0)

    def _end(self, served: _Served[R]) -> None:
        del self._serving[served.request.id]
        self._through.append(served)
        self.ended += served.request.counted
        self._source.end(served.request, self._now)

    def request_columns(self) -> dict[str, list[Any]]:
        """Give the table of requests."""
        ordered = sorted(self._through, key=lambda served: served.request.id)
        rows = [served.row(self._drafting_known) for served in ordered]
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


_COUNTS = (
    "sequences",
    "new_tokens",
    "context_tokens",
    "prefill_sequences",
    "prefill_tokens",
    "prefill_context_tokens",
)
_STEP_COLUMNS = (
    "step",
    "operation",
    "model",
    "start_s",
    "seconds",
    "wall_s",
    *_COUNTS,
    "drafted_tokens",
    "accepted_tokens",
    "emitted_tokens",
)
