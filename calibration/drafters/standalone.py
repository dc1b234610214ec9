"""Standalone drafters: a smaller model of its own, with the verifier's vocabulary.

A drafter whose LM head is cut to the tokens that the verifier writes most (VocabTrim).

The head of a small drafter is a large part of its step. Only the rows of K tokens are kept: q' = q restricted to them
and normalised, which is the softmax over their logits. What is lost is the mass that p has elsewhere; the verifier is
untouched, so decoding stays lossless, and acceptance given the text is min(1, q'/p) as for any drafter.

How often a verifier writes each token: counted from a TraceSet, a corpus of training text, or read from a file.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
from pydantic import Field, model_validator

from calibration.common.arrays import Ints
from calibration.common.errors import CalibrationError, quiet_transformers, require
from calibration.common.fetch import PUBLISHED, fetch
from calibration.common.settings import Count
from calibration.common.vocabularies import first_difference
from calibration.drafters.info import DrafterSettings
from calibration.drafters.nested import build_lane
from calibration.models.load import DtypeChoice, Verifier, choose_dtype, describe
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.drafters.info import AnyDrafter
    from calibration.drafters.lanes import ModelDrafter

DrafterDtype = Literal["verifier"] | DtypeChoice


class LoadedSettings(DrafterSettings):
    """What drafters loaded from somewhere share.

    ``model``: a folder, a hub name or a published name. ``dtype`` defaults to the verifier's. ``device_map`` is
    handed to transformers (a model over several GPUs); without it the drafter stands on the verifier's device.
    """

    model: str
    dtype: DrafterDtype = "verifier"
    device_map: str | None = None

    @property
    def default_name(self) -> str:
        """Name where none is given: the last part of the model's."""
        return Path(self.model).name or self.paradigm

    def placed(self, folder: Path) -> Self:
        """Give the settings with a model folder beside the job file found there."""
        placed = super().placed(folder)
        return (
            placed.model_copy(update={"model": str(folder / self.model)})
            if (folder / self.model).is_dir()
            else placed
        )

    def load(self, verifier: Verifier) -> tuple[Any, Any]:
        """Load (model, tokenizer); `CalibrationError` where there is none, or its attention cannot be masked."""
        require("torch")
        transformers = require("transformers")
        where = str(fetch(PUBLISHED[self.model], None)) if self.model in PUBLISHED else self.model
        dtype = verifier.model.dtype if self.dtype == "verifier" else choose_dtype(self.dtype, verifier.device)
        broken = (OSError, ValueError, RuntimeError, KeyError, require("safetensors").SafetensorError)
        try:
            with quiet_transformers():
                tokenizer = transformers.AutoTokenizer.from_pretrained(where)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    where, dtype=dtype, device_map=self.device_map
                )
        except broken as fault:
            reason = next(iter(str(fault).strip().splitlines()), type(fault).__name__)
            rule = "model must be a folder or a hub name of a causal LM with its tokenizer"
            raise CalibrationError(f"drafter '{self.label}': {rule}, got '{self.model}' ({reason})") from None
        check_attention(self.label, model)
        if self.device_map is None:
            model = model.to(verifier.device)
        return model.requires_grad_(False).eval(), tokenizer


class Standalone(LoadedSettings):
    """A causal LM whose tokens are the verifier's, such as a smaller member of its family."""

    paradigm: ClassVar[str] = "standalone"
    kind: Literal["standalone"] = "standalone"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Load the drafter; `CalibrationError` where its tokens are not the verifier's."""
        model, tokenizer = self.load(verifier)
        return standalone_drafter(self, model, tokenizer, verifier)


def standalone_drafter(settings: LoadedSettings, model: Any, tokenizer: Any, verifier: Verifier) -> ModelDrafter:
    """Make a drafter of a loaded `model`; vocabularies padded to different sizes are made equal at the head."""
    from calibration.drafters.lanes import ModelDrafter

    label = settings.label
    other = first_difference(verifier.tokenizer, tokenizer)
    largest = max(verifier.tokenizer.get_vocab().values()) + 1
    readable = model.get_input_embeddings().num_embeddings
    if other is None and readable < largest:
        other = f"it reads {readable} tokens, the verifier has {largest}"
    if other is not None:
        rule = f"must have the tokens of verifier '{verifier.info.name}'"
        raise CalibrationError(f"drafter '{label}': {rule}, but {other}; kind 'foreign' drafts in another vocabulary")
    info = DrafterInfo(
        **describe(label, model).model_dump(),
        paradigm=settings.paradigm,
        deterministic=False,
        settings={"model": settings.model},
    )
    return ModelDrafter(info, resized(model, verifier.model.config.vocab_size))


def resized(model: Any, vocabulary: int) -> Any:
    """Give `model` with logits [..., vocabulary]: cut at the end, or filled there with -inf; weights are shared."""
    if model.config.vocab_size == vocabulary:
        return model
    from calibration.drafters.trimmed_head import PaddedHead

    return with_head(model, PaddedHead(model.get_output_embeddings(), vocabulary))


def with_head(model: Any, head: Any) -> Any:
    """Give a model that shares every weight and layer of `model` but its LM head, which is `head`."""
    found = copy.copy(model)
    found._modules = dict(model._modules)
    found.config = copy.deepcopy(model.config)
    found.set_output_embeddings(head)
    return found


def check_attention(label: str, model: Any) -> None:
    """Refuse models whose layers are not all full attention, or that take no positions."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    window = getattr(model.config, "sliding_window", None)
    if kinds - {"full_attention"} or (window and not kinds):
        got = ", ".join(sorted(kinds)) or f"sliding_window = {window}"
        raise CalibrationError(f"drafter '{label}': every layer must be full attention, got {got}")
    missing = {"attention_mask", "position_ids", "past_key_values"} - set(inspect.signature(model.forward).parameters)
    if missing:
        kind = type(model).__name__
        raise CalibrationError(f"drafter '{label}': must take {', '.join(sorted(missing))}, which {kind} does not")


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

    ``counts_path``: where tokens are counted, see `calibration.drafters.standalone`; it should be text of this
    verifier.
    """

    paradigm: ClassVar[str] = "trimmed"
    kind: Literal["trimmed"] = "trimmed"
    drafter: AnyDrafter
    counts_path: str
    tokens: Count | None = None
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
