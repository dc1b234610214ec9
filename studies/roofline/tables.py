"""The public tables that the roofline is fitted to and tested on, each as cells with its conventions undone.

Every reader takes the folder of public data and gives a table of one row a cell with ``table``, ``model`` (a shape's
name), ``tensor_parallel``, ``operator``, ``seconds`` and what its kind of kernel depends on. Nothing is copied into
the package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from calibration.shapes.shapes import get_shape
from simulator.hardware.devices import H100_SXM
from simulator.hardware.work import Share, kv_token_bytes, weight_memory_bytes

VIDUR, LLMSERVINGSIM, ML_ENERGY = "Vidur", "LLMServingSim", "ML.ENERGY"

_VIDUR = Path("vidur-profiling/data/profiling")
_LLMSERVINGSIM = Path("llmservingsim-h100/profiler/v0/perf_models/H100/meta-llama")
_VIDUR_MODELS = {"llama-2-7b": "Llama-2-7b-hf", "llama-2-70b": "Llama-2-70b-hf"}
_LLMSERVINGSIM_MODELS = {"llama-3.1-8b": ("Llama-3.1-8B", 1), "llama-3.1-70b": ("Llama-3.1-70B", 4)}
_ML_ENERGY_MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
}

PROMPT_TOKENS = 225.0
"""Mean prompt of ML.ENERGY's two tasks. For gpqa published runs of that benchmark say so (44,473 tokens of 198
prompts); for lm-arena-chat it is an assumption, see `SPREAD`."""
SPREAD = {"lm-arena-chat": 1.0, "gpqa": 0.2}
"""Assumed squared coefficient of variation of ML.ENERGY's output lengths.

A request that answers longer is seen in more steps, so a step finds prompt + output / 2 x (1 + spread) tokens a
sequence. With these, the six rows whose batch is bounded by memory fill it to within 12 % (see `memory_contexts`).
"""
APERTUS_CONTEXT = 500.0
"""Assumed mean context of Apertus' sequences, tokens."""
MEMORY_SHARE, ACTIVATION_BYTES = 0.9, 3e9
"""vLLM's default share of a device's memory, and what of it is taken for activations."""


def matrices(folder: Path) -> pd.DataFrame:
    """Read the matrix multiplications of Vidur and LLMServingSim: ``tokens`` x ``inner`` x ``outer``."""
    return pd.concat([_vidur_matrices(folder), _llmservingsim_matrices(folder)], ignore_index=True)


def _vidur_matrices(folder: Path) -> pd.DataFrame:
    """Vidur's times are ms, means of repeats read to 1 us, a device's part; q/k/v and gate/up are fused."""
    found = []
    for (model, size), raw in _vidur_layers(folder):
        shape, share = get_shape(model), Share.of(get_shape(model), size)
        widths = {
            "attn_pre_proj": (shape.hidden, share.query_width + 2 * share.kv_width),
            "attn_post_proj": (share.query_width, shape.hidden),
            "mlp_up_proj": (shape.hidden, 2 * share.intermediate),
            "mlp_down_proj": (share.intermediate, shape.hidden),
        }
        for operator, (inner, outer) in widths.items():
            cells = _vidur_cells(raw, model, size, operator)
            found.append(cells.assign(inner=float(inner), outer=float(outer)))
    return pd.concat(found, ignore_index=True)


def elementwise(folder: Path) -> pd.DataFrame:
    """Read Vidur's kernels that only move ``numbers`` (two bytes each) a token; ``kind`` as the roofline has it.

    LLMServingSim's norms and rotations are several unfused kernels each: an engine runs none of them.
    """
    found = []
    for (model, size), raw in _vidur_layers(folder):
        shape, share = get_shape(model), Share.of(get_shape(model), size)
        kinds = {
            "input_layernorm": ("norm", 2 * shape.hidden),
            "post_attention_layernorm": ("norm", 2 * shape.hidden),
            "attn_rope": ("rotation", 2 * (share.query_width + share.kv_width)),
            "mlp_act": ("product", 3 * share.intermediate),
            "emb": ("embedding", 2 * shape.hidden),
        }
        for operator, (kind, numbers) in kinds.items():
            cells = _vidur_cells(raw, model, size, operator)
            found.append(cells.assign(kind=kind, numbers=float(numbers) * cells.tokens))
    return pd.concat(found, ignore_index=True)


