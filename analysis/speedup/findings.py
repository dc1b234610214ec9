"""What a study of one TraceSet found: a tree of frozen records that survives JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from analysis.common.bootstrap import DRAWS
from analysis.common.records import Record
from analysis.speedup.acceptance import AcceptanceRow, DepthPoint
from analysis.speedup.costfit import CostFit
from analysis.speedup.speedup import BestLength, Crossover, Schedule, SpeedupCell
from calibration.common.errors import ReportError, ScenarioError
from simulator.results.evidence import Evidence

CostSource = Literal["fitted", "stated", "assumed"]
"""Where step costs come from: fitted to recorded timings, stated with an import, assumed by whoever ran the study."""

SCHEMA_VERSION = 2
"""Version of the findings that this package writes and reads."""


@dataclass(frozen=True)
class StudySettings:
    """What is studied. `costs` is the ``costs`` table of a scenario; None takes the prices of the TraceSet."""

    draft_tokens: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = DRAWS
    seed: int = 0
    costs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty grid and values that no engine accepts."""
        for name in ("draft_tokens", "batches"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] < 1:
                raise ScenarioError(f"study: {name} must be increasing whole numbers from 1, got {list(values)}")
        if self.draws < 100:
            raise ScenarioError(f"study: draws must be at least 100, got {self.draws}")


@dataclass(frozen=True)
class ModelFact:
    """One model of the pair, as the manifest has it; None means unknown. ``role`` is verifier or the paradigm."""

    name: str
    role: str
    parameters: int | None
    parameters_non_embedding: int | None
    layers: int | None
    dtype: str | None


@dataclass(frozen=True)
class Provenance:
    """Where every number comes from."""

    kind: str
    created: str
    command: str
    paceline_version: str
    seed: int | None
    decoding: str
    models: tuple[ModelFact, ...]
    device: str
    device_kind: str
    threads: int | None
    memory_bytes: int | None
    software: dict[str, str]
    prompts: dict[str, int]
    import_format: str | None
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Sizes:
    """How much was recorded. ``requests`` and ``output_tokens`` by domain; ``positions`` over all drafters.

    ``repetition``: share of output tokens that follow the same 16 tokens as once before in the same output; None
    where token ids were not recorded.
    """

    requests: dict[str, int]
    requests_by_drafter: dict[str, int]
    output_tokens: dict[str, int]
    positions: int
    timed_steps: int
    repetition: float | None = None


@dataclass(frozen=True)
class RunShare:
    """Throughput of one simulation and how its engine time divides.

    ``cost_error`` is the relative error of that time if every fitted cost were off by its held-out error in the same
    direction: the held-out errors weighted by the shares of the time. None where costs were not fitted or checked.
    Such an error is not in the interval of a speed-up, and it cancels in part.
    """

    drafter: str
    draft_tokens: int
    batch: int
    tokens_per_second: float
    prefill_s: float
    draft_s: float
    verify_s: float
    overhead_s: float
    extrapolated_share: float
    cost_error: float | None


@dataclass(frozen=True)
class Answer:
    """What pays, and where it stops paying, over all domains.

    ``headline`` is the best row at the smallest batch size simulated: of the drafters that pay there, the fastest;
    if none pays, the least slow. ``crossover`` belongs to its drafter. ``paying`` lists every drafter that pays at
    some simulated batch size, ``paying_domains`` the (drafter, domain) pairs that pay at the smallest one.
    """

    headline: BestLength
    crossover: Crossover
    paying: tuple[str, ...]
    paying_domains: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Findings(Record):
    """Everything that a report says, and the labels of how it was come by.

    Acceptance and depth curves are *measured* (replays of recorded text); speed-ups, best lengths, crossovers and
    runs are *simulated*, with costs from ``cost_source``, *extrapolated* where the row says so; cost fits are
    *fitted*. ``domain`` None means all. ``warnings`` are what the simulator and the fits said.
    ``reference_draft_tokens`` is the draft length that tables quote where one must be chosen.
    """

    settings: StudySettings
    provenance: Provenance
    sizes: Sizes
    method: str
    reference_draft_tokens: int
    acceptance: tuple[AcceptanceRow, ...]
    depth: tuple[DepthPoint, ...]
    speedup: tuple[SpeedupCell, ...]
    best: tuple[BestLength, ...]
    crossovers: tuple[Crossover, ...]
    schedules: tuple[Schedule, ...]
    runs: tuple[RunShare, ...]
    cost_source: CostSource
    cost_fits: tuple[CostFit, ...]
    warnings: tuple[str, ...]
    answer: Answer
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names of the drafters, in the order of recording."""
        return tuple(model.name for model in self.provenance.models if model.role != "verifier")

    def run(self, drafter: str, draft_tokens: int, batch: int) -> RunShare:
        """Give the simulation of `drafter` at this draft length and batch size; `ReportError` if there is none."""
        for run in self.runs:
            if (run.drafter, run.draft_tokens, run.batch) == (drafter, draft_tokens, batch):
                return run
        raise ReportError(f"findings: no run of '{drafter}' with draft length {draft_tokens} at batch {batch}")

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return tuple(self.sizes.requests)
