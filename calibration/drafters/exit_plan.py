"""Self-speculation with a dynamic exit layer (DEL): which layer drafts, how far, and when it stops.

A start looks at how well every candidate exit would have done on the text so far. The verifier has read that text
anyway; the final norm and head on its state behind layer l say which token an exit after l layers would have drafted
(a *shadow token*). With a_l the share of shadow tokens that are the text's own, a round that exits after l layers and
drafts d tokens is expected to give

    TPL(l, d) = (1 + a_l + .. + a_l^d) / (d l + L) = [(1 - a_l^{d+1}) / (1 - a_l)] / (d l + L)

tokens per layer run, L the verifier's layers. The (l, d) of the largest TPL drafts; of equals the shallowest exit,
then the shortest draft. While it drafts, it stops behind the first token at which the cumulative confidence (the
product of the largest probabilities so far) is below a_l^d: the chance at which the plan counted on its last token.

Source: "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding" (2025). Two readings of ours:
its window of shadow tokens restarts where a draft failed, while a_l here is an exponentially weighted share over all
known tokens, the prompt's included, so that a draft depends on the text alone and not on where rounds began; and the
threshold of its early stop, which is tied to a_l in a way of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class HitRates:
    """The shares a_l of shadow tokens that were the text's own, exponentially weighted; 0 before the first."""

    def __init__(self, exits: int, half_life: float) -> None:
        self._fade = 0.5 ** (1 / half_life)
        self._hits = np.zeros(exits)
        self._seen = 0.0

    def add(self, hits: NDArray[np.bool_]) -> None:
        """Take in whether each exit's shadow of each further token was right [tokens, exits]."""
        for row in hits:
            self._hits = self._fade * self._hits + row
            self._seen = self._fade * self._seen + 1.0

    @property
    def rates(self) -> NDArray[np.float64]:
        """a_l of every exit [exits]."""
        return self._hits / self._seen if self._seen else self._hits


@dataclass(frozen=True)
class Plan:
    """What a start does: the index of its exit, how many tokens it means to draft, and the least confidence."""

    exit: int
    tokens: int
    threshold: float


def tokens_per_layer(rates: NDArray[np.float64], exits: Sequence[int], layers: int, most: int) -> NDArray[np.float64]:
    """Give TPL(l, d) for every exit and d = 0 .. `most` [exits, most + 1]."""
    drafted = np.arange(most + 1)
    powers = np.asarray(rates)[:, None] ** drafted
    return np.asarray(powers.cumsum(1) / (drafted * np.asarray(exits)[:, None] + layers))


@dataclass(frozen=True)
class Planning:
    """What plans are made among: ``exits`` of a verifier of ``layers`` layers, and how many tokens may be drafted.

    ``half_life`` and ``stop_early`` as in `calibration.drafters.dynamic_exit.DynamicExit`.
    """

    exits: tuple[int, ...]
    layers: int
    half_life: float
    min_draft_tokens: int
    max_draft_tokens: int
    stop_early: bool


def make_plan(planning: Planning, rates: NDArray[np.float64]) -> Plan:
    """Give the (l, d) of the largest TPL, and the threshold of its early stop (0: none)."""
    least = planning.min_draft_tokens
    value = tokens_per_layer(rates, planning.exits, planning.layers, planning.max_draft_tokens)[:, least:]
    chosen, more = np.unravel_index(int(np.argmax(value)), value.shape)
    tokens = least + int(more)
    return Plan(int(chosen), tokens, float(rates[chosen] ** tokens) if planning.stop_early else 0.0)
