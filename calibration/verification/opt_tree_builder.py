"""OPT-Tree: the tree of n tokens with the largest sum of draft path products."""

from __future__ import annotations

from calibration.verification.grown_builder import GrownTree, Layer, grow_layers, keep_best
from calibration.verification.rounds import NextToken

__all__ = ["opt_tree"]


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
