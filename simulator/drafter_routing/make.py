"""From a scenario's ``[routing] drafter`` table to the pieces that one replica needs.

Choices made outside: which drafter serves which request, read from a CSV file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from calibration.common.arrays import Floats, Ints, placed_rows, tell
from calibration.common.errors import ScenarioError, did_you_mean
from calibration.common.plugins import make_plugin, need
from calibration.traces import TraceSet
from simulator.drafter_routing.choice import (
    Choice,
    KernelUcb,
    ManyRuns,
    ManySignals,
    Newcomer,
    SlidingUcb,
    Table,
    ThompsonSampling,
    Ucb1,
    default_eta,
    kernel_matrix,
    must_be_greedy,
)
from simulator.drafter_routing.group import (
    BestAlone,
    ByMeanConfidence,
    ByOracleRound,
    ByRequest,
    ByUnion,
    Drafters,
    Foresight,
    RoutedReplay,
)
from simulator.drafter_routing.hybrid import ByRoundRule, make_round_rule
from simulator.drafter_routing.prompts import domain_contexts, out_of_fold, prompt_contexts, token_counts
from simulator.placement import Placement
from simulator.playback.replay import DrawnRuns, Replay, SequenceTable
from simulator.playback.signals import DrafterRecording, make_signals
from simulator.pricing.costs import DraftCost, Prices
from simulator.scenario import routing as settings
from simulator.scenario.routing import ContextMatch, Forecast, stopping_faults
from simulator.scenario.scenario import Scenario
from simulator.stopping import StoppingPolicy, policy_signals

COLUMNS = ("sequence_id", "drafter")


def read_assigned(path: Path, drafters: Sequence[str], served: Sequence[str], known: Collection[str]) -> list[int]:
    """Give the index in `drafters` for each of the `served` sequence ids, by the table at `path`.

    A CSV file with a header and the columns sequence_id and drafter; other columns are ignored, and so are rows of
    sequences that are `known` but not served. Raises `ScenarioError` with every fault and its place: a column or a
    served sequence that is missing, a sequence or drafter that there is not, a sequence that stands there twice.
    """
    faults: list[str] = []
    chosen: dict[str, int] = {}
    for place, row in placed_rows(path, COLUMNS, "routing.drafter.path", faults):
        faults += _take(row, place, chosen, drafters, known)
    if not faults:
        faults = [
            f"{path}: column 'sequence_id': must have every sequence that is served, lacks '{name}'"
            for name in served
            if name not in chosen
        ]
    tell(path, faults)
    return [chosen[name] for name in served]


def _take(
    row: Mapping[str, str | None],
    place: str,
    chosen: dict[str, int],
    drafters: Sequence[str],
    known: Collection[str],
) -> list[str]:
    """Add a row to `chosen`; give what is wrong with it."""
    sequence, drafter = ((row[column] or "").strip() for column in COLUMNS)
    faults = []
    if sequence not in known:
        close = did_you_mean(sequence, known) if len(known) <= 1000 else ""
        close = close if "did you mean" in close else ""
        faults.append(f"{place}: column 'sequence_id': not in the TraceSet, got '{sequence}'{close}")
    elif sequence in chosen:
        faults.append(f"{place}: column 'sequence_id': must name each sequence once, got '{sequence}' again")
    if drafter not in drafters:
        close = did_you_mean(drafter, drafters)
        faults.append(f"{place}: column 'drafter': must be one of the drafters, got '{drafter}'{close}")
    if not faults:
        chosen[sequence] = drafters.index(drafter)
    return faults


_OPEN_ENDED = 64
"""Drafted tokens that a classifier's labels count at most where the stopping policy knows no longest draft."""


@dataclass(frozen=True)
class Routed:
    """What serves a replica with several drafters."""

    rule: settings.DrafterRouting
    replay: RoutedReplay
    placement: Placement
    signals: ManySignals | None
    drafters: Drafters
    choice: Choice | None

    def describe(self) -> dict[str, Any]:
        """Give the policy, the tally of its drafters, and what it has learned."""
        learned = {} if self.choice is None else self.choice.describe()
        oracle = {"oracle": True} if isinstance(self.rule, settings.OracleRound) else {}
        return {"policy": self.rule.policy, **oracle, **learned, "drafters": self.drafters.describe()}


