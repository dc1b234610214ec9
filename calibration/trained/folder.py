"""Trained drafters on disk: a folder with ``drafter.json`` and ``model.safetensors``.

The file holds only tensors that the verifier does not have itself; ``drafter.json`` says which kind of drafter they
make, with which settings, for which verifier, and by which recipe they were trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.common.errors import CalibrationError, require
from calibration.common.files import fresh_folder
from calibration.models.load import Verifier
from calibration.traces.manifest import ModelInfo

_SHAPE = ("layers", "hidden_size", "heads", "kv_heads", "vocabulary")
"""What a verifier must share with the one that a drafter was trained for."""


def save_drafter(
    folder: Path | str,
    kind: str,
    settings: Mapping[str, Any],
    verifier: ModelInfo,
    tensors: Mapping[str, Tensor],
    recipe: Mapping[str, Any],
) -> None:
    """Write a trained drafter; `folder` appears whole or not at all, an older drafter in it is replaced."""
    save_file = require("safetensors.torch").save_file
    about = {"kind": kind, "settings": settings, "verifier": verifier.model_dump(), "recipe": recipe}
    with fresh_folder(Path(folder), "drafter.json", error=CalibrationError, what="trained drafter") as scratch:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / "model.safetensors")
        (scratch / "drafter.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_drafter(folder: Path | str, kind: str, verifier: Verifier) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (settings, tensors) of a trained drafter; tensors come in the verifier's dtype, on its device.

    `CalibrationError` where there is none, or it is of another kind or for a verifier of another shape.
    """
    path = Path(folder)
    about = read_about(path)
    if about["kind"] != kind:
        raise CalibrationError(f"{path}: must hold a drafter of kind '{kind}', got '{about['kind']}'")
    mine = verifier.info.model_dump()
    for key in _SHAPE:
        if about["verifier"][key] != mine[key]:
            rule = f"was trained for a verifier with {key} = {about['verifier'][key]}"
            raise CalibrationError(f"{path}: {rule}, got {mine[key]} ({verifier.info.name})")
    safetensors = require("safetensors")
    try:
        tensors = require("safetensors.torch").load_file(path / "model.safetensors")
    except (OSError, safetensors.SafetensorError) as fault:
        raise CalibrationError(f"{path / 'model.safetensors'}: not readable ({fault})") from None
    place, dtype = verifier.device, verifier.model.dtype
    return about["settings"], {
        name: t.to(place, dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()
    }


def read_about(folder: Path | str) -> dict[str, Any]:
    """Read ``drafter.json``; `CalibrationError` where it is missing or broken."""
    path = Path(folder) / "drafter.json"
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CalibrationError(f"{folder}: must be a trained drafter (a folder with drafter.json)") from None
    except json.JSONDecodeError as fault:
        raise CalibrationError(f"{path}:{fault.lineno}: not valid JSON ({fault.msg})") from None
    missing = [key for key in ("kind", "settings", "verifier", "recipe") if key not in about]
    if missing:
        raise CalibrationError(f"{path}: must say {', '.join(missing)}")
    return about
