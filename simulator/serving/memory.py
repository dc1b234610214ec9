"""How many KV blocks a device holds, from the shapes of the models."""

from __future__ import annotations

from calibration.common.errors import CostError
from calibration.traces import Manifest
from calibration.traces.manifest import ModelInfo
from calibration.traces.paradigms import own_models
from simulator.scenario.engine import BLOCK_SIZE, EngineSettings

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8": 1, "fp8": 1, "int8": 1}

Drafter = str | tuple[str, ...] | None
"""One drafter, several that share the device, or none."""


def num_blocks(engine: EngineSettings, manifest: Manifest, drafter: Drafter) -> int | None:
    """Give the number of KV blocks; None where memory is unlimited.

    gpu_memory_utilization * device memory * tensor_parallel_size, less the weights of verifier and drafter, divided
    by the bytes of a block; activations are not counted. Raises `CostError` that names what is not known.
    """
    if engine.gpu_memory_utilization is None:
        return engine.num_gpu_blocks
    memory = manifest.device.memory_bytes
    if memory is None:
        raise CostError(
            "engine.gpu_memory_utilization: device.memory_bytes is unknown in manifest.json; give num_gpu_blocks"
        )
    usable = engine.gpu_memory_utilization * memory * (engine.tensor_parallel_size or 1)
    weights = sum(_weight_bytes(model) for model in _models(manifest, drafter))
    blocks = int((usable - weights) / block_bytes(engine, manifest, drafter))
    if blocks < 1:
        raise CostError(
            f"engine.gpu_memory_utilization: must leave memory for KV blocks, got {usable / 1e9:.4g} GB for weights "
            f"of {weights / 1e9:.4g} GB"
        )
    return blocks


def block_bytes(engine: EngineSettings, manifest: Manifest, drafter: Drafter) -> float:
    """Give the bytes of a block, verifier and drafter together: keys and values of `block_size` tokens.

    Bytes per token of a model: 2 * layers * KV heads * (hidden size / heads) * bytes of its dtype. A model whose head
    size is not hidden size / heads needs kv_bytes_per_token.
    """
    per_token = engine.kv_bytes_per_token
    if per_token is None:
        per_token = sum(_kv_bytes(model) for model in _models(manifest, drafter))
    return per_token * (engine.block_size or BLOCK_SIZE)


def _models(manifest: Manifest, drafter: Drafter) -> list[ModelInfo]:
    models: list[ModelInfo] = [manifest.verifier]
    for name in (drafter,) if isinstance(drafter, str) else drafter or ():
        models += own_models(manifest.drafter(name))
    return models


def _kv_bytes(model: ModelInfo) -> float:
    if model.layers == 0:  # heads that read the verifier's states alone
        return 0.0
    layers, kv_heads, hidden, heads = (
        _known(model, name, "kv_bytes_per_token") for name in ("layers", "kv_heads", "hidden_size", "heads")
    )
    return 2 * layers * kv_heads * hidden / heads * _dtype_bytes(model, "kv_bytes_per_token")


def _weight_bytes(model: ModelInfo) -> float:
    return _known(model, "parameters", "num_gpu_blocks") * _dtype_bytes(model, "num_gpu_blocks")


def _known(model: ModelInfo, name: str, instead: str) -> int:
    value: int | None = getattr(model, name)
    if not value:
        raise CostError(f"engine: KV memory: {name} of '{model.name}' is unknown in manifest.json; give {instead}")
    return value


def _dtype_bytes(model: ModelInfo, instead: str) -> int:
    if model.dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise CostError(
            f"engine: KV memory: dtype of '{model.name}' must be one of {known}, got {model.dtype!r}; give {instead}"
        )
    return DTYPE_BYTES[model.dtype]
