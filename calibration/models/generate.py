"""The verifier's own text: batched generation, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calibration.common.fetch import Advance
from calibration.models.lane import Lane, pad_left
from calibration.models.sampling import choose
from calibration.traces.manifest import DecodingInfo


@dataclass(frozen=True)
class Output:
    """What the verifier wrote after one prompt; an end token, if one came, is the last id."""

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingInfo,
    max_new_tokens: int,
    end_ids: frozenset[int],
    generator: torch.Generator,
    advance: Advance | None = None,
) -> list[Output]:
    """Continue every prompt by up to `max_new_tokens` tokens, one forward pass per token for the whole batch.

    `advance` is called with 1 after every token.
    """
    tokens, real = pad_left(prompts, model.device)
    lane = Lane(model, len(prompts))
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=model.device)
    columns: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    with torch.inference_mode():
        logits = lane.feed(tokens, real, last=1)
        while True:
            columns.append(choose(logits[:, -1], decoding, generator))
            if advance:
                advance(1)
            done |= torch.isin(columns[-1], ends)
            if len(columns) == max_new_tokens or bool(done.all()):
                break
            logits = lane.feed(columns[-1][:, None])
    return [cut(row, end_ids) for row in torch.stack(columns, 1).tolist()]


def cut(row: list[int], end_ids: frozenset[int]) -> Output:
    """End a row behind its first end token."""
    for index, token in enumerate(row):
        if token in end_ids:
            return Output(tuple(row[: index + 1]), "stop")
    return Output(tuple(row), "length")