def drafter_rule(scenario: Scenario) -> settings.DrafterRouting | None:
    """Give the ``[routing] drafter`` table of `scenario`, if it has one."""
    return None if scenario.routing is None else scenario.routing.drafter


def drafter_names(scenario: Scenario) -> tuple[str, ...]:
    """Give the drafters that `scenario` names, drafting or not."""
    rule = drafter_rule(scenario)
    if rule is not None:
        return rule.drafters
    return () if scenario.drafter is None else (scenario.drafter.name,)


def is_drawn(replay: Replay) -> bool:
    """Whether acceptance is drawn at random, not recorded."""
    parts = replay.many.parts if isinstance(replay, RoutedReplay) else (replay,)
    return any(isinstance(part, DrawnRuns) for part in parts)


def in_memory(rule: settings.DrafterRouting) -> tuple[str, ...]:
    """Give the drafters whose weights and KV blocks take memory: those that the rule may ever choose."""
    if isinstance(rule, settings.StaticDrafter):
        return (rule.drafter,)
    if isinstance(rule, settings.ByDomain):
        used = {*rule.table.values(), rule.default}
        return tuple(name for name in rule.drafters if name in used)
    return rule.drafters


def slots_ahead(rule: settings.DrafterRouting, longest_draft: int | None) -> int | None:
    """Give the KV slots to keep free behind a sequence: a merged draft holds the drafts of all."""
    return (
        longest_draft * len(rule.drafters) if longest_draft and isinstance(rule, settings.Merged) else longest_draft
    )


def route(
    scenario: Scenario,
    traces: TraceSet,
    sequences: SequenceTable,
    policy: StoppingPolicy,
    prices: Prices,
    many: ManyRuns,
) -> Routed:
    """Give the pieces; `many` are the drafters of the rule, compiled for `sequences`.

    Raises `ReplayError` where the recording lacks what the policy reads and `ScenarioError` for a domain without a
    drafter, or a stopping policy that does not go with the rule.
    """
    rule = drafter_rule(scenario)
    assert rule is not None
    faults = stopping_faults(rule.policy, scenario.stopping.policy)
    if faults:
        raise ScenarioError(f"routing.drafter: {faults[0]}")
    costs = [prices.by_drafter[name] for name in rule.drafters]
    drafters = Drafters(many, rule.drafters, costs)
    materials = [DrafterRecording(traces, name, sequences) for name in rule.drafters]
    choice = _choice(rule, scenario, materials, policy, prices, many)
    routed_replay = RoutedReplay(many, sequences.output_tokens, choice)
    slots = scenario.engine.max_num_seqs
    placement: Placement
    if choice is not None:
        placement = ByRequest(drafters, routed_replay, choice, slots)
    elif isinstance(rule, settings.ByConfidence):
        placement = ByMeanConfidence(drafters, rule.probe_tokens)
    elif isinstance(rule, settings.Merged):
        must_be_greedy(traces, rule.policy)
        placement = ByUnion(drafters)
    elif isinstance(rule, ContextMatch | Forecast):
        placement = ByRoundRule(drafters, make_round_rule(rule, scenario, materials, drafters, costs, policy))
    else:
        assert isinstance(rule, settings.OracleRound)
        placement = ByOracleRound(drafters, _foresight(rule, policy, prices, many), slots)
    return Routed(rule, routed_replay, placement, _signals(rule, scenario, policy, many, materials), drafters, choice)


def _signals(
    rule: settings.DrafterRouting,
    scenario: Scenario,
    policy: StoppingPolicy,
    many: ManyRuns,
    materials: Sequence[DrafterRecording],
) -> ManySignals | None:
    parts = []
    for material in materials:
        signals = policy_signals(scenario.stopping, policy, many, material)
        if signals is None and isinstance(rule, settings.ByConfidence):
            signals = make_signals(many, material)
        if signals is not None:
            parts.append(signals)
    return ManySignals(many, parts) if parts else None


