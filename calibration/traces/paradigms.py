"""What is known of a drafter by its paradigm: one record each, which everything else asks.

A paradigm is the field's word (``prompt-lookup``, ``early-exit``) or an engine's name of the method (``ngram``,
``draft_model``). One that is not known is taken for a model of its own that drafts token by token: it is charged as
one, and nothing is inferred from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from calibration.traces.manifest import DrafterInfo, ModelInfo

LOOKUP, EAGLE, EAGLE3, MODEL, MEDUSA, SUFFIX = "n-gram lookup", "EAGLE", "EAGLE-3", "draft model", "Medusa", "suffix"
"""Families of drafters that serving engines have."""


@dataclass(frozen=True)
class Paradigm:
    """Facts about one way to draft.

    `looks_up`: finds its drafts in text; proposes given tokens, at times none, and not always as many as asked.
    `one_shot`: proposes a whole draft in one step, so that the time of a step of it is that of a round.
    `own_weights`: brings weights and KV memory beside the verifier's. `tokens_alone`: its next drafted token depends
    on the tokens before it and on nothing else, when drafting greedily. `wraps`: made of other drafters, whose facts
    about weights hold. `family`: what serving engines call it; None where none has it. `known`: its name is here.
    """

    name: str
    looks_up: bool = False
    one_shot: bool = False
    own_weights: bool = True
    tokens_alone: bool = False
    wraps: bool = False
    family: str | None = None
    known: bool = True


def _lookup(name: str, family: str | None = None) -> Paradigm:
    return Paradigm(name, looks_up=True, one_shot=True, own_weights=False, tokens_alone=True, family=family)


_RECORDS = (
    _lookup("prompt-lookup", LOOKUP),
    _lookup("ngram", LOOKUP),
    _lookup("suffix", SUFFIX),
    _lookup("retrieval"),
    _lookup("trigram"),
    _lookup("memory"),
    _lookup("plugin"),
    Paradigm("standalone", tokens_alone=True, family=MODEL),
    Paradigm("distilled", tokens_alone=True, family=MODEL),
    Paradigm("draft-model", tokens_alone=True, family=MODEL),
    Paradigm("foreign"),
    Paradigm("eagle", family=EAGLE),
    Paradigm("eagle3", family=EAGLE3),
    Paradigm("mtp"),
    Paradigm("medusa", one_shot=True, family=MEDUSA),
    Paradigm("block-head", one_shot=True),
    Paradigm("dflash", one_shot=True),
    Paradigm("early-exit", own_weights=False),
    Paradigm("layer-skip", own_weights=False),
    Paradigm("dynamic-exit", own_weights=False),
    Paradigm("nested-exits", own_weights=False),
    Paradigm("kangaroo"),
    Paradigm("windowed", wraps=True),
    Paradigm("trimmed", wraps=True),
    Paradigm("ngram-before-model", wraps=True),
    Paradigm("merged", wraps=True),
    Paradigm("retrieval-fused", wraps=True),
)
PARADIGMS: Mapping[str, Paradigm] = {record.name: record for record in _RECORDS}
"""All that are known, by name."""

_ALIASES = {
    "block": "block-head",
    "draft": "draft-model",
    "eagle-3": "eagle3",
    "n-gram": "ngram",
    "nextn": "mtp",
    "suffix-decoding": "suffix",
}
"""Other names of the same; engines add words to theirs (``ngram-gpu``, ``ngram-map-k``, ``deepseek-mtp``)."""


def paradigm_of(name: str) -> Paradigm:
    """Give the facts of the paradigm called `name`; case, hyphens and underscores do not matter."""
    word = name.lower().replace("_", "-")
    word = _ALIASES.get(word, word)
    if word not in PARADIGMS and word.startswith(("ngram-", "n-gram-", "prompt-lookup-")):
        word = "ngram"
    if word.startswith("plugin:"):  # a proposer from outside
        word = "plugin"
    if word not in PARADIGMS and word.endswith("-mtp"):
        word = "mtp"
    if word in PARADIGMS:
        return replace(PARADIGMS[word], name=name)
    return Paradigm(name, known=False)


def one_shot(info: DrafterInfo) -> bool:
    """Whether `info` drafts in one step: by its paradigm, or because it has no layers and proposes given tokens."""
    return paradigm_of(info.paradigm).one_shot or (info.deterministic and info.layers == 0)


def own_models(info: DrafterInfo) -> list[ModelInfo]:
    """Give what of `info` brings weights and KV memory of its own: itself, none, or those parts of it that do.

    A part of the verifier brings none, however it is wrapped (a window, a trimmed head); trained exits are a student
    of their own. A drafter of two parts brings what each of them does, where the manifest describes them.
    """
    if info.parameters == 0:
        return []
    facts = paradigm_of(info.paradigm)
    parts = [info.settings[side] for side in ("first", "second") if isinstance(info.settings.get(side), Mapping)]
    if facts.wraps and len(parts) == 2 and all({"name", "paradigm"} <= set(part) for part in parts):
        return [model for part in parts for model in own_models(DrafterInfo.model_validate(part, strict=False))]
    inner = info.settings.get("drafter")
    if facts.wraps and isinstance(inner, Mapping) and isinstance(inner.get("paradigm"), str):
        return [info] if _brings(paradigm_of(inner["paradigm"]), inner) else []
    return [info] if _brings(facts, info.settings) else []


def _brings(facts: Paradigm, settings: Mapping[str, Any]) -> bool:
    """Whether a drafter brings weights: by its paradigm, or because a recipe says that it was trained."""
    return facts.own_weights or "recipe" in settings
