"""What the study of drafter size is asked for.

Where the step prices of a recorded family come from: its own timings, and catalogued devices.

Seconds that each recorded request takes in a batch kept full, by draft length, without simulating the schedule.

A round is drafted in lock step by the whole batch and verified at once; its time is divided evenly among the requests
in it, and a prompt is prefilled alone, as the simulator does and `analysis.speedup.speedup` counts. Rounds are those
of `analysis.common.rounds`: exact for greedy traces, exact expectations for sampled ones. Approximations: the rounds
of a request have its middle context on average, and the other requests of its batch the mean context. Prices that are
linear in context know no more of a batch than that; against the simulator see the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from analysis.common.bootstrap import DRAWS
from analysis.common.rounds import recording, replay_rounds
from analysis.size.sweetspot import GAIN, WITHIN, Student, shape_of
from calibration.common.arrays import Floats
from calibration.common.errors import CostError, ReplayError, ScenarioError
from calibration.traces import TraceSet
from simulator.pricing.costs import Number, StepCost
from simulator.pricing.fitted import fit_step
from simulator.pricing.grades import STATED, StepGrade
from simulator.pricing.roofline import roofline_step


@dataclass(frozen=True)
class Requests:
    """The recorded requests: their domains, prompt and output tokens, arrays of shape (requests)."""

    domains: tuple[str, ...]
    prompt_tokens: Floats
    output_tokens: Floats

    @classmethod
    def of(cls, traces: TraceSet) -> Requests:
        """Give those of `traces`, in its order."""
        table = traces.sequences
        return cls(
            tuple(table["domain"].to_pylist()),
            np.asarray(table["prompt_tokens"].to_numpy(zero_copy_only=False), dtype=np.float64),
            np.asarray(table["output_tokens"].to_numpy(zero_copy_only=False), dtype=np.float64),
        )


@dataclass(frozen=True)
class Drafted:
    """What one drafter does on every request: rounds by draft length k = 1 .. K, shape (K, requests).

    ``accepted`` and ``compared`` count its positions: P(a token drafted there is accepted), summed, and how many.
    """

    drafter: str
    rounds: Floats
    accepted: Floats
    compared: Floats


def played(traces: TraceSet, drafter: str, draft_tokens: int) -> Drafted:
    """Replay `drafter` at every draft length up to `draft_tokens`.

    Raises `ReplayError` where it was not recorded on every request.
    """
    recorded = recording(traces, drafter)
    if not (recorded.first < recorded.end).all():
        missing = int((recorded.first >= recorded.end).sum())
        raise ReplayError(f"drafter '{drafter}': must be recorded on every request, got {missing} without it")
    # Every round drafts, and its first draft is compared: depth 1 is at risk once a round.
    rounds = [replay_rounds(recorded, k).at_risk[:, 0] for k in range(1, draft_tokens + 1)]
    startable = recorded.startable
    matched = (recorded.match * startable).sum(axis=0, dtype=np.float64)
    return Drafted(drafter, np.stack(rounds), matched, startable.sum(axis=0).astype(np.float64))


@dataclass(frozen=True)
class Prices:
    """Step prices of one device: of the verifier's prefill and verification, and of a step of each drafter."""

    prefill: StepCost
    verify: StepCost
    draft: dict[str, StepCost]


def plain_seconds(requests: Requests, prices: Prices, batch: int) -> Floats:
    """Give the engine seconds of each request without speculation, shape (requests)."""
    return _seconds(requests, prices, requests.output_tokens - 1, None, 0, batch)


def drafted_seconds(requests: Requests, prices: Prices, drafted: Drafted, batch: int) -> Floats:
    """Give the engine seconds of each request by draft length 1 .. K, shape (K, requests)."""
    step = prices.draft[drafted.drafter]
    return np.stack([_seconds(requests, prices, r, step, k, batch) for k, r in enumerate(drafted.rounds, start=1)])


def round_seconds(prices: Prices, draft: StepCost | None, k: int, batch: int, context: Floats | float) -> Floats:
    """Give the seconds of a round of `batch` requests that draft k tokens; `context`: cached tokens, summed."""
    seconds = np.asarray(prices.verify.step_seconds(batch, batch * (k + 1), context), dtype=np.float64)
    for step in range(k):
        assert draft is not None
        seconds = seconds + draft.step_seconds(batch, batch, context + step * batch)
    return seconds


def extrapolated(prices: Prices, draft_tokens: int, batch: int, requests: Requests) -> bool:
    """Tell whether the price of some round lies outside of what was measured or tested."""
    context = float((requests.prompt_tokens + requests.output_tokens).mean()) * batch
    drafts = any(step.outside(batch, batch, context) for step in prices.draft.values())
    return drafts or prices.verify.outside(batch, batch * (draft_tokens + 1), context)


def _seconds(
    requests: Requests, prices: Prices, rounds: Floats, draft: StepCost | None, k: int, batch: int
) -> Floats:
    middle = requests.prompt_tokens + requests.output_tokens / 2
    others = float((rounds * middle).sum() / rounds.sum())
    share = round_seconds(prices, draft, k, batch, middle + (batch - 1) * others) / batch
    prefill = prices.prefill.step_seconds(np.ones_like(middle), requests.prompt_tokens, np.zeros_like(middle))
    return np.asarray(rounds * share + prefill)


def timed(traces: TraceSet, model: str, operation: str) -> bool:
    """Tell whether steps of `model` were timed."""
    rows = traces.timings
    mine = pc.and_(pc.equal(rows["model"], model), pc.equal(rows["operation"], operation))
    return bool(pc.any(mine).as_py())


