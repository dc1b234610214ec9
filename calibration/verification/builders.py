"""Builders of draft trees, from a drafter's probabilities.

- `opt_tree` (OPT-Tree): the tree of n tokens with the largest sum of draft path products, grown layer by layer.
- `eagle_tree` (EAGLE-2's dynamic tree): a beam by path product, then the best of all candidates.
- `tree_table` (Sequoia): by dynamic programming, the tree of a given size that promises the most accepted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.verification.common import NextToken
from calibration.verification.gumbel import top_k
from calibration.verification.trees import TreeShape

__all__ = [
    "TreeTable",
    "eagle_bars",
    "eagle_candidates",
    "eagle_tree",
    "opt_tree",
    "tree_table",
]


@dataclass(frozen=True)
class GrownTree:
    """A deterministic draft tree: tokens, parents (-1: the root) and the drafter's products along the paths.

    Nodes are sorted by depth, siblings by falling probability.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    products: NDArray[np.float64]
    """Product of the drafter's probabilities from the root to each node, (nodes,)."""

    @property
    def expected_tokens(self) -> float:
        """Expected tokens of a round, bonus included, if the drafter's probabilities were the verifier's.

        One and the sum of `products`. With the verifier's products instead it is exact for naive verification.
        """
        return 1.0 + float(self.products.sum())

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """Tokens from the root to each node, that node included."""
        paths: list[tuple[int, ...]] = []
        for parent, token in zip(self.parents, self.tokens, strict=True):
            paths.append((*(() if parent < 0 else paths[parent]), token))
        return paths

    @property
    def shape(self) -> TreeShape:
        """The tree without its tokens; ranks count the siblings that were kept."""
        seen: dict[int, int] = {}
        ranks: list[int] = []
        for parent in self.parents:
            ranks.append(seen.get(parent, 0))
            seen[parent] = ranks[-1] + 1
        return TreeShape(self.parents, tuple(ranks))


@dataclass(frozen=True)
class Layer:
    """Candidates of one depth, in the order of their parents and then of falling probability."""

    prefixes: list[tuple[int, ...]]
    products: NDArray[np.float64]


def grow_layers(drafter: NextToken, width: int, depth: int) -> Iterator[Layer]:
    """Give `depth` layers: the `width` likeliest children of each of the `width` best nodes of the layer before.

    A node's worth is its path product. Only tokens of positive probability become nodes, so that a layer may be
    smaller.
    """
    if width < 1 or depth < 1:
        raise CalibrationError(f"width and depth: must be at least 1, got {width} and {depth}")
    layer = Layer([()], np.ones(1))
    for _ in range(depth):
        prefixes: list[tuple[int, ...]] = []
        products: list[float] = []
        for node in np.argsort(-layer.products, kind="stable")[:width]:
            row = drafter(layer.prefixes[node])
            for token in top_k(row, width).tolist():
                prefixes.append((*layer.prefixes[node], token))
                products.append(float(layer.products[node] * row[token]))
        layer = Layer(prefixes, np.array(products))
        yield layer


def keep_best(layers: Sequence[Layer], nodes: int) -> GrownTree:
    """Give the tree of the `nodes` candidates with the largest path products, of all layers.

    A parent's product is at least its child's and ties go to the earlier layer, so that parents are kept with their
    children.
    """
    products = np.concatenate([layer.products for layer in layers])
    prefixes = [prefix for layer in layers for prefix in layer.prefixes]
    if nodes < 1:
        raise CalibrationError(f"nodes: must be at least 1, got {nodes}")
    kept = np.sort(np.argsort(-products, kind="stable")[:nodes])
    index = {prefixes[candidate]: node for node, candidate in enumerate(kept)}
    parents = tuple(index.get(prefixes[candidate][:-1], -1) for candidate in kept)
    return GrownTree(parents, tuple(prefixes[candidate][-1] for candidate in kept), products[kept])


def eagle_candidates(depth: int, top_k: int) -> int:
    """Give how many candidates EAGLE-2's expansion has: top_k, and top_k^2 for every level after the first."""
    return top_k + (depth - 1) * top_k**2


def eagle_tree(drafter: NextToken, total_tokens: int, depth: int, top_k: int) -> GrownTree:
    """Give EAGLE-2's dynamic tree of `total_tokens` nodes (Li et al. 2024, arXiv 2406.16858).

    Each of the `top_k` best nodes of a level, by the product of draft probabilities along its path, gets its `top_k`
    likeliest children, `depth` levels deep; the `total_tokens` best of all candidates are kept. `depth` counts levels
    of nodes: released code that names the levels after the first calls it one less. The tree is
    as good as the drafter's probabilities are those of acceptance; `GrownTree.expected_tokens` takes them for that.
    """
    if total_tokens > eagle_candidates(depth, top_k):
        raise CalibrationError(
            f"total_tokens: must be at most {eagle_candidates(depth, top_k)}, as many nodes as top_k and depth give, "
            f"got {total_tokens}"
        )
    return keep_best(list(grow_layers(drafter, top_k, depth)), total_tokens)


def eagle_bars(
    levels: NDArray[np.float64], total_tokens: int, top_k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the least path product that is kept (places,) and that is expanded at each level (places, depth).

    The same selection as `eagle_tree`, for many places at once, where all nodes of one level have the same children's
    probabilities `levels` (places, depth, top_k), falling along the last axis.
    """
    depth = levels.shape[1]
    beam = levels[:, 0]
    everyone, expanded = [beam], np.zeros(levels.shape[:2])
    for level in range(depth):
        if level:
            nodes = (beam[:, :, None] * levels[:, level, None, :]).reshape(len(levels), -1)
            everyone.append(nodes)
            beam = -np.partition(-nodes, top_k - 1, axis=1)[:, :top_k]
        expanded[:, level] = beam.min(axis=1)
    candidates = np.concatenate(everyone, axis=1)
    kept = -np.partition(-candidates, total_tokens - 1, axis=1)[:, total_tokens - 1]
    return kept, expanded


def opt_tree(drafter: NextToken, nodes: int, depth: int, threshold: float = 0.0) -> GrownTree:
    """Give OPT-Tree's tree of `nodes` drafted tokens (Wang et al. 2024, arXiv 2406.17276).

    Layer by layer: the `nodes` best nodes of a layer are expanded, and the best `nodes` of all candidates so far
    would be the tree. Drafting goes on to at most `depth` layers while a layer adds more than `threshold` to the
    tree's sum of path products, the estimate of its accepted length. With `threshold` 0 the result is exact: no tree
    of that many nodes and that depth has a larger sum.

    `drafter` gives the probabilities of the token that follows a prefix. Fewer nodes come back where the drafter
    gives fewer candidates.
    """
    layers: list[Layer] = []
    tree: GrownTree | None = None
    for layer in grow_layers(drafter, nodes, depth):
        layers.append(layer)
        grown = keep_best(layers, nodes)
        if tree is not None and grown.products.sum() - tree.products.sum() <= threshold:
            return tree
        tree = grown
    assert tree is not None  # the first layer has a candidate: probabilities sum to one
    return tree


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
