"""Playing rounds in which every slot has a drafter and a draft length of its own, chosen from its text.

From a section of `simulator.scenario.routing` to the rule that plays it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import ReplayError
from simulator.drafter_routing.forecast import ForecastRule, learn_forecasts
from simulator.drafter_routing.group import Draft, Drafters
from simulator.playback.replay import Replay
from simulator.playback.signals import DrafterRecording
from simulator.playback.survival import text_facts
from simulator.pricing.costs import DraftCost
from simulator.rounds.protocols import Played, Round
from simulator.scenario.routing import ContextMatch, Forecast
from simulator.scenario.scenario import Scenario
from simulator.stopping import StoppingPolicy, ask


class RoundRule(Protocol):
    """Chooses drafter and draft length of every slot, from the text so far and past rounds."""

    def opened(self, slots: Ints) -> None:
        """Forget what was known of these slots."""
        ...

    def choose(self, round_: Round, cap: Ints) -> tuple[Ints, Ints]:
        """Give (drafter, draft length of at most `cap`) of each slot, shape (active,); bonus excluded."""
        ...

    def learn(self, round_: Round, row: Ints, drafted: Ints, accepted: Ints) -> None:
        """Hear what came of a round."""
        ...


class ByRoundRule:
    """A rule that chooses in every round; `round_` is rewritten to the drafters chosen.

    Drafting of a drafter is charged for the slots that it drafts at least one token for; one that drafts for none is
    idle. The stopping policy gives the cap.
    """

    def __init__(self, drafters: Drafters, rule: RoundRule) -> None:
        self._drafters, self._rule = drafters, rule

    def opened(self, slots: Ints) -> None:
        """Forget these."""
        self._rule.opened(slots)

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        drafters = self._drafters
        first = drafters.many.at(round_.cursor, 0)
        cap = ask(policy, drafters.see(round_, first, 0), drafters.runs(first, left))
        row, tokens = self._rule.choose(round_, cap)
        round_.cursor = drafters.many.at(round_.cursor, row)
        tokens = drafters.capped(round_.cursor, tokens)
        accepted = np.minimum(drafters.runs(round_.cursor, left), tokens)
        emitted = np.minimum(accepted + 1, left)
        verified = round_.active + int(drafters.verified(row, round_.cursor, tokens).sum())
        drafts = [
            Draft(drafter, tokens[mine], round_.context[mine], round_.cursor[mine])
            for drafter in range(drafters.many.joint)
            if (mine := (row == drafter) & (tokens > 0)).any()
        ]
        draft_s, verify_s = drafters.seconds(round_, drafts, verified)
        drafters.note(row, accepted)
        self._rule.learn(round_, row, tokens, accepted)
        return Played(
            drafted=tokens,
            accepted=accepted,
            emitted=emitted,
            draft_s=draft_s,
            verify_s=verify_s,
            seconds=draft_s + verify_s,
            verified_tokens=verified,
        )


class MatchRule:
    """See `ContextMatch`. `match` (recorded positions): longest earlier match of the text before each."""

    def __init__(self, rule: ContextMatch, drafters: Drafters, match: Ints) -> None:
        self._many, self._match = drafters.many, match
        self._lookup = rule.drafters.index(rule.lookup)
        self._tiers = sorted((int(size), tier) for size, tier in rule.tiers.items())

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def choose(self, round_: Round, cap: Ints) -> tuple[Ints, Ints]:
        """Choose by the length of the match."""
        tier = next((t for size, t in reversed(self._tiers) if size <= round_.active), self._tiers[0][1])
        copied = self._match[self._many.positions(round_.cursor)] >= tier.min_match
        row = np.where(copied, self._lookup, 1 - self._lookup)
        return row, np.minimum(np.where(copied, tier.lookup_tokens, tier.model_tokens), cap)

    def learn(self, round_: Round, row: Ints, drafted: Ints, accepted: Ints) -> None:
        """Nothing to learn."""


def make_round_rule(
    rule: ContextMatch | Forecast,
    scenario: Scenario,
    materials: Sequence[DrafterRecording],
    drafters: Drafters,
    costs: Sequence[DraftCost],
    policy: StoppingPolicy,
) -> RoundRule:
    """Give the rule; `materials` and `costs` are those of its drafters, in order.

    Raises `ReplayError` where token ids are missing, or run lengths of a rule that learns, or the stopping policy
    knows no longest draft.
    """
    traces, sequences = materials[0].traces, materials[0].sequences
    if isinstance(rule, ContextMatch):
        facts = text_facts(traces, sequences, "routing.drafter policy 'context_match'")
        return MatchRule(rule, drafters, facts.match)
    if policy.longest_draft is None:
        raise ReplayError(
            "stopping.policy: must know a longest draft for routing.drafter policy 'forecast' (as 'fixed' does), got "
            f"'{scenario.stopping.policy}'"
        )
    forecasts = learn_forecasts(
        traces,
        rule.drafters,
        sequences,
        longest=max(policy.longest_draft, 1),
        folds=rule.folds,
        learn_from=rule.learn_from,
        seed=scenario.seed,
    )
    learns = [not material.info.deterministic for material in materials]
    return ForecastRule(forecasts, drafters, costs, learns, scenario.engine.max_num_seqs)