@dataclass(frozen=True)
class Place:
    """Where a model runs: a catalogued device, how many of them share it, and the type of its numbers."""

    device: str
    tensor_parallel: int = 1
    dtype: Literal["bf16", "fp16", "fp8", "fp32"] = "bf16"

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"{self.tensor_parallel} x {self.device}" if self.tensor_parallel > 1 else self.device


@dataclass(frozen=True)
class SizeSettings:
    """What is studied; everything has a default.

    ``drafters``: the family (None: found in the manifest). ``draft_tokens``: lengths 1 .. so many are tried, bonus
    not included; ``large_draft_tokens`` for the large verifier. ``catalogue``: devices for the measured family.
    ``verifier`` and ``places``: the large verifier, and where it runs. ``context_tokens``: cached tokens of a
    sequence there. ``depth_layers``: depth of made-up drafters, about that of published ones from 0.5B to 8B;
    ``shallow_layers`` that of wide and shallow ones. ``quoted_weight``: of a fact that is quoted from a paper, beside
    1 for one that is at hand. ``shared_doublings``: doublings of size over which the error of an engine parts (see
    `discrepancy`). ``within`` and ``gain``: see `find_spots`.
    """

    drafters: tuple[str, ...] | None = None
    batches: tuple[int, ...] = (1, 4, 8)
    draft_tokens: int = 6
    catalogue: tuple[Place, ...] = (Place("h100-sxm"),)
    verifier: str = "llama-3.1-70b"
    places: tuple[Place, ...] = (Place("h100-sxm", 4), Place("h200", 2))
    large_batches: tuple[int, ...] = (1, 8, 32)
    large_draft_tokens: int = 16
    context_tokens: int = 512
    published: tuple[str, ...] = (
        "qwen2.5-0.5b",
        "llama-3.2-1b",
        "qwen2.5-1.5b",
        "llama-3.2-3b",
        "qwen2.5-7b",
        "llama-3.1-8b",
    )
    depth_layers: int = 28
    shallow_layers: int = 4
    quoted_weight: float = 0.5
    shared_doublings: float = 3.0
    within: float = WITHIN
    gain: float = GAIN
    draws: int = DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse an empty grid and values that mean nothing."""
        for name in ("batches", "large_batches"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] < 1:
                raise ScenarioError(f"size study: {name} must be increasing whole numbers from 1, got {list(values)}")
        for name in ("draft_tokens", "large_draft_tokens", "depth_layers", "shallow_layers", "context_tokens"):
            if getattr(self, name) < 1:
                raise ScenarioError(f"size study: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.quoted_weight <= 1:
            raise ScenarioError(f"size study: quoted_weight must lie between 0 and 1, got {self.quoted_weight}")
        if not self.shared_doublings > 0:
            raise ScenarioError(f"size study: shared_doublings must be above 0, got {self.shared_doublings}")
        if self.draws < 100:
            raise ScenarioError(f"size study: draws must be at least 100, got {self.draws}")
        if not 0 < self.within < 1 or not 0 < self.gain < 1:
            raise ScenarioError(
                f"size study: within and gain must lie between 0 and 1, got {self.within} and {self.gain}"
            )
        if not self.places or not self.published:
            raise ScenarioError("size study: places and published must name at least one each, got none")


RECORDED = "recorded step times"
ROOFLINE = "roofline of the same shapes"
PROPORTIONAL = "in proportion to parameters"


def priced(traces: TraceSet, students: Sequence[Student], places: Sequence[Place]) -> list[tuple[str, Prices, str]]:
    """Give the devices that a family can be priced on: (name, prices, where they come from).

    Its own where every step was timed, and the catalogued ones, drafters on one device each. Raises `CostError` where
    there is neither, or a shape is not known.
    """
    manifest = traces.manifest
    name = manifest.verifier.name
    wanted = [(name, "prefill"), (name, "verify"), *((s.name, "draft") for s in students)]
    found = []
    if all(timed(traces, *key) for key in wanted):
        timings = traces.timings
        draft = {s.name: fit_step(timings, s.name, "draft") for s in students}
        own = Prices(fit_step(timings, name, "prefill"), fit_step(timings, name, "verify"), dict(draft))
        found.append((manifest.device.name, own, RECORDED))
    for place in places:
        shape = shape_of(manifest.verifier)
        steps = {
            s.name: roofline_step(
                shape_of(s.info, shape.head_dim), place.device, operation="draft", dtype=place.dtype
            )
            for s in students
        }
        size, dtype = place.tensor_parallel, place.dtype
        prefill = roofline_step(shape, place.device, operation="prefill", dtype=dtype, tensor_parallel=size)
        verify = roofline_step(shape, place.device, dtype=dtype, tensor_parallel=size)
        found.append((place.name, Prices(prefill, verify, dict(steps)), ROOFLINE))
    if not found:
        raise CostError("size study: needs timings of every model, or a catalogued device, got neither")
    return found


@dataclass(frozen=True)
class Share:
    """A step that costs a share of the like step of another model."""

    whole: StepCost
    share: float

    def step_seconds(self, batch: Number, new_tokens: Number, context_tokens: Number) -> Any:
        """Give seconds; arguments broadcast."""
        return self.share * self.whole.step_seconds(batch, new_tokens, context_tokens)

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Whether the whole step lies outside of what was measured."""
        return self.whole.outside(batch, new_tokens, context_tokens)

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return f"assumed share of a step: {self.whole.rests_on}"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return STATED

    def describe(self) -> dict[str, Any]:
        """Give the share and what it is of."""
        return {"kind": "share", "share": self.share, "of": self.whole.describe()}
