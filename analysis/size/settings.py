"""What the study of drafter size is asked for.

Where the step prices of a recorded family come from: its own timings, and catalogued devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from analysis.common.bootstrap import DRAWS
from analysis.size.family import Student, shape_of
from analysis.size.playback import Prices, timed
from analysis.size.sweetspot import GAIN, WITHIN
from calibration.common.errors import CostError, ScenarioError
from calibration.traces import TraceSet
from simulator.pricing.costs import Number, StepCost
from simulator.pricing.fitted import fit_step
from simulator.pricing.grades import STATED, StepGrade
from simulator.pricing.roofline import roofline_step


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
