"""The memory block of a windowed drafter: the pieces of a prompt that its last tokens attend to most.

Only prompt tokens behind the sink and before the last `recent` ones are candidates, because the others are in sight
anyway when drafting begins. Neighbours are chosen together, in blocks, so that phrases stay whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.models.lane import Lane

BLOCK = 16
"""Neighbouring tokens that are chosen together."""


@dataclass(frozen=True)
class MemoryBlock:
    """Chooses up to `tokens` tokens of each prompt by the attention that they receive from its last `queries` ones.

    Their mass is summed over heads and queries in layer `layer`, or over all layers. The pass reads the whole prompt.
    """

    model: Any
    tokens: int
    sink: int
    recent: int
    queries: int
    layer: int | None

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Give bool [rows, longest prompt]."""
        found = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if len(prompt) > self.sink + self.recent:
                mass = attention_received(self.model, prompt, self.queries, self.layer)
                found[row, : len(prompt)] = choose_blocks(mass, self.tokens, self.sink, len(prompt) - self.recent)
        return found


def choose_blocks(mass: Tensor, tokens: int, first: int, stop: int) -> Tensor:
    """Choose the blocks with the most `mass` [n] among places `first` .. `stop` - 1, `tokens` in all: bool [n]."""
    kept = torch.zeros(len(mass), dtype=torch.bool)
    begins = torch.arange(first, max(stop, first), BLOCK)
    total = torch.stack([mass[b : min(int(b) + BLOCK, stop)].sum() for b in begins]) if len(begins) else mass[:0]
    left = tokens
    for index in total.argsort(descending=True, stable=True).tolist():
        begin = int(begins[index])
        end = min(begin + min(BLOCK, left), stop)
        kept[begin:end] = True
        left -= end - begin
        if left <= 0:
            break
    return kept


@torch.inference_mode()
def attention_received(model: Any, prompt: Sequence[int], queries: int, layer: int | None) -> Tensor:
    """Give the attention mass that each token of `prompt` receives from its last `queries` ones [tokens]."""
    count = min(queries, len(prompt))
    lane = Lane(model, 1)
    if len(prompt) > count:
        lane.feed(torch.tensor([prompt[:-count]], device=lane.device), last=1)
    return received_in(lane, prompt[-count:], layer)


@torch.inference_mode()
def received_in(lane: Lane, tokens: Sequence[int], layer: int | None) -> Tensor:
    """Feed the last tokens of a prompt to `lane` (one row); give the mass that every column gets from them.

    Sums over queries and heads, in layer `layer` or over all.
    """
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output[1][0].float().sum((0, 1)).cpu())

    attention = [block.self_attn for block in lane.model.model.layers]
    hooks = [
        module.register_forward_hook(keep)
        for module in (attention if layer is None else attention[layer : layer + 1])
    ]
    try:
        with eager(lane.model):
            lane.feed(torch.tensor([list(tokens)], device=lane.device), last=1)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen).sum(0)


@contextlib.contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let `model` compute its attention step by step for a while, which shows its weights."""
    # The layers of a cut model have configurations of their own.
    found = [model.config, model.model.config, *(layer.self_attn.config for layer in model.model.layers)]
    configs = list({id(config): (config, config._attn_implementation) for config in found}.values())
    try:
        for config, _ in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, before in configs:
            config._attn_implementation = before