def _choice(
    rule: settings.DrafterRouting,
    scenario: Scenario,
    materials: Sequence[DrafterRecording],
    policy: StoppingPolicy,
    prices: Prices,
    many: ManyRuns,
) -> Choice | None:
    """Give what chooses for a request; None where the choice is made in every round."""
    sequences, arms = materials[0].sequences, len(rule.drafters)
    match rule:
        case settings.StaticDrafter(drafter=name):
            return Table([rule.drafters.index(name)] * len(sequences))
        case settings.ByDomain():
            return Table(_by_domain(rule, sequences))
        case settings.ByClassifier():
            return _classified(rule, scenario.seed, materials, policy.longest_draft, prices)
        case settings.Assigned(path=path):
            known = materials[0].traces.sequences["sequence_id"].to_pylist()
            return Table(read_assigned(scenario.locate(path), rule.drafters, sequences.ids, set(known)))
        case settings.Ucb(exploration=exploration, window=window):
            return Ucb1(arms, exploration) if window is None else SlidingUcb(arms, exploration, window)
        case settings.Thompson():
            return ThompsonSampling(arms, scenario.seed)
        case settings.PakUcb():
            return _kernel_ucb(rule, materials[0])
        case settings.OracleRequest():
            return BestAlone(_foresight(rule, policy, prices, many), sequences.prompt_tokens)
        case settings.PluginChoice():
            return _FromOutside(rule, scenario.seed)
        case settings.OracleRound() | settings.ByConfidence() | settings.Merged() | ContextMatch() | Forecast():
            return None
    assert_never(rule)


