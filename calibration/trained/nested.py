"""Nested sub-models: exits at several depths of one drafter that share a norm and a head (S2D).

Training adds up the divergences of all exits (sorted fine-tuning). Drafting leaves at the first exit that is sure
enough, token by token.

Source: "S2D: Sorted Speculative Decoding For More Efficient Deployment of Nested Large Language Models" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

KIND = "nested-exits"
"""What ``drafter.json`` calls it."""


class Exits:
    """Gathers the states [rows, n, hidden size] at the exits of `body`, final norm applied, while it runs."""

    def __init__(self, body: Any, exits: Sequence[int]) -> None:
        self._body = body
        self._found: dict[int, Tensor] = {}
        for count in exits:
            body.layers[count - 1].register_forward_hook(self._keeper(count))
        self._exits = tuple(exits)

    def _keeper(self, count: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            self._found[count] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> list[Tensor]:
        """Give what the last pass left, exit by exit, and forget it."""
        states = [self._body.norm(self._found[count]) for count in self._exits]
        self._found.clear()
        return states


class NestedModel(nn.Module):
    """A causal LM whose logits at every position come from the first exit that is sure enough, else from its end.

    An exit is sure where its largest probability (softmax of the logits as they are) is at least its threshold. All
    layers are computed, so that the caches are whole; ``depths`` [rows, n] holds the layers that each of the last
    logits needed, which is what drafting costs where the skipped layers of a token are filled in with the next
    batch of tokens.
    """

    def __init__(self, model: Any, exits: Sequence[int], thresholds: Sequence[float]) -> None:
        super().__init__()
        self.inner = model
        self.exits, self.thresholds = (*exits, model.config.num_hidden_layers), tuple(thresholds)
        self._states = Exits(model.model, exits)
        self.depths = torch.zeros(0, 0, dtype=torch.long)

    @property
    def config(self) -> Any:
        """Configuration of the whole model."""
        return self.inner.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.inner.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.inner.dtype
        return dtype

    @property
    def model(self) -> Any:
        """The decoder layers."""
        return self.inner.model

    def get_input_embeddings(self) -> Any:
        """Embedding of the tokens."""
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The head that all exits share."""
        return self.inner.get_output_embeddings()

    def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> CausalLMOutput:
        """Give logits [rows, n, vocabulary], or those of the last ``logits_to_keep`` columns."""
        logits = self.inner(*args, logits_to_keep=logits_to_keep, **kwargs).logits
        depths = torch.full(logits.shape[:2], self.exits[-1], device=logits.device)
        open_ = torch.ones_like(depths, dtype=torch.bool)
        for count, threshold, states in zip(self.exits, self.thresholds, self._states.take(), strict=False):
            mine = self.get_output_embeddings()(states[:, -logits.shape[1] :])
            leaves = open_ & (mine.float().softmax(-1).amax(-1) >= threshold)
            logits = torch.where(leaves[..., None], mine, logits)
            depths = torch.where(leaves, count, depths)
            open_ = open_ & ~leaves
        self.depths = depths
        return CausalLMOutput(logits=logits)
