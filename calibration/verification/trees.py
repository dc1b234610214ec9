"""A drafted tree with what both models say after each of its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.common.arrays import Ints
from calibration.common.errors import CalibrationError
from calibration.verification.rounds import NextToken

__all__ = ["DraftTree"]


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A drafted tree of n nodes and what both models say after each of them.

    `tokens` [n]; `parents` [n], the index of an earlier node, -1 for the root (the last committed token, no node);
    `p` and `q` [n + 1, V], row 0 after the root, row i + 1 after node i. Rows of q are read only where a node has
    children. `draws[r]` are the nodes drafted after row r, in the order drawn. Left out, every child was drawn once,
    in the order of the nodes. A node named twice was drawn twice and verified once (a merged trie); the same token
    drawn twice may as well be two siblings with a subtree each.
    """

    tokens: Ints
    parents: Ints
    p: NDArray[np.floating[Any]]
    q: NDArray[np.floating[Any]]
    draws: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        """Check what cannot be a tree and fill in the draws."""
        for name in ("tokens", "parents", "p", "q"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        n = self.tokens.size
        if self.tokens.shape != self.parents.shape or self.tokens.ndim != 1 or n == 0:
            raise CalibrationError(
                f"DraftTree: tokens and parents must be [n], n >= 1, got shapes {self.tokens.shape} and "
                f"{self.parents.shape}"
            )
        if self.p.ndim != 2 or self.p.shape != self.q.shape or len(self.p) != n + 1:
            raise CalibrationError(
                f"DraftTree: p and q must be [n + 1, V] for n = {n} nodes, got shapes {self.p.shape} and "
                f"{self.q.shape}"
            )
        for node, (token, parent) in enumerate(zip(self.tokens.tolist(), self.parents.tolist(), strict=True)):
            if not -1 <= parent < node:
                raise CalibrationError(f"DraftTree: parents must name -1 or an earlier node, got {parent} at {node}")
            if not 0 <= token < self.p.shape[1]:
                raise CalibrationError(
                    f"DraftTree: tokens must lie in a vocabulary of {self.p.shape[1]}, got {token} at node {node}"
                )
        children = [tuple(np.flatnonzero(self.parents == row - 1).tolist()) for row in range(n + 1)]
        if not self.draws:
            object.__setattr__(self, "draws", tuple(children))
        elif [sorted(set(drawn)) for drawn in self.draws] != [list(nodes) for nodes in children]:
            raise CalibrationError("DraftTree: draws must name, for every row, each child of it and nothing else")

    @classmethod
    def chain(cls, drafts: Sequence[int], p: ArrayLike, q: ArrayLike) -> DraftTree:
        """Give the tree of one branch: p [gamma + 1, V], q [gamma, V], as rules over chains take them."""
        rows = np.asarray(q)
        return cls(np.asarray(drafts), np.arange(-1, len(drafts) - 1), np.asarray(p), np.vstack([rows, 0 * rows[:1]]))

    @classmethod
    def of_models(
        cls,
        tokens: Sequence[int],
        parents: Sequence[int],
        target: NextToken,
        drafter: NextToken,
        draws: tuple[tuple[int, ...], ...] = (),
    ) -> DraftTree:
        """Give the tree with its rows asked of both models, the drafter where a node has children."""
        prefixes = _prefixes(tokens, parents)
        p = np.array([target(prefix) for prefix in prefixes])
        inner = {parent + 1 for parent in parents}
        q = np.zeros_like(p)
        for row in sorted(inner):
            q[row] = drafter(prefixes[row])
        return cls(np.array(tokens), np.array(parents), p, q, draws)

    @property
    def nodes(self) -> int:
        """Nodes, the root left out: the tokens that are verified beside it."""
        return int(self.tokens.size)

    @property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The drafts on the path to every row, [n + 1]; the root's is empty."""
        return _prefixes(self.tokens.tolist(), self.parents.tolist())


def _prefixes(tokens: Sequence[int], parents: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    prefixes: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        prefixes.append((*prefixes[parent + 1], int(token)))
    return tuple(prefixes)
