"""How a student is trained; readable without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from calibration.common.settings import Count, Fraction, Table

DivergenceName = Literal["fkl", "rkl", "jsd", "tvd", "tvd++"]
"""What `calibration.training.divergences` has."""


class TrainSettings(Table):
    """One training run.

    ``tokens``: the budget, in output tokens learnt from (texts come again where the corpus is smaller).
    ``batch_tokens`` counts prompts and padding too. ``loss_vocabulary``: the loss sees that many tokens, the most
    frequent of the training text, and ``loss_others`` drawn anew at every step that stand for all others; None keeps
    all, 8192 of 49,152 makes the head five times cheaper. ``temperature`` divides both models' logits.
    ``on_policy``: share of the batches that the student writes itself, by sampling at that temperature
    (DistillSpec). ``curve_tokens``, ``checkpoint_tokens``: how often the curve gets a row, and a checkpoint is kept.
    ``bfloat16``: matrix products in bfloat16, weights and sums in float32. The learning rate rises over the first
    ``warmup`` of the budget and falls along a cosine to a twentieth.
    """

    tokens: Count = 500_000
    divergence: DivergenceName = "fkl"
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    batch_tokens: Count = 512
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.04
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    loss_vocabulary: Annotated[int, Field(ge=2)] | None = None
    loss_others: Annotated[int, Field(ge=0)] = 1024
    on_policy: Fraction = 0.0
    bfloat16: bool = True
    curve_tokens: Count = 100_000
    checkpoint_tokens: Count = 50_000
    seed: Annotated[int, Field(ge=0)] = 0

    def rate(self, tokens: int) -> float:
        """Give the share of the learning rate after `tokens` of the budget."""
        done = min(tokens / self.tokens, 1.0)
        if done < self.warmup:
            return (done + 0.01) / (self.warmup + 0.01)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
