"""Step times of the real models over a grid of batch, new tokens and context.

A step is one forward pass with its KV cache in place and the choice of the largest logits, as an engine's iteration
needs it. Wall clock on a CPU, CUDA events on a GPU; energy only where NVML reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.common.progress import StageProgress
from calibration.models.clock import energy_j, start_clock

if TYPE_CHECKING:
    from calibration.models.drafter import Drafter


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
    progress: StageProgress | None = None,
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
                    joules[cell] = energy_j(steps[cell], model.device)
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
    import torch

    from calibration.models.sampling import generator_for

    known = {drafter.name: drafter for drafter in drafters}
    steps: dict[Cell, Callable[[], float]] = {}
    for cell in cells:
        if cell.operation == "draft":
            noise = generator_for(torch.device("cpu"), 0)
            steps[cell] = known[cell.model].step(cell.batch, cell.context_tokens, noise)
        else:
            sizes = (cell.batch, cell.new_tokens, cell.context_tokens)
            steps[cell] = forward_step(models[cell.model], *sizes, prefill=cell.operation == "prefill")
    return steps


def forward_step(
    model: Any, batch: int, new_tokens: int, context_tokens: int, *, prefill: bool = False
) -> Callable[[], float]:
    """Give a function that runs one forward pass over a batch once and gives its seconds.

    The cache is filled with noise, whose values do not matter to the time. Counts are per sequence; a prefill needs
    the logits of the last token alone.
    """
    import torch

    device = model.device
    tokens = torch.full((batch, new_tokens), 7, device=device)

    @torch.inference_mode()
    def step() -> float:
        cache = _filled_cache(model, batch, context_tokens)
        clock = start_clock(device)
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1 if prefill else 0
        ).logits
        logits.argmax(-1)
        return clock()

    return step


def _filled_cache(model: Any, batch: int, context_tokens: int) -> Any:
    import torch
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
