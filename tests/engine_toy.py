"""A serving engine made up for tests, with a clock of its own: every step takes what a linear law says.

Written from the description of the simulated engine alone: prompts first, whole, in the order of arrival, while there
are slots; else a decode round. Nothing is shared with the package but the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from calibration.engines.drive import DraftStep, EngineRequest, Step
from calibration.measured import EngineInfo
from calibration.traces import DeviceInfo


@dataclass
class Job:
    request: EngineRequest
    out: int = 0

    @property
    def context(self) -> int:
        return len(self.request.prompt_token_ids) + self.out


@dataclass
class ToyEngine:
    """`slots` requests at once; token j of request r is 100 r + j. With `draft_tokens` every odd round of a request
    accepts all drafts and every even one none; each draft token is a step of its own."""

    slots: int = 4
    draft_tokens: int = 0
    base_s: float = 0.02
    per_token_s: float = 0.001
    per_context_token_s: float = 0.00001
    overhead_s: float = 0.002
    draft_s: float = 0.004
    tells_drafts: bool = True
    model: str = "verifier"
    info: EngineInfo = field(default_factory=lambda: EngineInfo(name="toy"))
    device: DeviceInfo = field(default_factory=lambda: DeviceInfo(name="none", kind="unknown"))
    cpu_s: float = 100.0
    waiting: list[Job] = field(default_factory=list)
    live: list[Job] = field(default_factory=list)
    arrived: list[EngineRequest] = field(default_factory=list)
    closed: bool = False

    @property
    def wall_s(self) -> float:
        """Half as fast as the CPU's clock."""
        return 2 * self.cpu_s

    def submit(self, request: EngineRequest) -> None:
        self.arrived.append(request)
        self.waiting.append(Job(request))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def step(self) -> Step:
        new = self.waiting[: self.slots - len(self.live)]
        return self._prefill(new) if new else self._decode()

    def _prefill(self, new: list[Job]) -> Step:
        del self.waiting[: len(new)]
        self.live += new
        tokens = sum(job.context for job in new)
        self._pass(tokens, 0)
        received = {job.request.request_id: self._emit(job, 1) for job in new}
        self._leave()
        nothing = {} if self.tells_drafts else None
        return Step(
            "prefill",
            received,
            prefill_sequences=len(new),
            prefill_tokens=tokens,
            drafted_tokens=nothing,
            accepted_tokens=nothing,
        )

    def _decode(self) -> Step:
        jobs, k = list(self.live), self.draft_tokens
        context = sum(job.context for job in jobs)
        drafts = []
        for _ in range(k):
            self.cpu_s += self.draft_s
            drafts.append(DraftStep("drafter", len(jobs), len(jobs), context, self.draft_s, 2 * self.draft_s))
        accepted = {job.request.request_id: k if job.out % 2 else 0 for job in jobs}
        self._pass(len(jobs) * (k + 1), context)
        received = {job.request.request_id: self._emit(job, accepted[job.request.request_id] + 1) for job in jobs}
        accepted = {number: len(tokens) - 1 for number, tokens in received.items()}
        self._leave()
        return Step(
            "decode",
            received,
            sequences=len(jobs),
            new_tokens=len(jobs) * (k + 1),
            context_tokens=context - len(jobs),
            drafted_tokens=dict.fromkeys(accepted, k) if self.tells_drafts else None,
            accepted_tokens=accepted if self.tells_drafts else None,
            drafts=tuple(drafts),
        )

    def _pass(self, tokens: int, context: int) -> None:
        self.cpu_s += self.base_s + self.per_token_s * tokens + self.per_context_token_s * context + self.overhead_s

    def _emit(self, job: Job, tokens: int) -> list[int]:
        count = min(tokens, job.request.output_tokens - job.out)
        job.out += count
        return [100 * job.request.request_id + j for j in range(job.out - count, job.out)]

    def _leave(self) -> None:
        self.live = [job for job in self.live if job.out < job.request.output_tokens]

    def close(self) -> None:
        self.closed = True
