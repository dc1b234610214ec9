"""A drafter inside another's settings, where it must be a causal LM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.common.errors import CalibrationError
from calibration.drafters.info import DrafterSettings

if TYPE_CHECKING:
    from calibration.drafters.lanes import ModelDrafter
    from calibration.models.load import Verifier


def build_lane(settings: DrafterSettings, inner: DrafterSettings, verifier: Verifier) -> ModelDrafter:
    """Make the drafter `inner` of `settings`, which need a causal LM that sees tokens alone."""
    from calibration.drafters.lanes import ModelDrafter

    drafter = inner.build(verifier)
    if not isinstance(drafter, ModelDrafter):
        rule = "drafter must be a causal LM that sees tokens alone (early-exit, layer-skip, standalone ...)"
        raise CalibrationError(f"drafter '{settings.label}': {rule}, got {inner.paradigm}")
    return drafter
