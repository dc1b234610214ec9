"""From a scenario's ``[stopping]`` table to a policy and the signals that it reads.

Stopping policies of third parties, found through entry points and checked in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, assert_never

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import ReplayError, ScenarioError
from calibration.common.plugins import make_plugin, need
from simulator.playback.replay import Replay
from simulator.playback.signals import DrafterRecording, RecordedSignals, make_signals
from simulator.rounds.protocols import OraclePolicy, Played, Policy, Round, StoppingPolicy
from simulator.scenario import stopping as settings
from simulator.stopping.budget import AdaptiveSteps, Budget
from simulator.stopping.confidence import AdaEDL, ConfidenceThreshold, SpecDecPP
from simulator.stopping.goodput import Goodput, Learned, PerRequest
from simulator.stopping.learned_signals import make_outlook
from simulator.stopping.lengths import ByBatch, Fixed, Heuristic, Oracle, OracleCost, TreeDraft
from simulator.trees.trees import Tree, TreeShape, dynamic_tree, rank_frequencies, static_tree, tree_table

Maker = Callable[[dict[str, Any], int], StoppingPolicy]
"""Makes a policy from its settings and ``max_num_seqs``."""


def plugin_policy(
    table: settings.Plugin, max_num_seqs: int, given: Mapping[str, Maker] | None = None
) -> StoppingPolicy:
    """Give the policy that the entry point of `table` makes, or one of those `given` by name.

    The entry point is a callable (settings, max_num_seqs) -> policy, most simply a subclass of
    `simulator.stopping.Policy`. It must have ``draft_tokens`` and ``longest_draft``; what else a policy has is taken
    from `Policy` where it is missing. One that knows the future derives from `simulator.stopping.OraclePolicy`.

    Raises `ScenarioError` where there is none of that name, where it does not take the settings (TypeError,
    ValueError, KeyError), where what it gives is not a policy, and, while it serves, where it reads what no engine
    knows or gives what are not draft lengths.
    """
    name, place = table.name, "stopping.policy"
    if given is not None and name in given:
        policy: Any = given[name](dict(table.settings), max_num_seqs)
    else:
        policy = make_plugin(table, "stopping.policy", ScenarioError, max_num_seqs)
    if isinstance(policy, OraclePolicy):
        return _CheckedOracle(name, policy)
    need(policy, ("draft_tokens", "longest_draft"), "a stopping policy", name, place, ScenarioError)
    longest = policy.longest_draft
    if not isinstance(longest, int | np.integer) or isinstance(longest, bool) or longest < 0:
        raise ScenarioError(
            f"{place}: longest_draft of plugin '{name}' must be a whole number >= 0, the most it ever asks "
            f"for, got {longest!r}"
        )
    return _Checked(name, policy)


class _Checked(Policy):
    """A policy from outside: what it lacks is taken from `Policy`, and what it gives is checked."""

    def __init__(self, name: str, policy: Any) -> None:
        self._name, self._policy = name, policy
        for part in (part for part in Policy.__annotations__ if hasattr(policy, part)):
            setattr(self, part, getattr(policy, part))
        for part in ("opened", "observe"):
            if hasattr(policy, part):
                setattr(self, part, getattr(policy, part))

    def draft_tokens(self, round_: Round) -> Ints:
        """Ask the policy."""
        try:
            asked = self._policy.draft_tokens(round_)
        except AttributeError as fault:
            if fault.obj is not round_:
                raise
            known = ", ".join(Round.__slots__)
            raise ScenarioError(
                f"stopping.policy: plugin '{self._name}' reads '{fault.name}' of a round, which holds what an engine "
                f"knows: {known}; a policy that knows the future derives from simulator.stopping.OraclePolicy"
            ) from fault
        return _lengths(self._name, asked, round_, self.longest_draft)


class _CheckedOracle(OraclePolicy):
    """An oracle from outside."""

    def __init__(self, name: str, policy: OraclePolicy) -> None:
        self._name, self._policy = name, policy
        for part in Policy.__annotations__:
            setattr(self, part, getattr(policy, part))

    def opened(self, slots: Ints) -> None:
        """Tell the policy."""
        self._policy.opened(slots)

    def observe(self, round_: Round, played: Played) -> None:
        """Tell the policy."""
        self._policy.observe(round_, played)

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Ask the policy."""
        asked = _lengths(self._name, self._policy.foreseen_tokens(round_, run_length), round_, self.longest_draft)
        # Without a longest draft, memory is reserved for what will be accepted: more cannot be verified.
        if self.longest_draft is None and bool((asked > run_length).any()):
            raise ScenarioError(
                f"stopping.policy: plugin '{self._name}' must ask for no more than will be accepted, or say its "
                f"longest_draft, got {int((asked - run_length).max())} too many"
            )
        return asked


