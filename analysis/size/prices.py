"""Where the step prices of a recorded family come from: its own timings, and catalogued devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.size.family import Student, shape_of
from analysis.size.playback import Prices, timed
from analysis.size.settings import Place
from calibration.common.errors import CostError
from calibration.traces import TraceSet
from simulator.pricing.costs import Number, StepCost
from simulator.pricing.fitted import fit_step
from simulator.pricing.grades import STATED, StepGrade
from simulator.pricing.roofline import roofline_step

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
