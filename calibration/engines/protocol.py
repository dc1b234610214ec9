"""What an engine must do to be driven and measured: take requests, step, and say what each request received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from calibration.measured.run import EngineInfo
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
