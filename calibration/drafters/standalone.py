"""Standalone drafters: a smaller model of its own, with the verifier's vocabulary."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from calibration.common.errors import CalibrationError, quiet_transformers, require
from calibration.common.fetch import PUBLISHED, fetch
from calibration.common.vocabularies import first_difference
from calibration.drafters.info import DrafterSettings
from calibration.models.load import DtypeChoice, Verifier, choose_dtype, describe
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
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
