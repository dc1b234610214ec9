"""Kangaroo: the verifier's first layers and a trained attention-only adapter, with a double early exit.

The first exit is the shallow sub-network itself; the second one stops a draft at the first token whose largest
probability falls below ``confidence``, and after ``tokens`` tokens.

Source: Liu and others, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting" (2024); the defaults
are those of its published code. Two readings of ours: the token that falls below the threshold is not drafted itself,
and the drafter reads its shallow layers anew rather than from the verifier's cache, which changes cost, not tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from calibration.common.errors import CalibrationError
from calibration.common.settings import Fraction
from calibration.drafters.distilled import trained_info
from calibration.drafters.info import TrainedSettings
from calibration.models.load import Verifier

if TYPE_CHECKING:
    from calibration.drafters.lanes import ModelDrafter


class Kangaroo(TrainedSettings):
    """The adapter in the folder `path`; it stops below `confidence` and after `tokens` drafts."""

    paradigm: ClassVar[str] = "kangaroo"
    kind: Literal["kangaroo"] = "kangaroo"
    confidence: Fraction = 0.6
    tokens: Annotated[int, Field(ge=1)] = 6

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Load the adapter; `CalibrationError` where there is none, or it was made for another verifier."""
        from calibration.drafters.lanes import ModelDrafter, Stop
        from calibration.trained.folder import load_drafter
        from calibration.trained.kangaroo import KIND, load_kangaroo
        from calibration.trained.trainees import read_shape

        settings, tensors = load_drafter(self.path, KIND, verifier)
        shape = read_shape(self.path, settings)
        if shape.kind != "kangaroo":
            raise CalibrationError(f"{self.path}: shape: must be of kind 'kangaroo', got '{shape.kind}'")
        model = load_kangaroo(verifier, shape, tensors)
        info = trained_info(self, model, self.path).model_copy(update={"max_draft_tokens": self.tokens})
        return ModelDrafter(info, model, stop=Stop(self.confidence, self.tokens))
