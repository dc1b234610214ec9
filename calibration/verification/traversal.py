"""Traversal verification: a tree judged from its leaves to its root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from calibration.common.arrays import Floats
from calibration.common.errors import CalibrationError
from calibration.verification.common import (
    Drafting,
    NextToken,
    RoundLaw,
    RoundVerdict,
    distribution,
    draft_tokens,
    draw,
    without,
)
from calibration.verification.trees import DraftTree, TreeShape, enumerate_trees

__all__ = ["Traversal"]


@dataclass(frozen=True)
class Traversal:
    """Traversal verification (Weng et al. 2025, arXiv 2505.12398): block verification's idea carried to trees.

    Every node keeps a target distribution b, a draft distribution s and a mass a; a = 1 at the root, and a child c
    has a_c = min(1, a b(c) / s(c)), read at its parent. The leftmost leaf is accepted with its a: the path to it and
    a token from its b are emitted. Otherwise it is struck out and its parent becomes

        r = [a b - s]+,    b = r / |r|,    a = |r| / (|r| + 1 - a),

    s losing the leaf's token if children were drawn without replacement; then the next leaf is tried, last the root,
    which accepts. Equals block verification on chains and recursive rejection on trees of depth 1. The form is our
    reading of the paper; it is checked by enumeration.

    `without_replacement` says how siblings were drawn: independently (False), or in order without replacement.
    """

    without_replacement: bool = False
    lossless: ClassVar[bool] = True

    def law(self, tree: DraftTree) -> RoundLaw:
        """Give the exact consequence for this tree. O(V) per node; [n + 1, V] floats."""
        ends, corrections = np.zeros(tree.nodes + 1), np.zeros(tree.p.shape)
        left = 1.0
        for row, accept, b in _States(tree, self.without_replacement, "Traversal.law").leaves():
            ends[row] = left * accept
            if accept > 0.0:
                corrections[row] = b
            left *= 1.0 - accept
            if left <= 0.0:
                break
        return RoundLaw(tree.prefixes, ends, corrections)

    def expected_accepted(self, shape: TreeShape, target: NextToken, drafter: NextToken) -> float:
        """Give E[tau] over trees of this shape, drafted from the drafter. Exact, bonus excluded.

        The mean of `law` over all trees, up to V^n for n nodes: small vocabularies and trees only.
        """
        drafting: Drafting = "without_replacement" if self.without_replacement else "iid"
        return sum(
            weight * self.law(tree).expected_accepted
            for tree, weight in enumerate_trees(shape, target, drafter, drafting)
        )

    def verify(self, tree: DraftTree, rng: np.random.Generator) -> RoundVerdict:
        """Accept a path of the tree and emit one token more. O(V) per leaf tried."""
        states = _States(tree, self.without_replacement, "Traversal.verify")
        row, b = next((row, b) for row, accept, b in states.leaves() if rng.random() < accept)
        return RoundVerdict(tree.prefixes[row], draw(b, rng))


@dataclass(eq=False)
class _States:
    """b, s and a of every row of a tree, while leaves are struck out; b and s are read when first asked for."""

    tree: DraftTree
    without_replacement: bool
    where: str
    a: Floats = field(init=False)
    live: list[list[int]] = field(init=False)
    b: dict[int, Floats] = field(default_factory=dict)
    s: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin at the drafted tree."""
        self.live = [list(drawn) for drawn in self.tree.draws]
        for drawn in self.live:
            tokens = self.tree.tokens[drawn]
            if len(set(drawn)) < len(drawn):
                raise CalibrationError(
                    f"{self.where}: draws must name every child once, got {drawn}; a merged trie is verified top-down"
                )
            if self.without_replacement and len(set(tokens.tolist())) < len(drawn):
                raise CalibrationError(
                    f"{self.where}: siblings drawn without replacement must differ, got tokens {tokens.tolist()}"
                )
        self.a = np.ones(self.tree.nodes + 1)
        self._refresh(0)

    def leaves(self) -> Iterator[tuple[int, float, Floats]]:
        """Give (row, probability of accepting it once asked, distribution of the token after it), root last."""
        row = self._leftmost(0)
        while row:
            yield row, float(self.a[row]), self._target(row)
            parent = int(self.tree.parents[row - 1]) + 1
            self._strike(row, parent)
            row = self._leftmost(parent)
        yield 0, 1.0, self._target(0)

    def _strike(self, row: int, parent: int) -> None:
        """Strike out a rejected leaf: its parent's b, a and s change, and with them the a of all nodes below."""
        b, s, a = self._target(parent), self._draft(parent), self.a[parent]
        rest = np.maximum(a * b - s, 0.0)
        mass = float(rest.sum())
        if mass > 0.0:
            self.b[parent] = rest / mass
        unclaimed = mass + (1.0 - a)
        self.a[parent] = mass / unclaimed if unclaimed > 0.0 else 1.0
        self.live[parent].remove(row - 1)
        if self.live[parent]:
            if self.without_replacement:
                self.s[parent] = without(s, self.tree.tokens[row - 1 : row])
            self._refresh(parent)

    def _refresh(self, top: int) -> None:
        """Compute the a of all live nodes below a row."""
        rows = [top]
        while rows:
            row = rows.pop()
            for node in self.live[row]:
                token = self.tree.tokens[node]
                ratio = self.a[row] * self._target(row)[token] / self._draft(row)[token]
                self.a[node + 1] = min(1.0, float(ratio))
                rows.append(node + 1)

    def _leftmost(self, row: int) -> int:
        """Give the row of the first leaf at or below a row."""
        while self.live[row]:
            row = self.live[row][0] + 1
        return row

    def _target(self, row: int) -> Floats:
        if row not in self.b:
            self.b[row] = distribution("p", self.tree.p[row], self.where)
        return self.b[row]

    def _draft(self, row: int) -> Floats:
        if row not in self.s:
            self.s[row] = distribution("q", self.tree.q[row], self.where)
            draft_tokens(self.tree.tokens[list(self.tree.draws[row])], self.s[row], self.where)
        return self.s[row]
