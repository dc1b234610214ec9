"""A drafter inside another's settings, where it must be a causal LM.

Nested exits (S2D): every drafted token leaves at the first exit that is sure enough, else goes deeper.

Exits of a student that was trained for it, or, untrained, of the verifier itself. ``layers`` of the recording counts
the layers that each draft needed.

Source: "S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large Language Models" (2024).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, Fraction, FromList
from calibration.drafters.info import DrafterSettings
from calibration.models.load import Verifier

if TYPE_CHECKING:
    from calibration.drafters.exits import NestedExitsDrafter
    from calibration.drafters.lanes import ModelDrafter


def build_lane(settings: DrafterSettings, inner: DrafterSettings, verifier: Verifier) -> ModelDrafter:
    """Make the drafter `inner` of `settings`, which need a causal LM that sees tokens alone."""
    from calibration.drafters.lanes import ModelDrafter

    drafter = inner.build(verifier)
    if not isinstance(drafter, ModelDrafter):
        rule = "drafter must be a causal LM that sees tokens alone (early-exit, layer-skip, standalone ...)"
        raise CalibrationError(f"drafter '{settings.label}': {rule}, got {inner.paradigm}")
    return drafter


class NestedExits(DrafterSettings):
    """Exits of the student in `path`, or without one after `exits` layers of the verifier, the last being the end.

    ``thresholds``: the least largest probability at which each exit but the last one is taken.
    """

    paradigm: ClassVar[str] = "nested-exits"
    kind: Literal["nested-exits"] = "nested-exits"
    thresholds: Annotated[tuple[Fraction, ...], FromList, Field(min_length=1)]
    exits: Annotated[tuple[Count, ...], FromList, Field(min_length=2)] | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.exits is None) == (self.path is None):
            raise ValueError("must give one of exits and path")
        if self.exits is not None:
            if any(a >= b for a, b in itertools.pairwise(self.exits)):
                raise ValueError(f"exits must rise, got {list(self.exits)}")
            if len(self.thresholds) != len(self.exits) - 1:
                rule = f"must be {len(self.exits) - 1}, one for each exit but the last"
                raise ValueError(f"thresholds {rule}, got {len(self.thresholds)}")
        return self

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        if self.path is not None:
            return Path(self.path).name or self.paradigm
        return "exits-" + "-".join(str(count) for count in self.exits or ())

    def build(self, verifier: Verifier) -> NestedExitsDrafter:
        """Make the drafter; `CalibrationError` where the exits do not fit the verifier or the student."""
        from calibration.drafters.exits import trained_exits, verifier_exits

        if self.path is not None:
            return trained_exits(self, self.thresholds, verifier, self.path)
        layers = verifier.model.config.num_hidden_layers
        if self.exits is None or self.exits[-1] >= layers:
            got = None if self.exits is None else self.exits[-1]
            raise CalibrationError(f"drafter '{self.label}': exits must lie in [1, {layers - 1}], got {got}")
        return verifier_exits(self, self.thresholds, verifier, self.exits)
