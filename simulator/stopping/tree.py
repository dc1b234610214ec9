"""Drafting a tree in every round."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Ints
from simulator.rounds.policy import Policy
from simulator.rounds.round import Round
from simulator.trees.trees import Tree


class TreeDraft(Policy):
    """The same kind of tree in every round; exactness: see `simulator.trees.trees`, `simulator.trees.dynamic_tree`.

    A placement replays and prices `tree` and does not ask for a draft length. `longest_draft` counts nodes: so many
    KV slots are needed ahead.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._nodes = self.longest_draft = tree.nodes

    def draft_tokens(self, round_: Round) -> Ints:
        """Give the number of nodes for every slot."""
        return np.full(round_.active, self._nodes, dtype=np.int64)
