"""The verifier: load it by name, with its tokenizer, onto a device; describe it for a manifest.

torch and transformers are imported inside the functions, so that this module can be imported without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calibration.common.errors import CalibrationError, did_you_mean, quiet_transformers, require
from calibration.common.fetch import PUBLISHED, fetch
from calibration.common.progress import StageProgress
from calibration.traces.manifest import ModelInfo

if TYPE_CHECKING:
    import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
"""``fp8``: decoder layers in e4m3 (weights and their inputs), the rest in bfloat16; CUDA devices only."""


@dataclass(frozen=True)
class Verifier:
    """A causal language model that defines the text, with its tokenizer.

    ``end_ids`` are the tokens that end an output; ``provenance`` says where the weights come from, where known.
    """

    info: ModelInfo
    model: Any
    tokenizer: Any
    end_ids: frozenset[int]
    provenance: str | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.device
        return device

    def encode(self, text: str) -> list[int]:
        """Give the token ids of `text` as one user turn in the tokenizer's chat template (plain text without one)."""
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(text).input_ids
        return ids


def choose_device(choice: DeviceChoice = "auto") -> torch.device:
    """Give the torch device for `choice`; ``auto`` takes a CUDA device where there is one."""
    require("torch")
    import torch

    if choice not in ("auto", "cpu", "cuda"):
        raise CalibrationError(f"device: not known, got '{choice}'{did_you_mean(choice, ('auto', 'cpu', 'cuda'))}")
    if choice == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("device: must be available, got 'cuda' where torch sees no CUDA device")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(choice: DtypeChoice, device: torch.device) -> torch.dtype:
    """Give the torch dtype for `choice`; ``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    require("torch")
    import torch

    known = ("auto", "float32", "bfloat16", "float16", "fp8")
    if choice not in known:
        raise CalibrationError(f"dtype: not known, got '{choice}'{did_you_mean(choice, known)}")
    if choice == "fp8":
        choice = "bfloat16"  # what is not rounded further
    if choice == "auto":
        choice = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, choice)
    return dtype


def load_verifier(
    name: str,
    *,
    device: DeviceChoice = "auto",
    dtype: DtypeChoice = "auto",
    device_map: str | None = None,
    progress: StageProgress | None = None,
) -> Verifier:
    """Load the verifier `name`: a published name (``smollm2-135m``), a local model folder, or a hub name.

    ``device_map`` (``auto``, ``balanced`` ...) spreads a model over several devices as accelerate does; it takes the
    place of `device`.

    Raises:
        CalibrationError: there is no such model, it cannot be downloaded, or its architecture cannot be cut into
            drafters (it must be a decoder of full-attention layers in ``model.layers``).
        MissingExtraError: the extra ``calibration`` is not installed.
    """
    require("torch")
    transformers = require("transformers")
    where, shown, provenance = name, name, None
    if name in PUBLISHED:
        where = str(fetch(PUBLISHED[name], progress))
        provenance = PUBLISHED[name].provenance
    elif Path(name).is_dir():
        shown = Path(name).resolve().name
    place = choose_device(device)
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(where)
            spread = {} if device_map is None else {"device_map": device_map}
            kind = choose_dtype(dtype, place)
            model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=kind, **spread)
    except (OSError, ValueError, RuntimeError, require("safetensors").SafetensorError) as fault:
        reason = next(iter(str(fault).strip().splitlines()), type(fault).__name__)
        hint = did_you_mean(name, PUBLISHED)
        rule = "must be a published name, a model folder or a hub name that can be loaded"
        raise CalibrationError(f"verifier '{shown}': {rule} ({reason}){hint}") from None
    model = (model if device_map is not None else model.to(place)).eval()
    if dtype == "fp8":
        _round_to_fp8(shown, model)
    return make_verifier(shown, model, tokenizer, provenance)


def _round_to_fp8(name: str, model: Any) -> None:
    """Round the linear maps of every decoder layer to fp8; `CalibrationError` where the device cannot run them."""
    from calibration.models.fp8 import Fp8Module, fp8_fault

    if fault := fp8_fault(model.device):
        raise CalibrationError(f"verifier '{name}': {fault}")
    Fp8Module.put_in_place(model.model.layers)


def make_verifier(name: str, model: Any, tokenizer: Any, provenance: str | None = None) -> Verifier:
    """Wrap a loaded causal LM; `CalibrationError` where its layers cannot be cut into drafters."""
    check_architecture(name, model)
    model.requires_grad_(False)
    return Verifier(describe(name, model), model, tokenizer, _end_ids(model, tokenizer), provenance)


def check_architecture(name: str, model: Any) -> None:
    """Refuse models without ``model.layers`` and ``model.norm``, or with other than full attention."""
    body = getattr(model, "model", None)
    missing = [part for part in ("layers", "norm", "embed_tokens") if not hasattr(body, part)]
    if missing:
        kind = type(model).__name__
        raise CalibrationError(f"verifier '{name}': must have model.{missing[0]} (a Llama-like decoder), got {kind}")
    kinds = set(getattr(model.config, "layer_types", None) or ())
    window = getattr(model.config, "sliding_window", None)
    if kinds - {"full_attention"} or (window and not kinds):
        got = ", ".join(sorted(kinds)) or f"sliding_window = {window}"
        raise CalibrationError(f"verifier '{name}': every layer must be full attention, got {got}")


def describe(name: str, model: Any) -> ModelInfo:
    """Describe a loaded causal LM: parameters (tied weights once), shape, dtype."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters()) + _rounded(model)
    outer = {
        id(p): p.numel()
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in m.parameters()
    }
    return ModelInfo(
        name=name,
        parameters=total,
        parameters_non_embedding=total - sum(outer.values()),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocabulary=config.vocab_size,
        dtype=_dtype_of(model),
    )


def _rounded(model: Any) -> int:
    """Count weights that are buffers, because they were rounded to fp8."""
    return sum(b.numel() for name, b in model.named_buffers() if b.element_size() == 1 and name.endswith("weight"))


def _dtype_of(model: Any) -> str:
    """Give the dtype of the weights of the decoder layers."""
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in model.model.layers.state_dict().values()}
    return "float8_e4m3fn" if "float8_e4m3fn" in found else str(model.dtype).removeprefix("torch.")


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Collect end tokens from the generation settings and the tokenizer."""
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(value)
    return frozenset(found)
