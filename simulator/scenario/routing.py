"""The ``[routing] drafter`` table of a scenario: one section for each policy, told apart by its name.

Sections of ``[routing] drafter`` that choose drafter and draft length in every round from the text so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from calibration.common.errors import did_you_mean
from calibration.common.plugins import PluginTable, by_name
from calibration.common.settings import Count, Inside, Natural, Positive, Table, as_table
from simulator.scenario.inputs import InputFile

Names = Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class MatchTier(Table):
    """What holds for batches from a size on: draft lengths exclude the bonus token, 0 drafts nothing."""

    min_match: Count = 3
    lookup_tokens: Natural = 20
    model_tokens: Natural = 7


def _plain() -> dict[str, MatchTier]:
    return {"1": MatchTier()}


class ContextMatch(Table):
    """In every round, by how long a suffix of the text occurred before: a plain rule.

    A slot whose longest earlier match has at least `min_match` tokens is drafted for by `lookup`, `lookup_tokens`
    deep, any other by the other one of the two `drafters` with `model_tokens`; the keys of `tiers` are the smallest
    numbers of active slots that a tier is meant for. The stopping policy caps these lengths. Needs token ids of
    prompts and outputs. Exact replay; the model's KV catches up with copied text for free.
    """

    drafters: Names
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
    match and agreement of matches, how copies fared so far, see `simulator.playback.survival`), from what was
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

    drafters: Names
    policy: Literal["forecast"]
    folds: Annotated[int, Field(ge=2)] = 5
    learn_from: Names | None = None


Features = Literal["tokens", "domain"]


class Candidates(Table):
    """`drafters` of the TraceSet that are served side by side; only sequences recorded with all are replayed."""

    drafters: Names


class StaticDrafter(Candidates):
    """Always the same one, `drafter`. As exact as the replay of that drafter alone."""

    policy: Literal["static"]
    drafter: str


class ByDomain(Candidates):
    """By the label of the request's domain, `table`; domains that are not in it get `default`.

    What a gateway does whose clients say what they ask for (as Online Speculative Decoding routes by topic, Liu et
    al. 2023, arXiv 2310.07177). The label is the recorded one: it is never wrong here. Exact replay.
    """

    policy: Literal["by_domain"]
    table: dict[str, str] = Field(min_length=1)
    default: str | None = None


class ByClassifier(Candidates):
    """By a classifier of the prompt's tokens: multinomial naive Bayes (McCallum and Nigam 1998), add-one smoothing.

    Each sequence is labelled with the drafter that is best on it ``by`` accepted tokens a round, or by tokens per
    second of a round at batch 1 (its own prices), as recorded, drafting the policy's longest draft. Each is
    classified by a model trained on the other `folds` - 1 parts of the sequences; equal prompts are in one part.
    Its own implementation, in numpy. Replay is exact; how good such a router is elsewhere depends on how alike
    prompts are there.
    """

    policy: Literal["classifier"]
    by: Literal["accepted", "tokens_per_second"] = "tokens_per_second"
    folds: Annotated[int, Field(ge=2)] = 5


class Assigned(Candidates):
    """By a table from outside, the CSV file at `path`: columns sequence_id and drafter, a row for every sequence.

    `path` is relative to the scenario file. So any other router's choices can be replayed. Exact replay.
    """

    policy: Literal["assigned"]
    path: InputFile


class ByConfidence(Candidates):
    """In every round, by the drafters' own confidence: TAPS (2026, arXiv 2603.27027), confidence routing, for chains.

    Every drafter drafts for every slot, as far as the stopping policy says or only `probe_tokens`; the one with the
    largest mean confidence over those steps is kept, drafts on to its end, and is verified. All drafting is charged.
    As exact as the signals (`simulator.playback.signals`). The drafters' KV catches up with the text for free.
    """

    policy: Literal["confidence"]
    probe_tokens: Count | None = None


class Ucb(Candidates):
    """UCB1 (Auer, Cesa-Bianchi and Fischer 2002): argmax of mean reward + c * sqrt(ln n / n_g), arms = drafters.

    Reward: the request's tokens per second of its rounds, divided by the largest seen so far; n_g counts requests
    routed, ended or not, as rewards come late. `c`, their sqrt(2) unless given. Learns while it serves, on each
    replica alone. Exact replay.

    With `window` it knows only the last so many requests (SW-UCB, Garivier and Moulines 2011), for changing traffic.
    """

    policy: Literal["ucb"]
    exploration: Positive = 2**0.5
    window: Count | None = None


class Thompson(Candidates):
    """Thompson sampling for Gaussian rewards of unknown mean and variance (Honda and Takemura 2014), flat prior.

    The mean of an arm after n rewards with mean m and sum of squared deviations S is drawn as
    m + sqrt(S / (n (n - 3))) * t, Student's t with n - 3 degrees of freedom; every arm is played four times first.
    Rewards as for ``ucb``. Draws depend on the seed and the request alone. Exact replay.
    """

    policy: Literal["thompson"]


class PakUcb(Candidates):
    """PAK-UCB (Hu et al. 2024, arXiv 2410.13287): for each drafter a kernel ridge regression on the prompt.

    argmax mu + eta * sigma with mu = k' (K + a I)^-1 y and sigma^2 = k(x, x) - k' (K + a I)^-1 k, in exact form;
    drafters without a reward first. eta = sqrt(2 ln(2 T G / delta)), T = `horizon` and G drafters, unless given.
    x: counts of the prompt's tokens, or the domain label as one-hot vector, of length 1. Kernels: (x'y + 1)^3, x'y,
    exp(-|x - y|^2). Rewards as for ``ucb``. Exact replay.
    """

    policy: Literal["pak_ucb"]
    features: Features = "tokens"
    kernel: Literal["poly", "linear", "rbf"] = "poly"
    ridge: Positive = 1.0
    eta: Positive | None = None
    horizon: Count = 1000
    delta: Inside = 0.05


class OracleRequest(Candidates):
    """For each request the drafter with the fewest rounds, or least time: an oracle, no engine knows it.

    As if every round drafted the stopping policy's longest draft: exact for policies of one fixed length and for
    oracles. ``by = "seconds"`` weighs rounds by their price at batch 1, for the recorded length of the prompt. Rounds
    bound the rounds, not the seconds, of any choice for a request; seconds bound those at batch 1. Of equals, the
    first.
    """

    policy: Literal["oracle_request"]
    by: Literal["rounds", "seconds"] = "rounds"


class OracleRound(Candidates):
    """For each round the drafter on a way to the request's end with the fewest rounds, or least time: an oracle.

    By dynamic programming over the request's positions; ``by`` and draft lengths as for ``oracle_request``. With
    stopping policy ``oracle`` it is the oracle drafter-and-length. No engine knows it; it bounds every choice of
    drafters. The drafters' KV catches up with the text for free.
    """

    policy: Literal["oracle_round"]
    by: Literal["rounds", "seconds"] = "rounds"


class Merged(Candidates):
    """All drafters draft, and the union of their chains at the common root is verified: TAPS, merged trees.

    Greedy: accepted = the longest run of all, capped by each drafter's own draft. Verified tokens are counted as the
    sum of the drafts less what they share on the text; tokens that they share off the text are not known and count
    twice: an upper bound, exact where drafts never agree on a wrong token. All drafting is charged.
    """

    policy: Literal["merged"]


class PluginChoice(Candidates, PluginTable):
    """A choice from outside, by the name of its entry point; written ``policy = "plugin:name"``."""

    group: ClassVar[str] = "paceline.drafter_routing"
    policy: Literal["plugin"]


DrafterRouting = Annotated[
    StaticDrafter
    | ByDomain
    | ByClassifier
    | Assigned
    | ByConfidence
    | Ucb
    | Thompson
    | PakUcb
    | OracleRequest
    | OracleRound
    | Merged
    | ContextMatch
    | Forecast
    | PluginChoice,
    Field(discriminator="policy"),
    by_name("policy"),
]
WITHOUT_LEARNING = ("none", "fixed", "by_batch", "oracle", "confidence", "specdec++")
"""Stopping policies that do not read drafted and accepted tokens, which mean something else in a merged draft."""


def drafter_faults(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (place, rule) for every rule about routing to drafters that the (maybe unchecked) scenario breaks."""
    rule, here = _rule(data), "routing.drafter"
    priced = as_table(as_table(data.get("costs")).get("drafters"))
    if not rule:
        return (
            [("costs.drafters", "needs routing.drafter; the price of one drafter is costs.drafter")] if priced else []
        )
    faults: list[tuple[str, str]] = []
    names = [name for name in _listed(rule.get("drafters")) if isinstance(name, str)]
    if len(set(names)) < len(names):
        faults.append((f"{here}.drafters", f"must name each drafter once, got {', '.join(names)}"))
    chosen = [(f"{here}.{place}", name) for place, name in _chosen(rule)]
    for place, name in chosen + [("costs.drafters", name) for name in priced]:
        if isinstance(name, str) and names and name not in names:
            faults.append((place, f"must be one of the drafters, got '{name}'{did_you_mean(name, names)}"))
    if data.get("drafter") is not None:
        faults.append(("drafter", "must be left out where routing.drafter names the drafters"))
    stopping, placement = (as_table(data.get(key)) for key in ("stopping", "placement"))
    policy = stopping.get("policy", "none")
    faults += [(here, fault) for fault in stopping_faults(rule.get("policy"), policy)]
    if placement.get("kind", "serial") != "serial":
        faults.append((here, f"needs placement.kind = 'serial', got {placement.get('kind')!r}"))
    return faults


