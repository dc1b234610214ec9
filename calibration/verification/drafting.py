"""Drafting a tree of a given shape: one at random, or all of them with their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.verification.common import Drafting, Rule, distribution, without
from calibration.verification.gumbel import split_top, top_k
from calibration.verification.rounds import NextToken
from calibration.verification.trees import DraftTree, TreeShape

__all__ = ["draft_tuples", "draw_tree", "enumerate_trees"]


def draft_tuples(q: ArrayLike, k: int, drafting: Drafting) -> Iterator[tuple[tuple[int, ...], float]]:
    """Give every ordered tuple of k drafts from q [V] with its probability; those of probability 0 are left out.

    Up to V^k of them. Distinct drafts that outgrow the support of q make shorter tuples.
    """
    checked = distribution("q", q, "draft_tuples")
    if drafting == "top":
        yield tuple(top_k(checked, k).tolist()), 1.0
    elif drafting == "iid":
        for drafts in product(np.flatnonzero(checked).tolist(), repeat=k):
            yield drafts, float(np.prod(checked[list(drafts)]))
    elif drafting == "greedy":
        surest, others = split_top(checked, k)
        for last, weight in _ordered(others, 1):
            yield (*surest.tolist(), *last), weight
    else:
        yield from _ordered(checked, k)


def _ordered(q: Floats, k: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Give the tuples of draws without replacement; q all zeros: nothing is left to draw."""
    if k == 0 or not q.any():
        yield (), 1.0
        return
    for token in np.flatnonzero(q):
        for later, weight in _ordered(without(q, np.array([token])), k - 1):
            yield (int(token), *later), float(q[token]) * weight


def draw_tree(
    shape: TreeShape,
    target: NextToken,
    drafter: NextToken,
    draw: Callable[[ArrayLike, int, np.random.Generator], Ints],
    rng: np.random.Generator,
) -> DraftTree:
    """Draft a tree: at every node `draw(q, k, rng)` its k children, as `rule.draw` does; `k` by the shape.

    The child of rank r is the r-th drawn. Fewer draws than k (distinct ones of a small support) leave out the last
    children with all that is below them.
    """
    children = children_by_rank(shape)
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for row, nodes in enumerate(children):
        if nodes and row in paths:
            paths |= _below(paths[row], nodes, draw(drafter(paths[row]), len(nodes), rng).tolist())
    return _assembled(shape, children, paths, target, drafter)


def enumerate_trees(
    shape: TreeShape, target: NextToken, drafter: NextToken, drafting: Drafting
) -> Iterator[tuple[DraftTree, float]]:
    """Give every tree of this shape with its probability: up to V^n for n nodes, small vocabularies only."""
    children = children_by_rank(shape)
    inner = [row for row, nodes in enumerate(children) if nodes]

    def extend(done: int, paths: dict[int, tuple[int, ...]], weight: float) -> Iterator[tuple[DraftTree, float]]:
        while done < len(inner) and inner[done] not in paths:
            done += 1
        if done == len(inner):
            yield _assembled(shape, children, paths, target, drafter), weight
            return
        path, nodes = paths[inner[done]], children[inner[done]]
        for drafts, share in draft_tuples(drafter(path), len(nodes), drafting):
            yield from extend(done + 1, paths | _below(path, nodes, drafts), weight * share)

    return extend(0, {0: ()}, 1.0)


def drafting_of(rule: Rule) -> Drafting:
    """Give how a rule's drafts are drawn: as it says, independently where it leaves no choice."""
    drafting: Drafting = getattr(rule, "drafting", "iid")
    return drafting


def children_by_rank(shape: TreeShape) -> list[list[int]]:
    """Give the children of every row (0: the root; i + 1: node i), lowest rank first."""
    children: list[list[int]] = [[] for _ in range(shape.nodes + 1)]
    for node in sorted(range(shape.nodes), key=lambda node: shape.ranks[node]):
        children[shape.parents[node] + 1].append(node)
    return children


def _below(path: tuple[int, ...], nodes: Sequence[int], drafts: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Give the paths to the rows of those children that were drafted."""
    return {node + 1: (*path, token) for node, token in zip(nodes, drafts, strict=False)}


def _assembled(
    shape: TreeShape,
    children: list[list[int]],
    paths: dict[int, tuple[int, ...]],
    target: NextToken,
    drafter: NextToken,
) -> DraftTree:
    """Give the tree of the nodes that were drafted, renumbered without gaps."""
    kept = sorted(row - 1 for row in paths if row)
    index = {node: i for i, node in enumerate([-1, *kept], start=-1)}
    draws = tuple(tuple(index[child] for child in children[node + 1] if child in index) for node in index)
    parents = [index[shape.parents[node]] for node in kept]
    return DraftTree.of_models([paths[node + 1][-1] for node in kept], parents, target, drafter, draws)
