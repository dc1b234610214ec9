"""Draft trees: their shapes, which of their nodes lie on the text, and what they cost.

A node is the drafter's child of some rank (0: its first choice) after its parent; the root is the last committed
token and no node. Greedy: a node lies on the text iff, at every depth d of its path, the child's rank equals the rank
of x_{t+d} under the drafter (`emitted_rank`). The deepest such node gives the accepted length, bonus excluded. For a
drafter that sees tokens alone this replays any static tree exactly: every context on such a path is a prefix of the
text. Sampled decoding needs the drafter's whole distributions, which no trace holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError, ReplayError, ScenarioError
from calibration.verification import shapes
from simulator.playback.recorded import Material
from simulator.pricing.costs import DraftFraction, DraftPerStep, Prices


class TreeShape(shapes.TreeShape):
    """The static tree that a scenario names: what is no tree is a fault of the scenario."""

    def __post_init__(self) -> None:
        """Refuse what is not a tree."""
        try:
            super().__post_init__()
        except CalibrationError as fault:
            raise ScenarioError(f"stopping.shape.{fault}") from None

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> Self:
        """Give the tree of nodes named by their paths of ranks; every prefix of a path must be there."""
        try:
            return super().from_paths(paths)
        except CalibrationError as fault:
            raise ScenarioError(f"stopping.shape.{fault}") from None


class Tree:
    """A tree compiled for the sequences served: accepted lengths by recorded place, and prices.

    `nodes` are verified in every round beside the root; `depth` bounds the accepted length; `widths` are the nodes
    that the drafter runs in each of its steps.
    """

    def __init__(self, accepted: Ints, nodes: int, depth: int, widths: Sequence[int]) -> None:
        self.nodes, self.depth, self.widths = nodes, depth, tuple(widths)
        self._accepted = accepted

    def accepted(self, places: Ints) -> Ints:
        """Give accepted lengths, bonus excluded, at recorded places (`Replay.positions` of cursors)."""
        return self._accepted[places]

    def seconds(self, prices: Prices, batch: int, total_context: int) -> tuple[float, float, bool]:
        """Give (draft seconds, verify seconds, whether outside of the measured range) of a round.

        Every slot drafts and verifies the whole tree. A draft step runs `widths` nodes of every slot in lock step, on
        the context and the nodes run before; one verifier step reads all nodes and the root.
        """
        verify_s, outside = prices.verify_s(batch, batch * (self.nodes + 1), total_context)
        draft = prices.draft
        if draft is None:
            return 0.0, verify_s, outside
        if isinstance(draft, DraftFraction):
            return draft.seconds(np.empty(0, np.int64), np.empty(0, np.int64), verify_s)[0], verify_s, outside
        if not isinstance(draft, DraftPerStep):
            new = batch * self.nodes if draft.tokens else batch
            draft_s = float(draft.step.step_seconds(batch, new, total_context))
            return draft_s, verify_s, outside or draft.step.outside(batch, new, total_context)
        new_tokens = batch * np.array(self.widths)
        cached = total_context + np.concatenate(([0], np.cumsum(new_tokens)[:-1]))
        draft_s = float(np.sum(draft.step.step_seconds(batch, new_tokens, cached)))
        widest = int(np.argmax(new_tokens))
        edges = {0, widest, len(new_tokens) - 1}
        beyond = any(draft.step.outside(batch, float(new_tokens[j]), float(cached[j])) for j in sorted(edges))
        return draft_s, verify_s, outside or beyond


def recorded_ranks(material: Material) -> Ints:
    """Give the rank of every token of the text under the drafter, -1 where it was not recorded and is not needed.

    Raises `ReplayError` where a tree cannot be replayed: sampled decoding, a drafter that proposes given tokens, or
    ranks that were not recorded.
    """
    name = material.drafter
    if not material.greedy:
        raise ReplayError(
            f"stopping.policy: 'tree' replays greedy traces only; those of drafter '{name}' are sampled"
        )
    if material.info.deterministic:
        raise ReplayError(
            f"stopping.policy: 'tree' needs a drafter that ranks tokens; '{name}' ({material.info.paradigm}) "
            "proposes given ones"
        )
    (rank,) = material.columns("emitted_rank")
    material.whole("emitted_rank", rank, "policy 'tree'")
    return np.where(np.isnan(rank), -1, rank).astype(np.int64)


def static_tree(material: Material, shape: TreeShape) -> Tree:
    """Compile a static tree; exact for greedy traces of drafters that see tokens alone."""
    accepted = shape.accepted(recorded_ranks(material), material.lengths)
    return Tree(accepted, shape.nodes, int(shape.depths.max()), shape.widths)


def rank_frequencies(material: Material, ranks: int) -> Floats:
    """Give how often the text's next token has rank 0 .. `ranks` - 1 under the drafter, over all recorded places.

    Sequoia's acceptance vector, positional and free of context, under greedy decoding.
    """
    rank = recorded_ranks(material)[material.needed]
    return np.bincount(rank[rank < ranks], minlength=ranks) / len(rank)
