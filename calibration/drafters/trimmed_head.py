"""LM heads that give fewer logits than the vocabulary has, or more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calibration.common.errors import CalibrationError


class TrimmedHead(nn.Module):
    """The rows `kept` of a head: the logits of those tokens, -inf for all others.

    ``kept`` [K]: token ids. The matrix product is [..., hidden size] x [hidden size, K].
    """

    def __init__(self, head: Any, kept: Tensor) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise CalibrationError(f"trimmed head: the LM head must be one linear layer, got {type(head).__name__}")
        kept = kept.to(head.weight.device)
        self.vocabulary = head.out_features
        self.weight = nn.Parameter(head.weight.detach()[kept], requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach()[kept], requires_grad=False)
        self.kept: Tensor
        self.register_buffer("kept", kept)

    def forward(self, states: Tensor) -> Tensor:
        """Give logits [..., vocabulary] of states [..., hidden size]."""
        few = nn.functional.linear(states, self.weight, self.bias)
        logits = few.new_full((*few.shape[:-1], self.vocabulary), -torch.inf)
        logits[..., self.kept] = few
        return logits


class PaddedHead(nn.Module):
    """A head whose logits are cut at the end, or filled there with -inf, to `vocabulary` tokens."""

    def __init__(self, head: Any, vocabulary: int) -> None:
        super().__init__()
        self.head = head
        self.vocabulary = vocabulary

    def forward(self, states: Tensor) -> Tensor:
        """Give logits [..., vocabulary] of states [..., hidden size]."""
        logits: Tensor = self.head(states)[..., : self.vocabulary]
        return nn.functional.pad(logits, (0, self.vocabulary - logits.shape[-1]), value=-torch.inf)
