"""Trees of tokens grown layer by layer from a drafter's probabilities: OPT-Tree's and EAGLE-2's common ground."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.verification.gumbel import top_k
from calibration.verification.rounds import NextToken
from calibration.verification.shapes import TreeShape

__all__ = ["GrownTree", "Layer", "grow_layers", "keep_best"]


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
