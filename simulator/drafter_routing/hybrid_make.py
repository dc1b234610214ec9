"""From a section of `simulator.scenario.hybrid` to the rule that plays it."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.common.errors import ReplayError
from simulator.drafter_routing.forecast import ForecastRule
from simulator.drafter_routing.forecast_learn import learn_forecasts
from simulator.drafter_routing.group import Drafters
from simulator.drafter_routing.hybrid_play import MatchRule, RoundRule
from simulator.playback.recorded import Material
from simulator.playback.text_facts import text_facts
from simulator.pricing.costs import DraftCost
from simulator.scenario.hybrid import ContextMatch, Forecast
from simulator.scenario.scenario import Scenario
from simulator.stopping import StoppingPolicy


def make_round_rule(
    rule: ContextMatch | Forecast,
    scenario: Scenario,
    materials: Sequence[Material],
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
