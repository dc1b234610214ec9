"""What a head on the verifier's states looks like; readable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, Table

if TYPE_CHECKING:
    from calibration.models.load import Verifier

HeadKind = Literal["medusa", "eagle", "block"]
"""Heads: parallel residual heads, an autoregressive decoder layer, a block of queries."""

HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

PARADIGMS: dict[HeadKind, str] = {"medusa": "medusa", "eagle": "eagle", "block": "block-head"}
"""What a manifest calls each of them."""


class HeadShape(Table):
    """Sizes of one head; its hidden size, embedding and LM head are the verifier's.

    ``tokens``: how many drafts it is trained for. Medusa has one head for each, a block one query for each, and these
    are the most that they propose; an EAGLE head drafts on as long as it is asked to. ``layers``: residual blocks per
    Medusa head, decoder layers of the others (an EAGLE head has one). The rest shapes decoder layers, and is the
    verifier's where not given.
    """

    tokens: Count = 4
    layers: Count = 1
    heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    intermediate_size: Count | None = None
    rope_base: Annotated[float, Field(gt=1)] = 10000.0

    @model_validator(mode="after")
    def _groups(self) -> HeadShape:
        if (self.heads or 0) % (self.kv_heads or 1):
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        return self

    def checked(self, kind: HeadKind) -> HeadShape:
        """Give the same shape; `CalibrationError` where a head of `kind` cannot have it."""
        if kind == "eagle" and self.layers != 1:
            raise CalibrationError(f"head 'eagle': layers must be 1, got {self.layers}")
        sizes = ("heads", "kv_heads", "head_dim", "intermediate_size")
        given = [name for name in sizes if getattr(self, name) is not None]
        if kind == "medusa" and given:
            raise CalibrationError(f"head 'medusa': has no decoder layer, {', '.join(given)} cannot be set")
        return self

    def for_verifier(self, kind: HeadKind, verifier: Verifier) -> HeadShape:
        """Give the shape with every size filled in from `verifier`; a Medusa head has none to fill in."""
        self.checked(kind)
        if kind == "medusa":
            return self
        config = verifier.model.config
        heads = config.num_attention_heads
        sizes: dict[str, Any] = {
            "heads": self.heads or heads,
            "kv_heads": self.kv_heads or getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": self.head_dim or getattr(config, "head_dim", None) or config.hidden_size // heads,
            "intermediate_size": self.intermediate_size or config.intermediate_size,
        }
        try:
            return HeadShape.model_validate(self.model_dump() | sizes)
        except ValidationError as fault:
            raise CalibrationError(f"head '{kind}': {fault.errors()[0]['msg']}") from None
