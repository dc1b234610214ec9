"""A student distilled from the verifier: a small causal LM that uses the verifier's embedding and head.

Students are trained by `calibration.training`; only their own layers and final norm lie in their folder.

Heads on the verifier's hidden states: Medusa, EAGLE and block heads that `calibration.heads` has trained.

Kangaroo: the verifier's first layers and a trained attention-only adapter, with a double early exit.

The first exit is the shallow sub-network itself; the second one stops a draft at the first token whose largest
probability falls below ``confidence``, and after ``tokens`` tokens.

Source: Liu and others, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting" (2024); the defaults
are those of its published code. Two readings of ours: the token that falls below the threshold is not drafted itself,
and the drafter reads its shallow layers anew rather than from the verifier's cache, which changes cost, not tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, Fraction
from calibration.drafters.info import DrafterSettings, TrainedSettings
from calibration.models.load import Verifier, describe
from calibration.traces.manifest import DrafterInfo
from calibration.trained.shapes import PARADIGMS, HeadKind, HeadShape

if TYPE_CHECKING:
    from calibration.drafters.lanes import ModelDrafter
    from calibration.trained.head_drafting import HeadDrafter


class Distilled(TrainedSettings):
    """The student in the folder `path`."""

    paradigm: ClassVar[str] = "distilled"
    kind: Literal["distilled"] = "distilled"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Load the student; `CalibrationError` where there is none, or it was made for another verifier."""
        from calibration.drafters.lanes import ModelDrafter
        from calibration.trained.folder import load_drafter
        from calibration.trained.students import KIND, load_student
        from calibration.trained.trainees import read_shape

        settings, tensors = load_drafter(self.path, KIND, verifier)
        shape = read_shape(self.path, settings)
        if shape.kind != "layers":
            raise CalibrationError(f"{self.path}: shape: must be of kind 'layers', got '{shape.kind}'")
        student = load_student(verifier, shape, tensors)
        return ModelDrafter(trained_info(self, student, self.path), student)


def trained_info(settings: DrafterSettings, model: Any, folder: str) -> DrafterInfo:
    """Describe a trained drafter: its shape, and the recipe that stands in its folder."""
    from calibration.trained.folder import read_about

    about = read_about(folder)
    told = {**settings.model_dump(mode="json", exclude={"kind", "name", "path"}), **about["settings"]}
    return DrafterInfo(
        **describe(settings.label, model).model_dump(),
        paradigm=settings.paradigm,
        deterministic=False,
        settings={**told, "recipe": about["recipe"]},
    )


class Medusa(TrainedSettings):
    """Parallel residual heads from the folder `path`; a round costs one pass, whatever its length."""

    paradigm: ClassVar[str] = PARADIGMS["medusa"]
    kind: Literal["medusa"] = "medusa"

    def build(self, verifier: Verifier) -> HeadDrafter:
        """Load the heads; `CalibrationError` where they are not there or do not fit."""
        return load_drafting_head(self.label, "medusa", self.path, verifier)


class Eagle(TrainedSettings):
    """An autoregressive head from the folder `path`; it drafts up to `max_draft_tokens`, one step each."""

    paradigm: ClassVar[str] = PARADIGMS["eagle"]
    kind: Literal["eagle"] = "eagle"
    max_draft_tokens: Count = 8

    def build(self, verifier: Verifier) -> HeadDrafter:
        """Load the head; `CalibrationError` where it is not there or does not fit."""
        return load_drafting_head(self.label, "eagle", self.path, verifier, self.max_draft_tokens)


class Block(TrainedSettings):
    """A block head from the folder `path`; a round costs one pass, whatever its length."""

    paradigm: ClassVar[str] = PARADIGMS["block"]
    kind: Literal["block"] = "block"

    def build(self, verifier: Verifier) -> HeadDrafter:
        """Load the head; `CalibrationError` where it is not there or does not fit."""
        return load_drafting_head(self.label, "block", self.path, verifier)


def load_drafting_head(
    name: str, kind: HeadKind, path: str, verifier: Verifier, max_draft_tokens: int | None = None
) -> HeadDrafter:
    """Load a trained head for `verifier`; without `max_draft_tokens` it drafts as many as it was trained for.

    ``parameters`` of its info are the head's own: embedding and LM head are the verifier's. Medusa heads count as
    the one to few residual layers that they are, without attention.
    """
    from calibration.trained.folder import load_drafter
    from calibration.trained.head_drafting import HeadDrafter
    from calibration.trained.heads import load_head

    saved, tensors = load_drafter(path, kind, verifier)
    shape = HeadShape.model_validate(saved)
    hidden = verifier.model.config.hidden_size
    head = load_head(kind, shape, hidden, tensors)
    own = sum(tensor.numel() for tensor in tensors.values())
    info = DrafterInfo(
        name=name,
        parameters=own,
        parameters_non_embedding=own,
        layers=shape.layers,
        hidden_size=hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        vocabulary=verifier.info.vocabulary,
        dtype=verifier.info.dtype,
        paradigm=PARADIGMS[kind],
        deterministic=False,
        max_draft_tokens=max_draft_tokens or shape.tokens,
        settings={"kind": kind, **saved},
    )
    return HeadDrafter(info, head, verifier.model)


class Kangaroo(TrainedSettings):
    """The adapter in the folder `path`; it stops below `confidence` and after `tokens` drafts."""

    paradigm: ClassVar[str] = "kangaroo"
    kind: Literal["kangaroo"] = "kangaroo"
    confidence: Fraction = 0.6
    tokens: Count = 6

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
