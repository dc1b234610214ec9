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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from calibration.drafters.info import DrafterSettings
from calibration.errors import CalibrationError
from calibration.models import Verifier

if TYPE_CHECKING:
    from calibration.drafters.exits import ExitDrafter

Natural = Annotated[int, Field(ge=1)]


class DynamicExit(DrafterSettings):
    """Drafts with the first l layers of the verifier, l chosen among ``exits`` at every start.

    ``half_life``: after so many tokens a shadow token counts half. A plan drafts ``min_draft_tokens`` to
    ``max_draft_tokens``; with a least of 0 it may well find that no exit pays. ``stop_early``: whether drafting stops
    where the cumulative confidence is low.
    """

    paradigm: ClassVar[str] = "dynamic-exit"
    kind: Literal["dynamic-exit"] = "dynamic-exit"
    exits: Annotated[tuple[Natural, ...], Field(min_length=1, strict=False)]
    half_life: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 64.0
    min_draft_tokens: Annotated[int, Field(ge=0)] = 1
    max_draft_tokens: Natural = 8
    stop_early: bool = True

    @field_validator("exits")
    @classmethod
    def _rising(cls, exits: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in itertools.pairwise(exits)):
            raise ValueError(f"must be a rising list, got {list(exits)}")
        return exits

    @field_validator("max_draft_tokens")
    @classmethod
    def _at_least(cls, most: int, info: Any) -> int:
        if most < info.data.get("min_draft_tokens", 0):
            raise ValueError(f"must be >= min_draft_tokens = {info.data['min_draft_tokens']}, got {most}")
        return most

    def build(self, verifier: Verifier) -> ExitDrafter:
        """Make the drafter; its exits share the verifier's weights."""
        from calibration.drafters.exits import exit_drafter

        layers = verifier.model.config.num_hidden_layers
        if self.exits[-1] >= layers:
            rule = f"exits must lie in [1, {layers - 1}]"
            raise CalibrationError(f"drafter '{self.label}': {rule}, got {self.exits[-1]}")
        return exit_drafter(self, verifier)


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


def make_plan(settings: DynamicExit, rates: NDArray[np.float64], layers: int) -> Plan:
    """Give the (l, d) of the largest TPL, and the threshold of its early stop (0: none)."""
    least = settings.min_draft_tokens
    value = tokens_per_layer(rates, settings.exits, layers, settings.max_draft_tokens)[:, least:]
    chosen, more = np.unravel_index(int(np.argmax(value)), value.shape)
    tokens = least + int(more)
    return Plan(int(chosen), tokens, float(rates[chosen] ** tokens) if settings.stop_early else 0.0)
