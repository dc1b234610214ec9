"""Stopping policies of third parties, found through entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from calibration.errors import ScenarioError, did_you_mean
from simulator.stopping.base import StoppingPolicy

GROUP = "paceline.stopping"
"""The entry point group."""


def plugin_policy(name: str, settings: Mapping[str, Any], max_num_seqs: int) -> StoppingPolicy:
    """Give the policy that the entry point `name` of group ``paceline.stopping`` makes.

    The entry point is a callable (settings, max_num_seqs) -> policy, most simply a subclass of
    `simulator.stopping.Policy`. Raises `ScenarioError` where there is none of that name, where it does not take the
    settings (TypeError, ValueError), or where what it gives is not a policy.
    """
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise ScenarioError(
            f"stopping.policy: no entry point of group '{GROUP}' is called '{name}'{did_you_mean(name, known)}"
        )
    try:
        policy: StoppingPolicy = known[name].load()(dict(settings), max_num_seqs)
    except (TypeError, ValueError, KeyError) as fault:
        raise ScenarioError(f"stopping.settings: plugin '{name}' does not take them ({fault})") from fault
    lacking = [part for part in ("draft_tokens", "observe", "opened", "longest_draft") if not hasattr(policy, part)]
    if lacking:
        raise ScenarioError(
            f"stopping.policy: what plugin '{name}' makes must be a stopping policy; it has no {', '.join(lacking)}"
        )
    for part, default in (("needs_signals", False), ("drafts_ahead", None), ("tree", None)):
        if not hasattr(policy, part):
            setattr(policy, part, default)
    return policy
