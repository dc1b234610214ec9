"""From a scenario's ``[stopping]`` table to a policy and the signals that it reads."""

from __future__ import annotations

from typing import assert_never

import numpy as np

from calibration.common.errors import ReplayError
from simulator.playback.recorded import Material
from simulator.playback.replay import Replay
from simulator.playback.signals import RecordedSignals, make_signals
from simulator.rounds.policy import StoppingPolicy
from simulator.scenario import stopping as settings
from simulator.stopping.budget import Budget
from simulator.stopping.confidence import AdaEDL, ConfidenceThreshold, SpecDecPP
from simulator.stopping.fixed import ByBatch, Fixed
from simulator.stopping.goodput import Goodput, PerRequest
from simulator.stopping.heuristic import Heuristic
from simulator.stopping.learned import Learned
from simulator.stopping.moving_average import AdaptiveSteps
from simulator.stopping.oracle import Oracle, OracleCost
from simulator.stopping.outlook import make_outlook
from simulator.stopping.plugins import plugin_policy
from simulator.stopping.tree import TreeDraft
from simulator.trees.dynamic_tree import dynamic_tree
from simulator.trees.sequoia import tree_table
from simulator.trees.trees import Tree, TreeShape, rank_frequencies, static_tree

_RANKS = 16
"""Ranks that a Sequoia tree may use where no acceptance vector is given."""


def make_policy(
    stopping: settings.Stopping, max_num_seqs: int, material: Material | None = None
) -> StoppingPolicy | None:
    """Give the policy that a scenario names; None where nothing is drafted at all (``none``).

    `material` is what was recorded of its drafter; only trees need it. Raises `ReplayError` where the recording lacks
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
        case settings.Plugin(name=name, settings=given):
            return plugin_policy(name, given, max_num_seqs)
        case settings.Confidence(threshold=threshold, max_draft_tokens=longest):
            return ConfidenceThreshold(threshold, longest)
        case settings.AdaEDL():
            return AdaEDL(
                stopping.threshold,
                stopping.gamma,
                stopping.target_acceptance,
                stopping.step,
                (stopping.acceptance_decay, stopping.threshold_decay),
                stopping.max_draft_tokens,
                max_num_seqs,
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


def make_tree(shape: settings.Shape, material: Material) -> Tree:
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
    stopping: settings.Stopping, policy: StoppingPolicy | None, replay: Replay | None, material: Material | None
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
