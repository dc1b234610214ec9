"""A drafter whose LM head is cut to the tokens that the verifier writes most (VocabTrim).

The head of a small drafter is a large part of its step. Only the rows of K tokens are kept: q' = q restricted to them
and normalised, which is the softmax over their logits. What is lost is the mass that p has elsewhere; the verifier is
untouched, so decoding stays lossless, and acceptance given the text is min(1, q'/p) as for any drafter.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from calibration.common.errors import CalibrationError
from calibration.drafters.info import DrafterSettings
from calibration.drafters.nested import build_lane
from calibration.drafters.standalone import with_head
from calibration.drafters.token_counts import counts_hash, most_frequent, token_counts
from calibration.models.load import Verifier, describe

if TYPE_CHECKING:
    from calibration.drafters.info import AnyDrafter
    from calibration.drafters.lanes import ModelDrafter


class Trimmed(DrafterSettings):
    """`drafter` with the head rows of `tokens` tokens, or of as many as make up `coverage` of the counted text.

    ``counts_path``: where tokens are counted, see `calibration.drafters.token_counts`; it should be text of this
    verifier.
    """

    paradigm: ClassVar[str] = "trimmed"
    kind: Literal["trimmed"] = "trimmed"
    drafter: AnyDrafter
    counts_path: str
    tokens: Annotated[int, Field(ge=1)] | None = None
    coverage: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.tokens is None) == (self.coverage is None):
            raise ValueError("one of tokens and coverage must be given")
        return self

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        size = str(self.tokens) if self.coverage is None else f"{self.coverage:g}"
        return f"{self.drafter.label}-vocab-{size}"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Make the drafter; only the kept rows of the head are memory of its own."""
        import torch

        from calibration.drafters.lanes import ModelDrafter
        from calibration.drafters.trimmed_head import TrimmedHead

        vocabulary = verifier.model.config.vocab_size
        if self.tokens is not None and self.tokens > vocabulary:
            rule = f"tokens must be at most the vocabulary's {vocabulary}"
            raise CalibrationError(f"drafter '{self.label}': {rule}, got {self.tokens}")
        inner = build_lane(self, self.drafter, verifier)
        counts = token_counts(self.counts_path, vocabulary)
        kept = most_frequent(counts, self.tokens, self.coverage)
        head = TrimmedHead(inner.model.get_output_embeddings(), torch.as_tensor(kept))
        model = with_head(inner.model, head)
        told = {
            "drafter": {"paradigm": inner.info.paradigm, **inner.info.settings},
            "tokens": len(kept),
            "coverage": float(counts[kept].sum() / counts.sum()),
            "counted_tokens": int(counts.sum()),
            "counts_sha256": counts_hash(counts),
            "kept_sha256": hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest(),
        }
        shape = describe(self.label, model).model_dump()
        info = inner.info.model_copy(update={**shape, "paradigm": self.paradigm, "settings": told})
        return ModelDrafter(info, model, window=inner.window, stop=inner.stop)
