"""The shapes that training can give a drafter; readable without torch."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from calibration.common.settings import Count, FromList, Table


class LayersShape(Table):
    """Which decoder layers a student has; embedding, head and hidden size are the verifier's.

    Either ``from_layers``: copies of these layers of the verifier (counted from 0), which are trained on. Or
    ``layers``: so many fresh ones, with ``heads``, ``kv_heads``, ``head_dim`` and ``intermediate_size`` of their own
    (each the verifier's where not given). The final norm is the student's own.
    """

    from_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], FromList, Field(min_length=1)] | None = None
    layers: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.from_layers is None) == (self.layers is None):
            raise ValueError("must give one of from_layers and layers")
        if self.from_layers is not None:
            widths = ("heads", "kv_heads", "head_dim", "intermediate_size")
            given = [name for name in widths if getattr(self, name) is not None]
            if given:
                raise ValueError(f"layers of the verifier keep their sizes: {', '.join(given)} cannot be set")
            if len(set(self.from_layers)) != len(self.from_layers):
                raise ValueError(f"from_layers must name no layer twice, got {list(self.from_layers)}")
        if (self.heads or 0) % (self.kv_heads or 1):
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        return self

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.from_layers) if self.from_layers is not None else self.layers or 0


class StudentShape(LayersShape):
    """A plain student."""

    kind: Literal["layers"] = "layers"


class NestedShape(LayersShape):
    """A student with exits: sub-models of its first ``exits`` layers, and all of it, that share one norm and head."""

    kind: Literal["nested"] = "nested"
    exits: Annotated[tuple[Count, ...], FromList, Field(min_length=1)]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(a >= b for a, b in itertools.pairwise((*self.exits, self.depth))):
            raise ValueError(f"exits must rise and lie below the {self.depth} layers, got {list(self.exits)}")
        return self


class KangarooShape(Table):
    """The verifier's own first ``exit_layer`` layers, shared and frozen, an adapter, and the verifier's head.

    The adapter is a norm, an attention (begun as the verifier's next one), and a norm of its own before the head.
    """

    kind: Literal["kangaroo"] = "kangaroo"
    exit_layer: Count


def _tagged(value: Any) -> Any:
    """Let a table without a kind be a plain student."""
    return {"kind": "layers", **value} if isinstance(value, dict) else value


AnyShape = Annotated[StudentShape | NestedShape | KangarooShape, Discriminator("kind"), BeforeValidator(_tagged)]
"""What ``shape`` of a ``[[student]]`` can be."""
