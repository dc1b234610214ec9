"""EAGLE-2's dynamic tree: a beam by path product, then the best of all candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.verification.grown_builder import GrownTree, grow_layers, keep_best
from calibration.verification.rounds import NextToken

__all__ = ["eagle_bars", "eagle_candidates", "eagle_tree"]


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
