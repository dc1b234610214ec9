"""A drafted tree with what both models say after each of its nodes.

The shape of a draft tree: parents and ranks, without tokens.

Drafting a tree of a given shape: one at random, or all of them with their probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError
from calibration.verification.common import Drafting, NextToken, Rule, distribution, without
from calibration.verification.gumbel import split_top, top_k

__all__ = ["DraftTree", "TreeShape", "draft_tuples", "draw_tree", "enumerate_trees"]


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
