"""Sections of ``[routing] drafter`` that choose drafter and draft length in every round from the text so far."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from calibration.common.settings import Count, Table

_Natural = Annotated[int, Field(ge=0)]
_Names = Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class MatchTier(Table):
    """What holds for batches from a size on: draft lengths exclude the bonus token, 0 drafts nothing."""

    min_match: Count = 3
    lookup_tokens: _Natural = 20
    model_tokens: _Natural = 7


def _plain() -> dict[str, MatchTier]:
    return {"1": MatchTier()}


class ContextMatch(Table):
    """In every round, by how long a suffix of the text occurred before: a plain rule.

    A slot whose longest earlier match has at least `min_match` tokens is drafted for by `lookup`, `lookup_tokens`
    deep, any other by the other one of the two `drafters` with `model_tokens`; the keys of `tiers` are the smallest
    numbers of active slots that a tier is meant for. The stopping policy caps these lengths. Needs token ids of
    prompts and outputs. Exact replay; the model's KV catches up with copied text for free.
    """

    drafters: _Names
    policy: Literal["context_match"]
    lookup: str
    tiers: Annotated[dict[str, MatchTier], Field(min_length=1)] = Field(default_factory=_plain)

    @field_validator("drafters")
    @classmethod
    def _two(cls, drafters: tuple[str, ...]) -> tuple[str, ...]:
        if len(drafters) != 2:
            raise ValueError(f"must be two drafters, one that looks up and one that does not, got {len(drafters)}")
        return drafters

    @field_validator("tiers")
    @classmethod
    def _keys_are_sizes(cls, tiers: dict[str, MatchTier]) -> dict[str, MatchTier]:
        for key in tiers:
            if not key.isdecimal() or int(key) < 1:
                raise ValueError(f"keys must be batch sizes from 1 on, not '{key}'")
        return tiers


class Forecast(Table):
    """In every round, drafter and length by forecast: most expected tokens per second at the engine's own prices.

    For every drafter a hazard model forecasts how far its draft survives, from what the text tells (length of the
    match and agreement of matches, how copies fared so far, see `simulator.playback.text_facts`), from what was
    accepted of it lately in the request, and from which tokens a copy would hold; see `simulator.playback.survival`.
    Each slot takes the drafter and length with most expected tokens per second, as if all slots did alike; a drafter
    that too few slots want to pay its fixed price is left out of the round. The goodput rule of SmartSpec (Liu et al.
    2024, arXiv 2406.14066) with forecasts in the place of one acceptance rate, and lengths by slot. The longest draft
    is the stopping policy's.

    Each sequence is forecast by a model learned from the other `folds` - 1 parts of the sequences served (equal
    prompts are in one part) or, with `learn_from`, of the sequences of these domains, served or not: sequences of
    other domains then take a model of all of them. Greedy traces with token ids of prompts and outputs. Replay is
    exact; how good forecasts are elsewhere depends on how alike requests are there. The model's KV catches up with
    copied text for free, and matching is charged only in rounds that copy.
    """

    drafters: _Names
    policy: Literal["forecast"]
    folds: Annotated[int, Field(ge=2)] = 5
    learn_from: _Names | None = None
