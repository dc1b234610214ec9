"""Draft trees: their shapes, which of their nodes lie on the text, and what they cost.

A node is the drafter's child of some rank (0: its first choice) after its parent; the root is the last committed
token and no node. Greedy: a node lies on the text iff, at every depth d of its path, the child's rank equals the rank
of x_{t+d} under the drafter (`emitted_rank`). The deepest such node gives the accepted length, bonus excluded. For a
drafter that sees tokens alone this replays any static tree exactly: every context on such a path is a prefix of the
text. Sampled decoding needs the drafter's whole distributions, which no trace holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.errors import ReplayError, ScenarioError
from simulator.arrays import FloatArray, IntArray
from simulator.playback.recorded import Material
from simulator.pricing.costs import DraftFraction, DraftPerStep, Prices


@dataclass(frozen=True)
class TreeShape:
    """A static tree: for each node its parent (index of an earlier node, -1 for the root) and rank among children."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is not a tree."""
        if not self.parents or len(self.parents) != len(self.ranks):
            raise ScenarioError(
                "stopping.shape: parents and ranks must be equally long, one each for every node, got "
                f"{len(self.parents)} and {len(self.ranks)}"
            )
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ScenarioError(
                    f"stopping.shape.parents: must name -1 or an earlier node, got {parent} at node {node}"
                )
        twice = [edge for edge, number in Counter(zip(self.parents, self.ranks, strict=True)).items() if number > 1]
        if twice:
            raise ScenarioError(
                f"stopping.shape: siblings must have different ranks, got (parent, rank) {twice[0]} twice"
            )

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> TreeShape:
        """Give the tree of nodes named by their paths of ranks; every prefix of a path must be there."""
        ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        if len(ordered) != len(paths):
            raise ScenarioError(f"stopping.shape.paths: must differ, got {len(paths) - len(ordered)} more than once")
        index = {path: node for node, path in enumerate(ordered)}
        for path in ordered:
            if len(path) > 1 and path[:-1] not in index:
                raise ScenarioError(
                    f"stopping.shape.paths: must hold every node's parent; {list(path[:-1])} is missing for "
                    f"{list(path)}"
                )
        return cls(tuple(index.get(path[:-1], -1) for path in ordered), tuple(path[-1] for path in ordered))

    @classmethod
    def chain(cls, depth: int) -> TreeShape:
        """Give one branch."""
        return cls(tuple(range(-1, depth - 1)), (0,) * depth)

    @classmethod
    def k_ary(cls, branching: int, depth: int) -> TreeShape:
        """Give the full tree with `branching` children at every node above `depth`."""
        parents: list[int] = []
        ranks: list[int] = []
        level = [-1]
        for _ in range(depth):
            first = len(parents)
            parents += [parent for parent in level for _ in range(branching)]
            ranks += [rank for _ in level for rank in range(branching)]
            level = list(range(first, len(parents)))
        return cls(tuple(parents), tuple(ranks))

    @property
    def nodes(self) -> int:
        """Nodes, the root left out: the tokens that are verified beside it."""
        return len(self.parents)

    @property
    def depths(self) -> IntArray:
        """Depth of every node; children of the root have 1."""
        depth: list[int] = []
        for parent in self.parents:
            depth.append(1 if parent < 0 else depth[parent] + 1)
        return np.array(depth, dtype=np.int64)

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes that the drafter runs in each draft step: those of depth 0 (the root), 1, .. that have children."""
        with_children = sorted(set(self.parents))
        depths = self.depths
        count = Counter(0 if node < 0 else int(depths[node]) for node in with_children)
        return tuple(count[depth] for depth in range(len(count)))

    def accepted(self, rank: IntArray, lengths: IntArray) -> IntArray:
        """Give the accepted length at every place, from the ranks of the text's tokens, sequence after sequence.

        A rank below 0 stands for a token that the drafter did not rank: no node is it.
        """
        beyond = max(self.ranks) + 1
        child = np.full((self.nodes + 2, beyond + 1), -1, dtype=np.int64)
        child[np.array(self.parents) + 1, np.array(self.ranks)] = np.arange(self.nodes)
        # A gap after each sequence, whose rank no node has, so that no walk goes on into the next one.
        owners = np.repeat(np.arange(len(lengths)), lengths)
        gapped = np.full(len(rank) + len(lengths) + 1, beyond, dtype=np.int64)
        gapped[np.arange(len(rank)) + owners] = np.where((rank < 0) | (rank > beyond), beyond, rank)
        place, node = np.arange(len(rank)) + owners, np.full(len(rank), -1, dtype=np.int64)
        depth, walking = np.zeros(len(rank), dtype=np.int64), np.arange(len(rank))
        while len(walking):
            step = child[node[walking] + 1, gapped[place[walking] + depth[walking]]]
            walking, step = walking[step >= 0], step[step >= 0]
            node[walking] = step
            depth[walking] += 1
        return depth


class Tree:
    """A tree compiled for the sequences served: accepted lengths by recorded place, and prices.

    `nodes` are verified in every round beside the root; `depth` bounds the accepted length; `widths` are the nodes
    that the drafter runs in each of its steps.
    """

    def __init__(self, accepted: IntArray, nodes: int, depth: int, widths: Sequence[int]) -> None:
        self.nodes, self.depth, self.widths = nodes, depth, tuple(widths)
        self._accepted = accepted

    def accepted(self, places: IntArray) -> IntArray:
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


def recorded_ranks(material: Material) -> IntArray:
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


def rank_frequencies(material: Material, ranks: int) -> FloatArray:
    """Give how often the text's next token has rank 0 .. `ranks` - 1 under the drafter, over all recorded places.

    Sequoia's acceptance vector, positional and free of context, under greedy decoding.
    """
    rank = recorded_ranks(material)[material.needed]
    return np.bincount(rank[rank < ranks], minlength=ranks) / len(rank)
