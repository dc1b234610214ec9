"""The head through which a loss sees both models: the whole vocabulary, or its frequent part and a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calibration.trained.batches import frequent_tokens
from calibration.trained.corpus import Text
from calibration.trained.settings import TrainSettings


class LossHead:
    """Gives logits from states through the rows of the verifier's head that a loss looks at.

    With a ``loss_vocabulary`` of N these are the N tokens most frequent in the training text, and every step
    ``loss_others`` more, drawn without replacement from the others, whose logits are raised by
    log(others / drawn): together they then stand for all others, and both models' normalisers are estimated without
    bias. Without them a student never hears of the tokens that nobody writes, and may prefer one.
    """

    def __init__(self, head: Any, texts: Sequence[Text], settings: TrainSettings, dtype: torch.dtype) -> None:
        self._rows: Tensor = head.weight.detach().to(dtype)
        bias: Tensor | None = getattr(head, "bias", None)
        self._bias = torch.zeros_like(self._rows[:, 0]) if bias is None else bias.detach().to(dtype)
        self._temperature = settings.temperature
        size, count = len(self._rows), settings.loss_vocabulary or len(self._rows)
        self._others = torch.zeros(0, dtype=torch.long)
        self._drawn = 0
        if count < size:
            kept = frequent_tokens(texts, count, size).to(self._rows.device)
            absent = torch.ones(size, dtype=torch.bool, device=self._rows.device)
            absent[kept] = False
            self._others = absent.nonzero()[:, 0]
            self._drawn = min(settings.loss_others, len(self._others))
            self._all = (self._rows, self._bias)
            # The frequent rows stand first, for good; the drawn ones behind them change with every step.
            room = torch.cat([kept, self._others[: self._drawn]])
            self._rows, self._bias = self._rows[room], self._bias[room]
            self._kept = len(kept)

    def draw(self, generator: torch.Generator) -> None:
        """Draw the sample of other tokens for the next step."""
        if not self._drawn:
            return
        order = torch.randperm(len(self._others), generator=generator, device=self._others.device)[: self._drawn]
        chosen = self._others[order]
        self._rows[self._kept :] = self._all[0][chosen]
        raised = self._temperature * math.log(len(self._others) / self._drawn)
        self._bias[self._kept :] = self._all[1][chosen] + raised

    def logits(self, states: Tensor) -> Tensor:
        """Give logits [n, rows] divided by the temperature, in the dtype of `states` [n, hidden size]."""
        logits = functional.linear(states.to(self._rows.dtype), self._rows, self._bias).to(states.dtype)
        return logits / self._temperature