def _vidur_layers(folder: Path) -> list[tuple[tuple[str, int], pd.DataFrame]]:
    found = []
    for model, name in _VIDUR_MODELS.items():
        raw = pd.read_csv(folder / _VIDUR / "compute/h100/meta-llama" / name / "mlp.csv")
        workers = raw["num_tensor_parallel_workers"]
        found += [((model, size), raw[workers == size]) for size in sorted(set(workers.tolist()))]
    return found


def _vidur_cells(raw: pd.DataFrame, model: str, size: int, operator: str) -> pd.DataFrame:
    mean = raw.groupby("num_tokens")[f"time_stats.{operator}.mean"].mean() * 1e-3
    return pd.DataFrame(
        {
            "table": VIDUR,
            "model": model,
            "tensor_parallel": size,
            "operator": operator,
            "tokens": mean.index.to_numpy(dtype=float),
            "seconds": mean.to_numpy(),
        }
    )


def _llmservingsim_matrices(folder: Path) -> pd.DataFrame:
    """LLMServingSim's times are ns, a device's part; gate, up, queries, keys and values are apart."""
    found = []
    for model, (_, size) in _LLMSERVINGSIM_MODELS.items():
        shape, share = get_shape(model), Share.of(get_shape(model), size)
        widths = {
            "q_proj": (shape.hidden, share.query_width),
            "k_proj": (shape.hidden, share.kv_width),
            "v_proj": (shape.hidden, share.kv_width),
            "o_proj": (share.query_width, shape.hidden),
            "gate_proj": (shape.hidden, share.intermediate),
            "up_proj": (shape.hidden, share.intermediate),
            "down_proj": (share.intermediate, shape.hidden),
            "lm_head": (shape.hidden, share.vocabulary),
        }
        raw = _llmservingsim_layers(folder, model)
        for operator, (inner, outer) in widths.items():
            cells = raw[raw.operator == operator]
            found.append(cells.assign(inner=float(inner), outer=float(outer)))
    return pd.concat(found, ignore_index=True)


def prefill_attention(folder: Path) -> pd.DataFrame:
    """Read LLMServingSim's causal attention of one sequence of ``tokens`` without a context."""
    found = []
    for model in _LLMSERVINGSIM_MODELS:
        raw = _llmservingsim_layers(folder, model)
        cells = raw[raw.operator == "attn"]
        found.append(cells.assign(batch=1.0, context=0.0))
    return pd.concat(found, ignore_index=True)


def _llmservingsim_layers(folder: Path, model: str) -> pd.DataFrame:
    name, size = _LLMSERVINGSIM_MODELS[model]
    raw = pd.read_csv(folder / _LLMSERVINGSIM / name / f"tp{size}" / "layers.csv")
    return pd.DataFrame(
        {
            "table": LLMSERVINGSIM,
            "model": model,
            "tensor_parallel": size,
            "operator": raw["layer_name"],
            "tokens": raw["input"].astype(float),
            "seconds": raw["latency(ns)"] * 1e-9,
        }
    )


def decode_attention(folder: Path) -> pd.DataFrame:
    """Read LLMServingSim's decode attention of Llama-3.1-70B on 4 devices: ``batch``, ``context`` (a sum).

    ``kv_cache_size`` is a **sum over the batch**: two sequences and 2048 cost what one and 1024 do. Times (ns) are
    those of a regressor trained on measurements, and of at most 2048 cached tokens in all; rows with fewer cached
    tokens than sequences are left out, there the regressor was never taught.
    """
    model, size = "llama-3.1-70b", 4
    file = folder / _LLMSERVINGSIM / "Llama-3.1-70B/tp4/predictions/attn_decode_predictions.csv"
    raw = pd.read_csv(file).query("kv_cache_size >= batch_size")
    return pd.DataFrame(
        {
            "table": LLMSERVINGSIM,
            "model": model,
            "tensor_parallel": size,
            "operator": "decode attention",
            "batch": raw["batch_size"].astype(float),
            "tokens": raw["batch_size"].astype(float),
            "context": raw["kv_cache_size"].astype(float),
            "seconds": raw["prediction"] * 1e-9,
        }
    )


def h800_attention(folder: Path) -> pd.DataFrame:
    """Read Vidur's attention (ms, FlashInfer) of Llama-2-7B on an H800: ``context`` a sum over the batch."""
    file = folder / _VIDUR / "compute/h800/llama2_7b_dense_example/attention_combined.csv"
    raw = pd.read_csv(file)
    prefill = raw["is_prefill"].to_numpy(dtype=bool)
    milliseconds = np.where(prefill, raw["time_stats.attn_prefill.median"], raw["time_stats.attn_decode.median"])
    return pd.DataFrame(
        {
            "table": VIDUR + ", H800",
            "model": "llama-2-7b",
            "tensor_parallel": raw["num_tensor_parallel_workers"],
            "operator": np.where(prefill, "prefill attention", "decode attention"),
            "batch": raw["batch_size"].astype(float),
            "tokens": np.where(prefill, raw["prefill_chunk_size"], 1.0) * raw["batch_size"],
            "context": raw["kv_cache_size"].astype(float) * raw["batch_size"],
            "seconds": milliseconds * 1e-3,
        }
    )


