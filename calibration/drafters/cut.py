"""Drafters cut from the verifier's own layers: early exit and layer skip.

    exit-L          the first L layers, then the verifier's own final norm and head
    skip-A-B        the verifier without its layers A .. B-1 (counted from 0)

Each is a plain causal LM that shares the verifier's weight tensors and has a KV cache of its own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calibration.common.errors import CalibrationError, require
from calibration.drafters.info import DrafterSettings
from calibration.models.load import Verifier, describe
from calibration.traces.manifest import DrafterInfo

if TYPE_CHECKING:
    from calibration.drafters.lanes import ModelDrafter


class EarlyExit(DrafterSettings):
    """The first `layers` layers of the verifier, its final norm and its head."""

    paradigm: ClassVar[str] = "early-exit"
    kind: Literal["early-exit"] = "early-exit"
    layers: int

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        return f"exit-{self.layers}"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Make the drafter; it costs no memory of its own."""
        return cut_drafter(self, verifier, {"exit_layer": self.layers})


class LayerSkip(DrafterSettings):
    """The verifier without its layers `first` .. `stop` - 1 (counted from 0)."""

    paradigm: ClassVar[str] = "layer-skip"
    kind: Literal["layer-skip"] = "layer-skip"
    first: int
    stop: int

    @property
    def default_name(self) -> str:
        """Name where none is given."""
        return f"skip-{self.first}-{self.stop}"

    def build(self, verifier: Verifier) -> ModelDrafter:
        """Make the drafter; it costs no memory of its own."""
        return cut_drafter(self, verifier, {"skipped": [self.first, self.stop]})


def cut_drafter(spec: EarlyExit | LayerSkip, verifier: Verifier, settings: dict[str, Any]) -> ModelDrafter:
    """Make the drafter that `spec` cuts from `verifier`."""
    from calibration.drafters.lanes import ModelDrafter

    model = submodel(verifier.model, kept_layers(spec, verifier.model.config.num_hidden_layers))
    info = DrafterInfo(
        **describe(spec.label, model).model_dump(), paradigm=spec.paradigm, deterministic=False, settings=settings
    )
    return ModelDrafter(info, model)


def kept_layers(spec: EarlyExit | LayerSkip, layers: int) -> tuple[int, ...]:
    """Give the indices of the layers that `spec` keeps of `layers`; `CalibrationError` where it does not fit."""
    if isinstance(spec, EarlyExit):
        if not 1 <= spec.layers < layers:
            raise CalibrationError(
                f"drafter '{spec.label}': exit layer must lie in [1, {layers - 1}], got {spec.layers}"
            )
        return tuple(range(spec.layers))
    if not 0 <= spec.first < spec.stop <= layers or spec.stop - spec.first == layers:
        rule = f"must leave out layers A .. B-1 with 0 <= A < B <= {layers} and keep one"
        raise CalibrationError(f"drafter '{spec.label}': {rule}, got A = {spec.first}, B = {spec.stop}")
    return tuple(i for i in range(layers) if not spec.first <= i < spec.stop)


def submodel(model: Any, keep: tuple[int, ...]) -> Any:
    """Give a causal LM made of the layers `keep` of `model`, in that order, on the same weight tensors.

    Modules that must know their own place in the KV cache are shallow copies; everything below is shared. Layers may
    lie on several devices, or hold rounded weights.
    """
    torch = require("torch")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]
    layers = []
    for place, old in enumerate(keep):
        layer = _twin(model.model.layers[old])
        layer.self_attn = _twin(layer.self_attn)
        layer.self_attn.layer_idx = place
        layers.append(layer)
    cut = _twin(model)
    cut.model = _twin(model.model)
    cut.model.layers = torch.nn.ModuleList(layers)
    cut.config = cut.model.config = config
    return cut


def _twin(module: Any) -> Any:
    """Give a shallow copy of a module: its own attributes, the same parameters and children."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # parameters, children, hooks: the same ones, in tables of its own
            setattr(twin, name, copy.copy(value))
    if hook := twin.__dict__.pop("_hf_hook", None):  # accelerate's, for models on several devices: bound to `module`
        for name in ("forward", "_old_forward"):
            twin.__dict__.pop(name, None)
        require("accelerate.hooks").add_hook_to_module(twin, hook)
    return twin
