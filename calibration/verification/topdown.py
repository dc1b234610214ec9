"""Verification of a drafted tree from the root down, by any rule of one position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calibration.verification.common import Rule, distribution, draw
from calibration.verification.drafting import children_by_rank, draft_tuples, drafting_of
from calibration.verification.rounds import NextToken, RoundLaw, RoundVerdict
from calibration.verification.shapes import TreeShape
from calibration.verification.trees import DraftTree

__all__ = ["TopDown"]


@dataclass(frozen=True)
class TopDown:
    """Verification of a tree from the root down: at each node `rule` accepts one of its children or ends the round.

    As lossless as the rule, if the children are drafted the way the rule asks for and without regard to what was
    drafted below them. The expected accepted length is the sum over nodes of the products of acceptances along their
    paths. Miao et al. 2024 (SpecInfer); Jeon et al. 2024 (RSD).
    """

    rule: Rule

    @property
    def lossless(self) -> bool:
        """Whether the emitted text is distributed as the verifier's."""
        return type(self.rule).lossless

    def law(self, tree: DraftTree) -> RoundLaw:
        """Give the exact consequence for this tree. The rule's cost per node; [n + 1, V] floats."""
        return law_from_the_root(tree, lambda depth: self.rule)

    def verify(self, tree: DraftTree, rng: np.random.Generator) -> RoundVerdict:
        """Accept a path of the tree and emit one token more. The rule's cost per node of that path."""
        return verify_from_the_root(tree, lambda depth: self.rule, rng)

    def expected_accepted(self, shape: TreeShape, target: NextToken, drafter: NextToken) -> float:
        """Give E[tau] over trees of this shape, children drafted the way the rule asks for. Exact, bonus excluded.

        Every tuple of drafts at every node is visited, V^k of them for k children at V^depth prefixes: small
        vocabularies only.
        """
        children, drafting = children_by_rank(shape), drafting_of(self.rule)

        def below(row: int, prefix: tuple[int, ...]) -> float:
            if not children[row]:
                return 0.0
            p, q, total = target(prefix), drafter(prefix), 0.0
            worth: dict[tuple[int, int], float] = {}
            for drafts, weight in draft_tuples(q, len(children[row]), drafting):
                accepted = self.rule.law(p, q, drafts).accepted
                for node, token, share in zip(children[row], drafts, accepted, strict=False):
                    if share > 0.0:
                        if (node, token) not in worth:
                            worth[node, token] = 1.0 + below(node + 1, (*prefix, token))
                        total += weight * float(share) * worth[node, token]
            return total

        return below(0, ())


def law_from_the_root(tree: DraftTree, rule_at: Callable[[int], Rule]) -> RoundLaw:
    """Give the exact consequence for a tree whose children of nodes of depth d are judged by `rule_at(d)`."""
    prefixes = tree.prefixes
    ends, corrections = np.zeros(tree.nodes + 1), np.zeros(tree.p.shape)
    reached = np.zeros(tree.nodes + 1)
    reached[0] = 1.0
    for row, drawn in enumerate(tree.draws):
        if reached[row] == 0.0:
            continue
        if not drawn:
            ends[row], corrections[row] = reached[row], distribution("p", tree.p[row], "law of a tree")
            continue
        law = rule_at(len(prefixes[row])).law(tree.p[row], tree.q[row], tree.tokens[list(drawn)])
        np.add.at(reached, np.array(drawn) + 1, reached[row] * law.accepted)
        ends[row] = reached[row] * max(0.0, 1.0 - law.acceptance)
        if ends[row] > 0.0:
            corrections[row] = law.correction
    return RoundLaw(prefixes, ends, corrections)


def verify_from_the_root(tree: DraftTree, rule_at: Callable[[int], Rule], rng: np.random.Generator) -> RoundVerdict:
    """Accept a path of a tree whose children of nodes of depth d are judged by `rule_at(d)`; one token follows."""
    accepted: list[int] = []
    row = 0
    while drawn := tree.draws[row]:
        verdict = rule_at(len(accepted)).verify(tree.p[row], tree.q[row], tree.tokens[list(drawn)], rng)
        if verdict.accepted_index is None:
            return RoundVerdict(tuple(accepted), verdict.token)
        accepted.append(verdict.token)
        row = drawn[verdict.accepted_index] + 1
    return RoundVerdict(tuple(accepted), draw(distribution("p", tree.p[row], "verification of a tree"), rng))