def _lengths(name: str, asked: Any, round_: Round, longest: int | None) -> Ints:
    """Give `asked` if it is a draft length for every active slot; `ScenarioError` that names the contract if not."""
    rule = f"stopping.policy: plugin '{name}' must give draft lengths as an integer array of shape ({round_.active},)"
    if not isinstance(asked, np.ndarray) or asked.dtype.kind not in "iu" or asked.shape != (round_.active,):
        shown = f"{asked.dtype} of shape {asked.shape}" if isinstance(asked, np.ndarray) else type(asked).__name__
        raise ScenarioError(f"{rule}, got {shown}")
    if round_.active and (asked.min() < 0 or (longest is not None and asked.max() > longest)):
        most = "" if longest is None else f" and at most its longest_draft of {longest}"
        worst = asked.min() if asked.min() < 0 else asked.max()
        raise ScenarioError(f"{rule}, all >= 0{most}, got {worst}")
    return asked.astype(np.int64, copy=False)


_RANKS = 16
"""Ranks that a Sequoia tree may use where no acceptance vector is given."""


def make_policy(
    stopping: settings.Stopping,
    max_num_seqs: int,
    material: DrafterRecording | None = None,
    given: Mapping[str, Maker] | None = None,
) -> StoppingPolicy | None:
    """Give the policy that a scenario names; None where nothing is drafted at all (``none``).

    `material` is what was recorded of its drafter; only trees need it. `given`: policies from outside that need no
    entry point. Raises `ReplayError` where the recording lacks
    what a tree needs and `ScenarioError` for a shape that is none and a plug-in that is not there.
    """
    match stopping:
        case settings.NoSpeculation():
            return None
        case settings.FixedLength(draft_tokens=tokens):
            return Fixed(tokens, max_num_seqs)
        case settings.OracleLength():
            return Oracle()
        case settings.OracleCost():
            return OracleCost()
        case settings.ByBatch(table=table):
            return ByBatch(table, max_num_seqs)
        case settings.Heuristic(start_tokens=start, max_draft_tokens=longest):
            return Heuristic(start, longest, max_num_seqs)
        case settings.MovingAverage():
            return AdaptiveSteps(stopping)
        case settings.TreeDraft(shape=shape):
            if material is None:
                raise ReplayError("stopping.policy: 'tree' needs the recording of a drafter")
            return TreeDraft(make_tree(shape, material))
        case settings.Plugin():
            return plugin_policy(stopping, max_num_seqs, given)
        case settings.Confidence(threshold=threshold, max_draft_tokens=longest):
            return ConfidenceThreshold(threshold, longest)
        case settings.AdaEDL():
            return AdaEDL(
                threshold=stopping.threshold,
                gamma=stopping.gamma,
                target_acceptance=stopping.target_acceptance,
                step=stopping.step,
                decays=(stopping.acceptance_decay, stopping.threshold_decay),
                max_draft_tokens=stopping.max_draft_tokens,
                max_num_seqs=max_num_seqs,
            )
        case settings.SpecDecPP(threshold=threshold, min_draft_tokens=least, max_draft_tokens=longest):
            return SpecDecPP(threshold, least, longest)
        case settings.Learned(max_draft_tokens=longest):
            return Learned(longest)
        case settings.Goodput(max_draft_tokens=longest, start_acceptance=start, decay=decay, probe_rounds=probe):
            return Goodput(longest, start, decay, probe)
        case settings.PerRequest(max_draft_tokens=longest, start_acceptance=start, decay=decay):
            return PerRequest(longest, start, decay, max_num_seqs)
        case settings.Budget(max_draft_tokens=longest, start_acceptance=start, decay=decay):
            budget = stopping.tokens_per_request
            return Budget(stopping.estimate, longest, start, decay, budget, max_num_seqs)
    assert_never(stopping)


def make_tree(shape: settings.Shape, material: DrafterRecording) -> Tree:
    """Give the tree that a scenario describes, compiled for the sequences served."""
    match shape:
        case settings.ChainShape(depth=depth):
            return static_tree(material, TreeShape.chain(depth))
        case settings.BranchingShape(branching=branching, depth=depth):
            return static_tree(material, TreeShape.k_ary(branching, depth))
        case settings.PathsShape(paths=paths):
            return static_tree(material, TreeShape.from_paths(paths))
        case settings.ParentsShape(parents=parents, ranks=ranks):
            return static_tree(material, TreeShape(parents, ranks))
        case settings.SequoiaShape(nodes=nodes, depth=depth, acceptance=acceptance):
            vector = acceptance if acceptance is not None else rank_frequencies(material, _RANKS).tolist()
            return static_tree(material, tree_table(vector, nodes, depth).shape(nodes, depth))
        case settings.DynamicShape(total_tokens=nodes, depth=depth, top_k=width):
            return dynamic_tree(material, nodes, depth, width)
    assert_never(shape)


def policy_signals(
    stopping: settings.Stopping,
    policy: StoppingPolicy | None,
    replay: Replay | None,
    material: DrafterRecording | None,
) -> RecordedSignals | None:
    """Give the signals that `policy` reads, if it reads any."""
    if policy is None or not policy.needs_signals or replay is None or material is None:
        return None
    if isinstance(stopping, settings.Learned):
        return make_outlook(replay, material)
    predict = isinstance(stopping, settings.SpecDecPP | settings.Budget)
    given = getattr(stopping, "coefficients", None)
    return make_signals(
        replay, material, predict=predict, coefficients=None if given is None else np.array(given, dtype=np.float64)
    )
