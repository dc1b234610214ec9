"""A dynamic exit layer (DEL) as a kind of drafter; `calibration.drafters.exit_plan` has the method."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, Natural, Positive
from calibration.drafters.exit_plan import Planning
from calibration.drafters.info import DrafterSettings
from calibration.models.load import Verifier, describe
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.drafters.exits import ExitDrafter


class DynamicExit(DrafterSettings):
    """Drafts with the first l layers of the verifier, l chosen among ``exits`` at every start.

    ``half_life``: after so many tokens a shadow token counts half. A plan drafts ``min_draft_tokens`` to
    ``max_draft_tokens``; with a least of 0 it may well find that no exit pays. ``stop_early``: whether drafting stops
    where the cumulative confidence is low.
    """

    paradigm: ClassVar[str] = "dynamic-exit"
    kind: Literal["dynamic-exit"] = "dynamic-exit"
    exits: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    half_life: Positive = 64.0
    min_draft_tokens: Natural = 1
    max_draft_tokens: Count = 8
    stop_early: bool = True

    @field_validator("exits")
    @classmethod
    def _rising(cls, exits: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in itertools.pairwise(exits)):
            raise ValueError(f"must be a rising list, got {list(exits)}")
        return exits

    @field_validator("max_draft_tokens")
    @classmethod
    def _at_least(cls, most: int, info: Any) -> int:
        if most < info.data.get("min_draft_tokens", 0):
            raise ValueError(f"must be >= min_draft_tokens = {info.data['min_draft_tokens']}, got {most}")
        return most

    def build(self, verifier: Verifier) -> ExitDrafter:
        """Make the drafter; its exits share the verifier's weights, and its info is that of the deepest exit."""
        from calibration.drafters.cut import submodel
        from calibration.drafters.exits import ExitDrafter

        layers = verifier.model.config.num_hidden_layers
        if self.exits[-1] >= layers:
            rule = f"exits must lie in [1, {layers - 1}]"
            raise CalibrationError(f"drafter '{self.label}': {rule}, got {self.exits[-1]}")
        models = tuple(submodel(verifier.model, tuple(range(kept))) for kept in self.exits)
        info = DrafterInfo(
            **describe(self.label, models[-1]).model_dump(),
            paradigm=self.paradigm,
            deterministic=False,
            max_draft_tokens=self.max_draft_tokens,
            settings=self.model_dump(mode="json", exclude={"name", "kind"}),
        )
        return ExitDrafter(info, self.planning(layers), models)

    def planning(self, layers: int) -> Planning:
        """What its plans are made among, for a verifier of `layers` layers."""
        return Planning(
            self.exits, layers, self.half_life, self.min_draft_tokens, self.max_draft_tokens, self.stop_early
        )