def all_reduces(folder: Path) -> pd.DataFrame:
    """Read Vidur's all-reduces (ms, NCCL, called one by one): ``size`` devices, ``message`` bytes.

    A message of Vidur's is in bytes: as numbers of two bytes, 64 Mi of them would pass a link twice as fast as it is.
    """
    raw = pd.read_csv(folder / _VIDUR / "network/h100_dgx/all_reduce.csv")
    median = raw.groupby(["num_workers", "size"])["time_stats.all_reduce.median"].mean() * 1e-3
    size, message = (median.index.get_level_values(level).to_numpy(dtype=float) for level in (0, 1))
    return pd.DataFrame(
        {
            "table": VIDUR,
            "model": "",
            "tensor_parallel": size.astype(int),
            "operator": "all-reduce",
            "message": message,
            "seconds": median.to_numpy(),
        }
    )


def served(folder: Path) -> pd.DataFrame:
    """Read ML.ENERGY's vLLM on H100: median ITL as the ``seconds`` of a decode step of ``batch`` sequences.

    ``context`` (a sum over the batch) is estimated from `PROMPT_TOKENS`, `SPREAD` and the mean output. ``joining``:
    requests that join in a step, batch / output. Where it is above 0.7, half of all steps carry a prompt as well and
    the median may be one of those; all are priced as plain decode steps.
    """
    raw = pd.read_csv(folder / "ml-energy" / "llm_energy_configs.dev.csv")
    output = raw["avg_output_len"]
    each = PROMPT_TOKENS + output / 2 * (1 + raw["task"].map(SPREAD))
    return pd.DataFrame(
        {
            "table": ML_ENERGY,
            "model": raw["model"].map(_ML_ENERGY_MODELS),
            "tensor_parallel": raw["par_tensor_parallel"],
            "operator": raw["task"],
            "limit": raw["max_num_seqs"],
            "batch": raw["avg_batch_size"],
            "tokens": raw["avg_batch_size"],
            "context": each * raw["avg_batch_size"],
            "context_each": each,
            "joining": raw["avg_batch_size"] / output,
            "seconds": raw["median_itl_ms"] * 1e-3,
        }
    )


def apertus(folder: Path) -> pd.DataFrame:
    """Read the plain TPOT (p50) of Apertus-70B on 4 GH200 under vLLM: ``batch`` is the concurrency.

    Contexts are not told; at 8 sequences 1,000 tokens more of each are 2 % of a step (see `APERTUS_CONTEXT`).
    """
    raw = pd.read_csv(folder / "apertus-70b" / "cells.dev.csv").query("method == 'none'")
    return pd.DataFrame(
        {
            "table": "Apertus",
            "model": "apertus-70b",
            "tensor_parallel": 4,
            "operator": raw["workload"],
            "batch": raw["concurrency"].astype(float),
            "tokens": raw["concurrency"].astype(float),
            "seconds": raw["tpot_p50_ms"] * 1e-3,
        }
    )


def memory_contexts(folder: Path) -> pd.DataFrame:
    """Give ML.ENERGY's rows whose batch stayed below its limit, with the tokens a sequence that memory ``held``."""
    runs = served(folder)
    runs = runs[runs.batch < 0.93 * runs.limit].reset_index(drop=True)
    held = []
    for run in runs.itertuples():
        shape, size = get_shape(str(run.model)), int(run.tensor_parallel)  # type: ignore[arg-type]
        memory = MEMORY_SHARE * H100_SXM.memory_bytes - ACTIVATION_BYTES
        memory -= weight_memory_bytes(shape, tensor_parallel=size)
        held.append(memory / kv_token_bytes(shape, tensor_parallel=size))
    return runs.assign(held=np.array(held) / runs.batch)


def in_fit(size: pd.Series[float]) -> pd.Series[bool]:
    """Say which cells are fitted to: those in even quarters of an octave of their size; odd ones are held out.

    Whole bands, because neighbouring token counts run the same kernel: every other count would be no test.
    """
    return pd.Series(np.floor(4 * np.log2(size.to_numpy(dtype=float))) % 2 == 0, index=size.index)
