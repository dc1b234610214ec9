"""What training can give a drafter, and how it is trained: students, and heads on the verifier's states.

Readable without torch.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, ValidationError, model_validator

from calibration.common.errors import CalibrationError
from calibration.common.settings import Count, Fraction, FromList, Inside, Natural, Table

if TYPE_CHECKING:
    from calibration.models.load import Verifier


class LayersShape(Table):
    """Which decoder layers a student has; embedding, head and hidden size are the verifier's.

    Either ``from_layers``: copies of these layers of the verifier (counted from 0), which are trained on. Or
    ``layers``: so many fresh ones, with ``heads``, ``kv_heads``, ``head_dim`` and ``intermediate_size`` of their own
    (each the verifier's where not given). The final norm is the student's own.
    """

    from_layers: Annotated[tuple[Natural, ...], FromList, Field(min_length=1)] | None = None
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


DivergenceName = Literal["fkl", "rkl", "jsd", "tvd", "tvd++"]
"""What `calibration.training.learner` has."""


class TrainSettings(Table):
    """One training run.

    ``tokens``: the budget, in output tokens learnt from (texts come again where the corpus is smaller).
    ``batch_tokens`` counts prompts and padding too. ``loss_vocabulary``: the loss sees that many tokens, the most
    frequent of the training text, and ``loss_others`` drawn anew at every step that stand for all others; None keeps
    all, 8192 of 49,152 makes the head five times cheaper. ``temperature`` divides both models' logits.
    ``on_policy``: share of the batches that the student writes itself, by sampling at that temperature
    (DistillSpec). ``curve_tokens``, ``checkpoint_tokens``: how often the curve gets a row, and a checkpoint is kept.
    ``bfloat16``: matrix products in bfloat16, weights and sums in float32. The learning rate rises over the first
    ``warmup`` of the budget and falls along a cosine to a twentieth.
    """

    tokens: Count = 500_000
    divergence: DivergenceName = "fkl"
    jsd_beta: Inside = 0.5
    batch_tokens: Count = 512
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.04
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    loss_vocabulary: Annotated[int, Field(ge=2)] | None = None
    loss_others: Natural = 1024
    on_policy: Fraction = 0.0
    bfloat16: bool = True
    curve_tokens: Count = 100_000
    checkpoint_tokens: Count = 50_000
    seed: Natural = 0

    def rate(self, tokens: int) -> float:
        """Give the share of the learning rate after `tokens` of the budget."""
        done = min(tokens / self.tokens, 1.0)
        if done < self.warmup:
            return (done + 0.01) / (self.warmup + 0.01)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))


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


class HeadSettings(TrainSettings):
    """One training run of a head: a student's settings (there are no on-policy batches), and its own.

    ``starts``: so many starts of each text, drawn anew each time it comes, are drafted from; None takes all. The
    divergence of draft j is weighted with ``depth_decay`` ** (j - 1). ``regression`` weighs the smooth L1 distance
    between a predicted feature and the verifier's state, relative to the divergence (EAGLE: 10; None: 1 for an EAGLE
    head and 0 for the others, whose features need not be the verifier's). ``noise``: features are read with uniform
    noise of at most that share of their root mean square (EAGLE trains so, against the errors of its own features).
    ``prompt_states``: the verifier reads the prompts once, so that EAGLE and block heads are trained with them as
    context; else with the output alone. Medusa heads read one state and need none.
    """

    batch_tokens: Count = 512
    starts: Count | None = 64
    depth_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    regression: Annotated[float, Field(ge=0)] | None = None
    noise: Annotated[float, Field(ge=0)] = 0.0
    prompt_states: bool = True
    loss_vocabulary: Annotated[int, Field(ge=2)] | None = 8192
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _off_policy(self) -> HeadSettings:
        if self.on_policy:
            raise ValueError(f"on_policy: heads read the verifier's own states, must be 0, got {self.on_policy}")
        return self
