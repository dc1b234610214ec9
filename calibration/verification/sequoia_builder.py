"""Sequoia's dynamic programme: the tree of a given size that promises the most accepted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.verification.shapes import TreeShape

__all__ = ["TreeTable", "tree_table"]


@dataclass(frozen=True)
class TreeTable:
    """Best expected tokens of a round, bonus included: `best[m, l]` with m nodes in all and depth at most l.

    The root is one of the m nodes here and has depth 1, as in the paper.
    """

    acceptance: NDArray[np.float64]
    by_children: NDArray[np.float64]
    """T[m, l, b]: with exactly b children of the root."""
    left: NDArray[np.float64]
    """y of the best split: the nodes that stay with the first b - 1 children and the root."""

    @property
    def best(self) -> NDArray[np.float64]:
        """max over b of T[m, l, b]; -inf where there is no such tree."""
        return np.asarray(self.by_children.max(axis=2))

    def paths(self, nodes: int, depth: int) -> list[tuple[int, ...]]:
        """Give the paths of ranks of a best tree of `nodes` drafted nodes, at most `depth` deep, root not counted."""
        most, deepest = self.best.shape[0] - 2, self.best.shape[1] - 2
        if not (1 <= nodes <= most and 1 <= depth <= deepest):
            raise CalibrationError(
                f"nodes and depth: must be 1 to {most} and 1 to {deepest}, as the table was made for, got {nodes} "
                f"and {depth}"
            )
        if not np.isfinite(self.best[nodes + 1, depth + 1]):
            raise CalibrationError(f"no tree has {nodes} nodes, depth {depth} and {len(self.acceptance)} ranks")
        paths: list[tuple[int, ...]] = []

        def grow(m: int, level: int, root: tuple[int, ...]) -> None:
            children = int(np.argmax(self.by_children[m, level]))
            while children:
                kept = int(self.left[m, level, children])
                child = (*root, children - 1)
                paths.append(child)
                grow(m - kept, level - 1, child)
                m, children = kept, children - 1

        grow(nodes + 1, depth + 1, ())
        return paths

    def shape(self, nodes: int, depth: int) -> TreeShape:
        """Give a best tree of `nodes` drafted nodes, at most `depth` deep (the root not counted in either)."""
        return TreeShape.from_paths(self.paths(nodes, depth))

    def fastest(self, draft_step_s: float, verify_s: Sequence[float]) -> tuple[int, int]:
        """Give the (nodes, depth), without the root, with the least seconds per token.

        ((l - 1) * draft step + verification of m tokens) / T[m, l]: Sequoia's hardware-aware choice; `verify_s[m]` is
        that of m tokens, root included.
        """
        most, deepest = self.best.shape[0] - 1, self.best.shape[1] - 1
        if len(verify_s) <= most:
            raise CalibrationError(f"verify_s: must reach {most} tokens, got {len(verify_s) - 1}")
        m, level = np.arange(2, most + 1)[:, None], np.arange(2, deepest + 1)[None, :]
        seconds = (level - 1) * draft_step_s + np.asarray(verify_s)[m]
        tokens = self.best[2:, 2:]
        per_token = np.where(np.isfinite(tokens), seconds / np.where(np.isfinite(tokens), tokens, 1.0), np.inf)
        row, column = np.unravel_index(int(np.argmin(per_token)), per_token.shape)
        return int(row) + 1, int(column) + 1


def tree_table(acceptance: Sequence[float], nodes: int, depth: int) -> TreeTable:
    """Run the programme of Sequoia (Chen et al. 2024, arXiv 2402.12374) up to `nodes` nodes and `depth` levels.

    With P[b] the probability that the b-th child is the text's next token, whatever came before,

        T[1, l, 0] = 1,    T[m, l, b] = max_{1 <= y < m} T[y, l, b - 1] + P[b] * max_b' T[m - y, l - 1, b'].

    Exact for that model; real acceptance depends on context, which it leaves out. `acceptance[b]` is P of the
    child of rank b; nodes and depth exclude the root. O(depth * ranks * nodes^2).
    """
    p = np.asarray(acceptance, dtype=np.float64)
    most, deepest, ranks = nodes + 1, depth + 1, min(len(p), nodes)
    table = np.full((most + 1, deepest + 1, ranks + 1), -np.inf)
    left = np.zeros_like(table)
    table[1, 1:, 0] = 1.0
    for level in range(2, deepest + 1):
        below = table[:, level - 1].max(axis=1)
        for children in range(1, ranks + 1):
            worth = np.full(most + 1, -np.inf)  # of a subtree; 0 * -inf is no number
            worth[np.isfinite(below)] = p[children - 1] * below[np.isfinite(below)]
            for m in range(2, most + 1):
                y = np.arange(1, m)
                value = table[y, level, children - 1] + worth[m - y]
                split = int(np.argmax(value))
                table[m, level, children], left[m, level, children] = value[split], y[split]
    return TreeTable(p, table, left)
