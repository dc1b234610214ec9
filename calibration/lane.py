"""A lane: one causal LM and its KV cache over a batch of ragged rows.

Rows of a batch advance by different numbers of tokens, so the cache is never cropped. Every column that was fed stays
in it; ``kept`` says which of them belong to a row's text, the others (padding, rejected drafts) are masked out for
good, and position ids count kept columns only. A horizon of some hundred tokens makes the holes cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Lane:
    """Feeds columns of tokens to a model and remembers what each row keeps of them.

    ``kept``: bool [rows, columns fed so far].
    """

    def __init__(self, model: Any, rows: int) -> None:
        from transformers import DynamicCache

        self.model = model
        self.device: torch.device = model.device
        self.cache = DynamicCache()
        self.kept = torch.zeros(rows, 0, dtype=torch.bool, device=self.device)

    def feed(self, tokens: Tensor, real: Tensor | None = None, *, last: int | None = None) -> Tensor:
        """Feed `tokens` [rows, n]; give logits [rows, n, vocabulary], or those of the `last` columns only.

        ``real`` [rows, n] marks padding with False. Column i attends to every kept column before it and to itself.
        """
        rows, width = tokens.shape
        if real is None:
            real = torch.ones(rows, width, dtype=torch.bool, device=self.device)
        before = self.kept.sum(1, keepdim=True)
        position = (before + real.cumsum(1) - 1).clamp(min=0)
        earlier = self.kept.shape[1]
        self.kept = torch.cat([self.kept, real], dim=1)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        causal = torch.cat([causal.new_ones(width, earlier), causal], dim=1)
        return self.forward(tokens, position, causal & self.kept[:, None, :], last=last)

    def forward(self, tokens: Tensor, position: Tensor, allowed: Tensor, *, last: int | None = None) -> Tensor:
        """Run the model on `tokens` [rows, n] with an explicit mask `allowed` [rows, n, columns]; grows the cache."""
        low = torch.finfo(self.model.dtype).min
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=self.device).masked_fill(~allowed, low)
        out = self.model(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if last is None else last,
        )
        logits: Tensor = out.logits
        return logits

    def forget(self, drop: Tensor) -> None:
        """Mask out the columns where `drop` [rows, n] is True, among the n columns fed last."""
        self.kept[:, -drop.shape[1] :] &= ~drop


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Give (tokens, real) [rows, longest] with the rows flush right."""
    return _pad(rows, device, left=True)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Give (tokens, real) [rows, longest] with the rows flush left."""
    return _pad(rows, device, left=False)


def _pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, span] = torch.as_tensor(row, dtype=torch.long)
        real[index, span] = True
    return tokens.to(device), real.to(device)