def stopping_faults(rule: Any, stopping: Any) -> list[str]:
    """Give what is wrong about routing policy `rule` beside stopping policy `stopping`."""
    if stopping == "tree":
        return ["must be left out where stopping.policy is 'tree': trees are drafted by one drafter"]
    if stopping == "learned":
        return ["must be left out where stopping.policy is 'learned': it knows one drafter"]
    if rule == "merged" and isinstance(stopping, str) and stopping not in WITHOUT_LEARNING:
        allowed = ", ".join(WITHOUT_LEARNING)
        return [f"policy 'merged' needs a stopping policy of {allowed}, got '{stopping}'"]
    return []


def unknown_names(data: Mapping[str, Any], drafters: Iterable[str], domains: Iterable[str]) -> list[str]:
    """Give a sentence for every drafter and domain of ``[routing] drafter`` that the TraceSet lacks."""
    rule, known = _rule(data), sorted(set(domains))
    faults = [
        f"routing.drafter.drafters: not in the TraceSet, got '{name}'{did_you_mean(name, drafters)}"
        for name in _listed(rule.get("drafters"))
        if isinstance(name, str) and name not in drafters
    ]
    return faults + [
        f"routing.drafter.table: not in the TraceSet, got '{name}'{did_you_mean(name, known)}"
        for name in as_table(rule.get("table"))
        if name not in known
    ]


def routes_drafters(data: Mapping[str, Any]) -> bool:
    """Whether the (maybe unchecked) scenario `data` has a ``[routing] drafter`` table."""
    return as_table(data.get("routing")).get("drafter") is not None


def _rule(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return as_table(as_table(data.get("routing")).get("drafter"))


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else ()


def _chosen(rule: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Give the places of a rule that choose one of its drafters."""
    table = as_table(rule.get("table"))
    places = [(key, rule.get(key)) for key in ("drafter", "default", "lookup")]
    return places + [(f"table.{key}", table[key]) for key in table]
