"""A drafter whose LM head is cut to the tokens that the verifier writes most (VocabTrim).

The head of a small drafter is a large part of its step. Only the rows of K tokens are kept: q' = q restricted to them
and normalised, which is the softmax over their logits. What is lost is the mass that p has elsewhere; the verifier is
untouched, so decoding stays lossless, and acceptance given the text is min(1, q'/p) as for any drafter.

How often a verifier writes each token: counted from a TraceSet, a corpus of training text, or read from a file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
from pydantic import Field, model_validator

from calibration.common.arrays import Ints
from calibration.common.errors import CalibrationError
from calibration.drafters.info import DrafterSettings
from calibration.drafters.nested import build_lane
from calibration.drafters.standalone import with_head
from calibration.models.load import Verifier, describe

if TYPE_CHECKING:
    from calibration.drafters.info import AnyDrafter
    from calibration.drafters.lanes import ModelDrafter


def token_counts(source: Path | str, vocabulary: int) -> Ints:
    """Give how often each of `vocabulary` tokens was written in `source` [vocabulary].

    `source` is a TraceSet or a corpus of training text, of which the outputs count, or a CSV file with the columns
    ``token`` and ``count``. `CalibrationError` where it is none of these, or holds other tokens.
    """
    path = Path(source)
    if path.suffix == ".csv" and path.is_file():
        tokens, counts = _read_csv(path)
    else:
        tokens = _written(path)
        counts = np.ones(len(tokens), dtype=np.int64)
    if len(tokens) == 0 or counts.sum() == 0:
        raise CalibrationError(f"{path}: must hold tokens that were written, got none")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        worst = tokens.max() if tokens.max() >= vocabulary else tokens.min()
        raise CalibrationError(f"{path}: tokens must lie in [0, {vocabulary - 1}], got {worst}")
    found: Ints = np.zeros(vocabulary, dtype=np.int64)
    np.add.at(found, tokens, counts)
    return found


def save_token_counts(counts: Ints, path: Path | str) -> None:
    """Write the counts that are not 0 as CSV, most frequent first."""
    order = ranked(counts)[: int((counts > 0).sum())]
    pa.csv.write_csv(pa.table({"token": order, "count": counts[order]}), path)


def ranked(counts: Ints) -> Ints:
    """Give token ids by falling count; among equals the lower id, in BPE the earlier merge, comes first."""
    order: Ints = np.argsort(-counts, kind="stable")
    return order


def most_frequent(counts: Ints, tokens: int | None = None, coverage: float | None = None) -> Ints:
    """Give the ids, rising, of the `tokens` most frequent ones, or of as many as make up `coverage` of the counts."""
    order = ranked(counts)
    if tokens is None:
        reached = np.cumsum(counts[order]) / counts.sum()
        tokens = int(np.searchsorted(reached, min(coverage or 1.0, reached[-1]) - 1e-12)) + 1
    return np.sort(order[:tokens])


def counts_hash(counts: Ints) -> str:
    """Give the sha256 of the table."""
    return hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()


def _written(path: Path) -> Ints:
    from calibration.drafters.proposed import read_texts

    return np.concatenate(
        [np.zeros(0, dtype=np.int64), *(np.asarray(row, dtype=np.int64) for row in read_texts(path))]
    )


def _read_csv(path: Path) -> tuple[Ints, Ints]:
    try:
        table = pa.csv.read_csv(path)
        columns = [table[name].to_numpy().astype(np.int64, casting="safe") for name in ("token", "count")]
    except (pa.ArrowInvalid, KeyError, TypeError) as fault:
        raise CalibrationError(f"{path}: must have integer columns token and count ({fault})") from None
    if (columns[1] < 0).any():
        raise CalibrationError(f"{path}: count must be >= 0, got {columns[1].min()}")
    return columns[0], columns[1]


class Trimmed(DrafterSettings):
    """`drafter` with the head rows of `tokens` tokens, or of as many as make up `coverage` of the counted text.

    ``counts_path``: where tokens are counted, see `calibration.drafters.trimmed`; it should be text of this
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
