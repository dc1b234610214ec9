"""The drafters that a verifier brings along: prompt lookup, early exit, layer skip.

    prompt-lookup   copies what followed the earliest occurrence of the longest matching n-gram
    exit-L          the first L layers, then the verifier's own final norm and head
    skip-A-B        the verifier without its layers A .. B-1 (counted from 0)

A model drafter is a plain causal LM that shares the verifier's weight tensors and has a KV cache of its own.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from calibration.errors import CalibrationError, did_you_mean
from calibration.extras import require
from calibration.models import Verifier, describe
from calibration.traces.manifest import DrafterInfo


@dataclass(frozen=True)
class PromptLookup:
    """Prompt lookup with suffixes of `ngram_max` down to `ngram_min` tokens; see `calibration.ngram`."""

    ngram_max: int = 3
    ngram_min: int = 1
    max_draft_tokens: int = 20

    @property
    def name(self) -> str:
        """Name in the manifest, and on the command line."""
        return "prompt-lookup"


@dataclass(frozen=True)
class EarlyExit:
    """The first `layers` layers of the verifier, its final norm and its head."""

    layers: int

    @property
    def name(self) -> str:
        """Name in the manifest, and on the command line."""
        return f"exit-{self.layers}"


@dataclass(frozen=True)
class LayerSkip:
    """The verifier without its layers `first` .. `stop` - 1 (counted from 0)."""

    first: int
    stop: int

    @property
    def name(self) -> str:
        """Name in the manifest, and on the command line."""
        return f"skip-{self.first}-{self.stop}"


DrafterSpec = PromptLookup | EarlyExit | LayerSkip


@dataclass(frozen=True)
class Drafter:
    """A drafter ready to run. `model` is None for prompt lookup, which needs none."""

    spec: DrafterSpec
    info: DrafterInfo
    model: Any | None

    @property
    def name(self) -> str:
        """Name in the manifest."""
        return self.info.name


def parse_drafter(text: str) -> DrafterSpec:
    """Read ``prompt-lookup``, ``exit-L`` or ``skip-A-B``; `CalibrationError` for anything else."""
    if text == "prompt-lookup":
        return PromptLookup()
    if found := re.fullmatch(r"exit-(\d+)", text):
        return EarlyExit(int(found[1]))
    if found := re.fullmatch(r"skip-(\d+)-(\d+)", text):
        return LayerSkip(int(found[1]), int(found[2]))
    hint = did_you_mean(text, ("prompt-lookup", "exit-L", "skip-A-B"))
    raise CalibrationError(f"drafter '{text}': must be prompt-lookup, exit-L or skip-A-B{hint}")


def kept_layers(spec: EarlyExit | LayerSkip, layers: int) -> tuple[int, ...]:
    """Give the indices of the layers that `spec` keeps of `layers`; `CalibrationError` where it does not fit."""
    if isinstance(spec, EarlyExit):
        if not 1 <= spec.layers < layers:
            raise CalibrationError(
                f"drafter '{spec.name}': exit layer must lie in [1, {layers - 1}], got {spec.layers}"
            )
        return tuple(range(spec.layers))
    if not 0 <= spec.first < spec.stop <= layers or spec.stop - spec.first == layers:
        rule = f"must leave out layers A .. B-1 with 0 <= A < B <= {layers} and keep one"
        raise CalibrationError(f"drafter '{spec.name}': {rule}, got A = {spec.first}, B = {spec.stop}")
    return tuple(i for i in range(layers) if not spec.first <= i < spec.stop)


def build_drafter(spec: DrafterSpec, verifier: Verifier) -> Drafter:
    """Make the drafter `spec` of `verifier`; model drafters share its weights and cost no memory of their own."""
    if isinstance(spec, PromptLookup):
        info = DrafterInfo(
            name=spec.name,
            parameters=0,
            parameters_non_embedding=0,
            layers=0,
            paradigm="prompt-lookup",
            deterministic=True,
            max_draft_tokens=spec.max_draft_tokens,
            settings={"ngram_max": spec.ngram_max, "ngram_min": spec.ngram_min, "match": "earliest"},
        )
        return Drafter(spec, info, None)
    model = submodel(verifier.model, kept_layers(spec, verifier.model.config.num_hidden_layers))
    settings = {"exit_layer": spec.layers} if isinstance(spec, EarlyExit) else {"skipped": [spec.first, spec.stop]}
    info = DrafterInfo(
        **describe(spec.name, model).model_dump(),
        paradigm="early-exit" if isinstance(spec, EarlyExit) else "layer-skip",
        deterministic=False,
        settings=settings,
    )
    return Drafter(spec, info, model)


def submodel(model: Any, keep: tuple[int, ...]) -> Any:
    """Give a causal LM made of the layers `keep` of `model`, in that order, on the same weight tensors.

    The layers are new modules, since each must know its own place in the KV cache; their parameters are assigned,
    not copied.
    """
    torch = require("torch")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]
    with torch.device("meta"):
        cut = type(model)(config)
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(keep)}
    weights = {}
    for key, tensor in model.state_dict().items():
        if layer := re.match(r"model\.layers\.\d+\.", key):
            if layer[0] in place:
                weights[place[layer[0]] + key[layer.end() :]] = tensor
        else:
            weights[key] = tensor
    cut.load_state_dict(weights, strict=True, assign=True)
    cut.tie_weights()
    cut.model.rotary_emb = model.model.rotary_emb  # its buffers are not in the state dict
    cut.generation_config = copy.deepcopy(model.generation_config)
    return cut.requires_grad_(False).eval()