class _FromOutside:
    """A choice that an entry point (settings, drafters, seed) -> choice makes; what it chooses is checked."""

    def __init__(self, rule: settings.PluginChoice, seed: int) -> None:
        self._name, self._place, self._arms = rule.name, "routing.drafter.policy", len(rule.drafters)
        self._choice = make_plugin(rule, self._place, ScenarioError, rule.drafters, seed)
        need(self._choice, ("choose",), "a choice of drafters", self._name, self._place, ScenarioError)

    def choose(self, newcomer: Newcomer) -> int:
        """Ask the choice."""
        chosen = self._choice.choose(newcomer)
        if isinstance(chosen, bool) or not isinstance(chosen, int | np.integer) or not 0 <= chosen < self._arms:
            raise ScenarioError(
                f"{self._place}: plugin '{self._name}' must choose a drafter by its number, from 0 to "
                f"{self._arms - 1}, got {chosen!r}"
            )
        return int(chosen)

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Tell the choice, if it learns."""
        if hasattr(self._choice, "learn"):
            self._choice.learn(drafter, sequence, tokens_per_second)

    def describe(self) -> dict[str, Any]:
        """Give what the choice tells of itself."""
        return dict(self._choice.describe()) if hasattr(self._choice, "describe") else {}


def _foresight(
    rule: settings.OracleRequest | settings.OracleRound, policy: StoppingPolicy, prices: Prices, many: ManyRuns
) -> Foresight:
    costs = [prices.by_drafter[name] for name in rule.drafters] if rule.by == "seconds" else None
    return Foresight(many, policy.longest_draft, prices, costs)


def _by_domain(rule: settings.ByDomain, sequences: SequenceTable) -> list[int]:
    chosen = []
    for domain in sequences.domains:
        name = rule.table.get(domain, rule.default)
        if name is None:
            known = did_you_mean(domain, rule.table)
            raise ScenarioError(
                f"routing.drafter.table: must have every domain that is served, or a default; lacks '{domain}'{known}"
            )
        chosen.append(rule.drafters.index(name))
    return chosen


def _kernel_ucb(rule: settings.PakUcb, material: DrafterRecording) -> KernelUcb:
    if rule.features == "domain":
        context_of, similarity = domain_contexts(material.sequences.domains)
    else:
        needed_by = "routing.drafter policy 'pak_ucb' with features 'tokens'"
        context_of, similarity = prompt_contexts(token_counts(material.traces, material.sequences, needed_by))
    arms = len(rule.drafters)
    eta = rule.eta if rule.eta is not None else default_eta(rule.horizon, arms, rule.delta)
    return KernelUcb(arms, context_of, kernel_matrix(similarity, rule.kernel), rule.ridge, eta)


def _classified(
    rule: settings.ByClassifier,
    seed: int,
    materials: Sequence[DrafterRecording],
    longest_draft: int | None,
    prices: Prices,
) -> Table:
    sequences = materials[0].sequences
    counts = token_counts(materials[0].traces, sequences, "routing.drafter policy 'classifier'")
    accepted = np.stack([mean_accepted(material, longest_draft or _OPEN_ENDED) for material in materials])
    values = accepted
    if rule.by == "tokens_per_second":
        rates = [
            _rates(row, prices, prices.by_drafter[name], sequences, longest_draft)
            for row, name in zip(accepted, rule.drafters, strict=True)
        ]
        values = np.stack(rates)
    labels = np.argmax(values, axis=0)
    guesses = out_of_fold(counts, labels, len(materials), rule.folds, seed)
    shares = np.bincount(labels, minlength=len(materials)) / len(labels)
    told = {"held_out_accuracy": float(np.mean(guesses == labels)), "share_of_the_largest_class": float(shares.max())}
    return Table(guesses.tolist(), told)


def mean_accepted(material: DrafterRecording, longest_draft: int) -> Floats:
    """Give, for each sequence, the mean over its positions of the accepted tokens of a draft of `longest_draft`.

    Recorded run lengths where there are any, else the expectation, sum over j <= k of a_t .. a_{t+j-1}. The bonus is
    excluded.
    """
    runs, probability = material.columns("run_length", "accept_probability")
    needed, owners = material.needed, material.owners
    if not np.isnan(runs[needed]).any():
        accepted = np.minimum(np.nan_to_num(runs), longest_draft)
    else:
        ends = (material.starts + material.lengths)[owners]
        accepted, survival = np.zeros(len(owners)), np.ones(len(owners))
        place = np.arange(len(owners))
        for step in range(longest_draft):
            inside = place + step < ends
            survival *= np.where(inside, np.nan_to_num(probability)[np.minimum(place + step, len(owners) - 1)], 0.0)
            accepted += survival
    total = np.bincount(owners[needed], weights=accepted[needed], minlength=len(material.sequences))
    return np.asarray(total / np.maximum(material.lengths - 1, 1))


def _rates(
    accepted: Floats, prices: Prices, cost: DraftCost, sequences: SequenceTable, longest_draft: int | None
) -> Floats:
    """Give tokens per second of a round at batch 1, half-way through each sequence."""
    rates = np.zeros(len(sequences))
    for number, (prompt, output) in enumerate(zip(sequences.prompt_tokens, sequences.output_tokens, strict=True)):
        k = longest_draft if longest_draft is not None else round(float(accepted[number]))
        drafted: Ints = np.array([k], dtype=np.int64)
        context: Ints = np.array([prompt + output // 2], dtype=np.int64)
        verify_s, _ = prices.verify_s(1, 1 + k, int(context[0]))
        draft_s, _ = cost.seconds(drafted, context, verify_s)
        rates[number] = (accepted[number] + 1) / (draft_s + verify_s + prices.overhead_s)
    return rates


def routing_summary(pieces: Mapping[str, Routed | None]) -> dict[str, Any]:
    """Give what a run tells of its routing to drafters; `pieces` by the name of the replica."""
    told = {name: routed.describe() for name, routed in pieces.items() if routed is not None}
    if not told:
        return {}
    return {"drafter_routing": next(iter(told.values())) if len(pieces) == 1 else told}
