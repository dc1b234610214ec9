"""Step times of the real models over a grid of batch, new tokens and context.

A step is one forward pass with its KV cache in place and the choice of the largest logits, as an engine's iteration
needs it. Wall clock on a CPU, CUDA events on a GPU; energy only where NVML reports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.drafters import Drafter, PromptLookup
from calibration.fetch import Progress
from calibration.ngram import NgramIndex
from calibration.surroundings import nvml

ENERGY_WINDOW_S = 1.0
"""A device's energy counter ticks slowly: energy is read over a window of repeated steps at least this long."""


@dataclass(frozen=True)
class TimingGrid:
    """Which steps are timed, and how often.

    ``batches`` x ``new_tokens`` x ``contexts`` verify steps; ``batches`` x ``contexts`` draft steps of one token for
    every drafter; ``prefill_batches`` x ``prefill_tokens`` prefills. A verify step of n new tokens checks a draft of
    n - 1 tokens.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    new_tokens: tuple[int, ...] = (1, 2, 3, 5, 9)
    contexts: tuple[int, ...] = (64, 256, 512)
    prefill_batches: tuple[int, ...] = (1, 4)
    prefill_tokens: tuple[int, ...] = (32, 128, 512)
    warmups: int = 1
    repeats: int = 5

    def cells(self, verifier: str, drafters: Sequence[str]) -> list[Cell]:
        """List every step of the grid."""
        prefill = [Cell(verifier, "prefill", b, n, 0) for b in self.prefill_batches for n in self.prefill_tokens]
        verify = [
            Cell(verifier, "verify", b, n, c) for b in self.batches for n in self.new_tokens for c in self.contexts
        ]
        draft = [Cell(name, "draft", b, 1, c) for name in drafters for b in self.batches for c in self.contexts]
        return prefill + verify + draft


@dataclass(frozen=True)
class Cell:
    """One step to time: ``operation`` is prefill, verify or draft; counts are per sequence."""

    model: str
    operation: str
    batch: int
    new_tokens: int
    context_tokens: int


def measure(
    verifier: str,
    model: Any,
    drafters: Sequence[Drafter],
    grid: TimingGrid,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """Time every cell of `grid`; give the columns of the table ``timings``.

    The loop over repeats is the outer one, so that a disturbance of the machine spreads over many cells rather than
    spoiling one. Warm-up rounds come first and are not kept.
    """
    cells = grid.cells(verifier, [d.name for d in drafters])
    steps = _steps(cells, {verifier: model}, drafters)
    rounds = grid.warmups + grid.repeats
    columns: dict[str, list[Any]] = {}
    joules: dict[Cell, float | None] = {}
    for turn in range(rounds):
        for number, cell in enumerate(cells):
            seconds = steps[cell]()
            if turn >= grid.warmups:
                if cell not in joules:
                    joules[cell] = _energy_j(steps[cell], model.device)
                _append_row(columns, cell, turn - grid.warmups, seconds, joules[cell])
            if progress:
                progress("time steps", turn * len(cells) + number + 1, rounds * len(cells))
    return columns


def _append_row(columns: dict[str, list[Any]], cell: Cell, repeat: int, seconds: float, joules: float | None) -> None:
    row = {**vars(cell), "repeat": repeat, "seconds": seconds, "joules": joules}
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


def _steps(
    cells: Sequence[Cell], models: dict[str, Any], drafters: Sequence[Drafter]
) -> dict[Cell, Callable[[], float]]:
    """Give, for every cell, a function that runs it once and returns its seconds."""
    specs = {d.name: d.spec for d in drafters}
    models = {**models, **{d.name: d.model for d in drafters if d.model is not None}}
    steps: dict[Cell, Callable[[], float]] = {}
    for cell in cells:
        spec = specs.get(cell.model)
        if isinstance(spec, PromptLookup):
            steps[cell] = _lookup_step(spec, cell)
        else:
            steps[cell] = _forward_step(models[cell.model], cell)
    return steps


def _lookup_step(spec: PromptLookup, cell: Cell) -> Callable[[], float]:
    """One round of prompt lookup over the batch: every row takes in one token and proposes."""
    noise = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 1000, (cell.batch, cell.context_tokens), generator=noise).tolist()
    sizes = {"ngram_max": spec.ngram_max, "ngram_min": spec.ngram_min, "max_draft_tokens": spec.max_draft_tokens}

    def step() -> float:
        rows = [NgramIndex(text, **sizes) for text in texts]
        begin = time.perf_counter()
        for row, text in zip(rows, texts, strict=True):
            row.extend(text[:1])
            row.propose()
        return time.perf_counter() - begin

    return step


def _forward_step(model: Any, cell: Cell) -> Callable[[], float]:
    """One forward pass of `cell`; the cache is filled with noise, whose values do not matter to the time."""
    device = model.device
    tokens = torch.full((cell.batch, cell.new_tokens), 7, device=device)
    last = 1 if cell.operation == "prefill" else 0

    @torch.inference_mode()
    def step() -> float:
        cache = _filled_cache(model, cell.batch, cell.context_tokens)
        clock = _start_clock(device)
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=last).logits
        logits.argmax(-1)
        return clock()

    return step


def _filled_cache(model: Any, batch: int, context_tokens: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    if context_tokens:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        noise = torch.randn(batch, heads, context_tokens, width, device=model.device, dtype=model.dtype)
        for layer in range(config.num_hidden_layers):
            cache.update(noise, noise, layer)
    return cache


def _start_clock(device: torch.device) -> Callable[[], float]:
    """Start a clock now; give the function that stops it and returns seconds."""
    if device.type != "cuda":
        begin = time.perf_counter()
        return lambda: time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    first.record()

    def stop() -> float:
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    return stop


def _energy_j(step: Callable[[], float], device: torch.device) -> float | None:
    """Give the mean joules of one step over a window of `ENERGY_WINDOW_S`, or None where nothing reports them.

    The window includes what stands between two steps (refilling the cache), so short steps come out a little high.
    """
    counter = energy_counter_mj(device)
    if counter is None:
        return None
    begin_mj, begin, count = counter(), time.perf_counter(), 0
    while time.perf_counter() - begin < ENERGY_WINDOW_S:
        step()
        count += 1
    return (counter() - begin_mj) / 1e3 / count


def energy_counter_mj(device: torch.device) -> Callable[[], int] | None:
    """Give a function that reads the total energy of `device` in mJ, or None where NVML cannot say."""
    library = nvml() if device.type == "cuda" else None
    if library is None:
        return None
    try:
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError:
        return None
    return lambda: int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
