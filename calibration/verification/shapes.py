"""The shape of a draft tree: parents and ranks, without tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError

__all__ = ["TreeShape"]


@dataclass(frozen=True)
class TreeShape:
    """A static tree: for each node its parent (index of an earlier node, -1 for the root) and rank among children.

    The root is the last committed token and no node. Rank 0 is the drafter's first choice after the parent.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is not a tree."""
        if not self.parents or len(self.parents) != len(self.ranks):
            raise CalibrationError(
                "parents and ranks: must be equally long, one each for every node, got "
                f"{len(self.parents)} and {len(self.ranks)}"
            )
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise CalibrationError(f"parents: must name -1 or an earlier node, got {parent} at node {node}")
        twice = [edge for edge, number in Counter(zip(self.parents, self.ranks, strict=True)).items() if number > 1]
        if twice:
            raise CalibrationError(f"ranks: siblings must have different ranks, got (parent, rank) {twice[0]} twice")

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> Self:
        """Give the tree of nodes named by their paths of ranks; every prefix of a path must be there."""
        ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        if len(ordered) != len(paths):
            raise CalibrationError(f"paths: must differ, got {len(paths) - len(ordered)} more than once")
        index = {path: node for node, path in enumerate(ordered)}
        for path in ordered:
            if len(path) > 1 and path[:-1] not in index:
                raise CalibrationError(
                    f"paths: must hold every node's parent; {list(path[:-1])} is missing for {list(path)}"
                )
        return cls(tuple(index.get(path[:-1], -1) for path in ordered), tuple(path[-1] for path in ordered))

    @classmethod
    def chain(cls, depth: int) -> Self:
        """Give one branch."""
        return cls(tuple(range(-1, depth - 1)), (0,) * depth)

    @classmethod
    def k_ary(cls, branching: int, depth: int) -> Self:
        """Give the full tree with `branching` children at every node above `depth`."""
        return cls.constant_branching((branching,) * depth)

    @classmethod
    def constant_branching(cls, factors: Sequence[int]) -> Self:
        """Give the full tree whose nodes of depth d all have `factors[d]` children (the root has depth 0).

        The shape of RSD-C (Jeon et al. 2024, arXiv 2402.14160), whose children are drawn without replacement.
        """
        parents: list[int] = []
        ranks: list[int] = []
        level = [-1]
        for branching in factors:
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
    def depths(self) -> NDArray[np.int64]:
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

    def expected_tokens(self, acceptance: Sequence[float]) -> float:
        """Give the expected tokens of a round, bonus included, if a child of rank r is the text with `acceptance[r]`.

        One and the sum over nodes of the products along their paths; ranks beyond `acceptance` are never the text.
        Exact where acceptance depends on rank alone and siblings exclude each other.
        """
        product: list[float] = []
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            share = float(acceptance[rank]) if rank < len(acceptance) else 0.0
            product.append(share * (1.0 if parent < 0 else product[parent]))
        return 1.0 + float(np.sum(product))

    def accepted(self, rank: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the accepted length at every place, from the ranks of the text's tokens, sequence after sequence.

        `rank` holds the sequences one behind the other, `lengths` how long each is. A rank below 0 stands for a token
        that the drafter did not rank: no node is it. Bonus excluded. Exact for greedy verification.
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
