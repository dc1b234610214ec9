"""Heads on the verifier's hidden states: Medusa, EAGLE and block heads that `calibration.heads` has trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from calibration.drafters.info import TrainedSettings
from calibration.models.load import Verifier
from calibration.traces.manifest import DrafterInfo
from calibration.trained.head_shape import PARADIGMS, HeadKind, HeadShape

if TYPE_CHECKING:
    from calibration.trained.head_drafting import HeadDrafter


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
    max_draft_tokens: Annotated[int, Field(ge=1)] = 8

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
    from calibration.trained.head_networks import load_head

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
