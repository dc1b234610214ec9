"""Acceptance of a windowed drafter against the context's length and the window (MASW, our reading).

The verifier writes greedily after long prompts with its whole context in sight; the drafter then reads what it wrote,
teacher-forced, once per window, over one and the same cache of the prompt. Match bits give run lengths as in
`calibration.recording.record`; they are those of the live loop, because the drafter sees tokens alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.common.errors import CalibrationError
from calibration.common.files import write_whole
from calibration.common.progress import StageProgress
from calibration.drafters.lanes import ModelDrafter
from calibration.drafters.memory_block import choose_blocks, received_in
from calibration.models.lane import Lane, Window, generate
from calibration.models.load import Verifier
from calibration.models.sampling import generator_for
from calibration.recording.reading import run_lengths
from calibration.traces.manifest import DecodingInfo


@dataclass(frozen=True)
class WindowChoice:
    """One window to try, as in `calibration.drafters.windowed`; ``recent`` None is the whole context."""

    sink: int = 0
    recent: int | None = None
    memory: int = 0
    prefill: Literal["whole", "window"] = "whole"


@dataclass(frozen=True)
class WindowRow:
    """What a window gave over the prompts of one context length.

    ``held_tokens``: keys and values that a draft step reads at the end of the prompt. ``positions``: output positions
    measured, x_0 left out, which the prefill gives. ``token_match``: part of them where the drafter's largest logit
    is the text's. ``mean_run``: mean over them of min(run length, ``gamma``), bonus excluded. Both are None where
    there are no positions, because the verifier ended every text with its first token.
    """

    context: int
    sink: int
    recent: int | None
    memory: int
    prefill: str
    held_tokens: int
    positions: int
    token_match: float | None
    gamma: int
    mean_run: float | None


def long_prompt(verifier: Verifier, passages: Sequence[str], tokens: int, rng: np.random.Generator) -> list[int]:
    """Give a prompt of at most `tokens` tokens: numbered passages in random order, then a task about one of them.

    As many passages as fit, some more than once where there are too few; `CalibrationError` where not even one fits.
    """
    shown: list[str] = []
    found: list[int] = []
    while True:
        for index in rng.permutation(len(passages)).tolist():
            shown.append(f"Text {len(shown) + 1}:\n{passages[index].strip()}")
            task = f"Summarise text {int(rng.integers(len(shown))) + 1} in three sentences."
            ids = verifier.encode("\n\n".join([*shown, task]))
            if len(ids) > tokens:
                if not found:
                    raise CalibrationError(f"passages: one must fit into {tokens} tokens, got {len(ids)}")
                return found
            found = ids


def window_study(
    verifier: Verifier,
    drafter: ModelDrafter,
    prompts: Mapping[int, Sequence[Sequence[int]]],
    windows: Sequence[WindowChoice],
    *,
    new_tokens: int = 48,
    gamma: int = 4,
    queries: int = 32,
    layer: int | None = None,
    progress: StageProgress | None = None,
) -> list[WindowRow]:
    """Measure every window after the prompts of every context length (`prompts`: context -> token ids).

    One prompt at a time, so that memory is that of one long row. ``queries`` and ``layer`` choose memory blocks as in
    `Windowed`. `progress` is called with the prompts done. `CalibrationError` where prompt and output do not fit into
    the verifier's positions.
    """
    limit = getattr(verifier.model.config, "max_position_embeddings", None)
    total = sum(map(len, prompts.values()))
    found, done = [], 0
    for context, rows in prompts.items():
        longest = max(map(len, rows)) + new_tokens
        if limit is not None and longest > limit:
            rule = f"prompt and output must fit into the verifier's {limit} positions"
            raise CalibrationError(f"context {context}: {rule}, got {longest}")
        bits: list[list[NDArray[np.bool_]]] = []
        for prompt in rows:
            bits.append(
                _matches(
                    verifier=verifier,
                    drafter=drafter,
                    prompt=prompt,
                    windows=windows,
                    new_tokens=new_tokens,
                    queries=queries,
                    layer=layer,
                )
            )
            done += 1
            if progress:
                progress("long contexts", done, total)
        for number, window in enumerate(windows):
            found.append(_row(context, window, [row[number] for row in bits], gamma))
    return found


def save_windows(rows: Sequence[WindowRow], path: Path | str) -> None:
    """Write the table as CSV, whole or not at all; what is None stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [part.name for part in fields(WindowRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_whole(Path(path), text.getvalue())


@torch.inference_mode()
def _matches(
    verifier: Verifier,
    drafter: ModelDrafter,
    prompt: Sequence[int],
    windows: Sequence[WindowChoice],
    new_tokens: int,
    queries: int,
    layer: int | None,
) -> list[NDArray[np.bool_]]:
    """Give the match bits of x_1, x_2, ... of one prompt under every window."""
    greedy, chance = DecodingInfo(mode="greedy"), generator_for(verifier.device, 0)
    text = generate(verifier.model, [prompt], greedy, new_tokens, verifier.end_ids, chance)[0].ids
    if len(text) < 2:  # x_0 alone, which the prefill gives
        return [np.zeros(0, dtype=np.bool_) for _ in windows]
    whole = Lane(drafter.model, 1)
    device, count = whole.device, min(queries, len(prompt))
    if len(prompt) > count:
        whole.feed(torch.tensor([prompt[:-count]], device=device), last=1)
    mass = received_in(whole, prompt[-count:], layer)
    body = torch.tensor([text[:-1]], device=device)
    following = torch.tensor([text[1:]], device=device)
    found = []
    for window in windows:
        limits, lane = _limits(window, mass), whole
        if window.prefill == "window":
            lane = Lane(drafter.model, 1, window=limits, prompts=[prompt])
            lane.feed(torch.tensor([prompt], device=device), last=1)
        lane.limit(limits, [prompt])
        logits = lane.feed(body)
        lane.forget(torch.ones_like(body, dtype=torch.bool))
        found.append((logits.argmax(-1) == following)[0].cpu().numpy())
    return found


def _limits(window: WindowChoice, mass: Tensor) -> Window | None:
    if window.recent is None:
        return None
    chosen = choose_blocks(mass, window.memory, window.sink, len(mass) - window.recent)[None]
    memory = (lambda prompts: chosen) if window.memory else None
    return Window(window.sink, window.recent, window.prefill == "whole", memory, window.memory)


def _row(context: int, window: WindowChoice, bits: Sequence[NDArray[np.bool_]], gamma: int) -> WindowRow:
    runs = np.concatenate([np.minimum(run_lengths(row), gamma) for row in bits])
    held = (
        context
        if window.recent is None
        else Window(window.sink, window.recent, memory_tokens=window.memory).held(context)
    )
    match = float(np.concatenate(bits).mean()) if len(runs) else None
    mean_run = float(runs.mean()) if len(runs) else None
    shape = (window.sink, window.recent, window.memory, window.prefill)
    return WindowRow(context, *shape, held, len(runs), match, gamma, mean_run)
