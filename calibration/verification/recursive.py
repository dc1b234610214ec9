"""Recursive rejection: the drafts one after the other, each against what the rejected ones left of the verifier.

Verification of a drafted tree from the root down, by any rule of one position.

An unbiased estimate of recursive rejection without replacement, for where its exact acceptance is out of reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import CalibrationError
from calibration.verification.common import (
    Drafting,
    Drafts,
    Law,
    NextToken,
    RoundLaw,
    RoundVerdict,
    Rule,
    Sampled,
    choice,
    distribution,
    draft_count,
    draft_tokens,
    draw,
    pair,
    residual,
    without,
)
from calibration.verification.gumbel import draw_drafts
from calibration.verification.trees import DraftTree, TreeShape, children_by_rank, draft_tuples, drafting_of

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


MOST_WORK = 30_000_000
"""How many (path of rejected drafts, token) pairs `acceptance` visits without replacement before it refuses."""


@dataclass(frozen=True)
class Recursive(Sampled):
    """Accept x_i with probability min(1, p_i(x_i) / q_i(x_i)), else go on with p_{i+1} = norm([p_i - q_i]+).

    All rejected: emit from p_{k+1}. Lossless. `drafting`:

    - "without_replacement" (default): q_{i+1} = norm(q_i without x_i); the drafts are distinct and stop growing when
      the support of q is exhausted, so that fewer than k may be given. Jeon et al. 2024 (Recursive Speculative
      Decoding), Chen et al. 2024 (Sequoia).
    - "iid": q_i = q. Miao et al. 2024 (SpecInfer, multi-step speculative sampling).

    Replay: exact in distribution from p and q at the target's path (T2): accept y_t with probability
    acceptance_by_token(p, q, k)[y_t] / p[y_t].
    """

    drafting: Drafting = "without_replacement"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a way of drafting for which the rule would be lossy."""
        choice("drafting", self.drafting, ("iid", "without_replacement"), "Recursive")

    def draw(self, q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
        """Draw up to k drafts from q [V]."""
        return draw_drafts(q, k, rng, self.drafting)

    def acceptance(self, p: ArrayLike, q: ArrayLike, k: int) -> float:
        """Give the exact probability that one of k drafts is accepted.

        iid: 1 - prod_i (1 - sum min(p_i, q)), O(V k). Without replacement: k = 1 in O(V), k = 2 in O(V log V);
        beyond, every path of k - 2 rejected drafts is visited, O(V^(k-2) V log V), and what would take over MOST_WORK
        visits is refused: `estimate_acceptance` gives an unbiased estimate there.
        """
        return min(1.0, float(self.acceptance_by_token(p, q, k).sum()))

    def acceptance_by_token(self, p: ArrayLike, q: ArrayLike, k: int) -> Floats:
        """Give [V] the mass accepted via each token, exact; costs as `acceptance`."""
        p, q = pair(p, q, "Recursive.acceptance")
        k = draft_count(k, "Recursive.acceptance")
        if self.drafting == "iid":
            return _accepted_iid(p, q, k)
        paths = float(np.count_nonzero(q > p)) ** max(0, min(k, int(np.count_nonzero(q))) - 2)
        if paths * p.size > MOST_WORK:
            raise CalibrationError(
                f"Recursive.acceptance: V^(k-1) must stay below {MOST_WORK:,} without replacement, got "
                f"{paths:.3g} paths over {p.size} tokens; estimate_acceptance gives an unbiased estimate"
            )
        return accepted_without_replacement(p, q, k)

    def law(self, p: ArrayLike, q: ArrayLike, drafts: Drafts) -> Law:
        """Give the exact consequence for drafts [k] in the order in which they were drawn; O(V k)."""
        p, q = pair(p, q, "Recursive.law")
        replaced = self.drafting == "iid"
        tokens = draft_tokens(drafts, q, "Recursive.law", distinct=not replaced)
        accepted = np.zeros(tokens.size)
        reached = 1.0
        for i, token in enumerate(tokens):
            accepted[i] = reached * min(1.0, p[token] / q[token])
            reached = max(0.0, reached - accepted[i])
            p = residual(p, q)
            if not replaced:
                q = without(q, tokens[i : i + 1])
        return Law(tokens, accepted, p)


def _accepted_iid(p: Floats, q: Floats, k: int) -> Floats:
    """Give [V] sum over i of P(i - 1 rejections) min(p_i, q)."""
    accepted, reached = np.zeros_like(p), 1.0
    for _ in range(k):
        overlap = np.minimum(p, q)
        accepted += reached * overlap
        reached *= max(0.0, 1.0 - float(overlap.sum()))
        p = residual(p, q)
    return accepted


def accepted_without_replacement(p: Floats, q: Floats, k: int) -> Floats:
    """Give [V] the mass accepted via each token by up to k draws from q without replacement.

    Only tokens with q > p can be rejected, x with probability q(x) - p(x); what is left of p does not depend on x.
    """
    accepted = np.minimum(p, q)
    rejected = np.flatnonzero(q > p)
    if k == 1 or rejected.size == 0:
        return accepted
    rest, excess = residual(p, q), q[rejected] - p[rejected]
    if k == 2:
        return accepted + _second(rest, q, rejected, excess)
    for x, mass in zip(rejected.tolist(), excess.tolist(), strict=True):
        left = without(q, np.array([x]))
        if left.any():
            accepted += mass * accepted_without_replacement(rest, left, k - 1)
    return accepted


def _second(rest: Floats, q: Floats, rejected: Ints, excess: Floats) -> Floats:
    """Give [V] sum over rejected x of excess(x) min(rest, q / (1 - q(x))), by sorting 1 / (1 - q(x)).

    No care is needed for the token x itself: rest is 0 wherever something can be rejected.
    """
    others = q.sum() - q[rejected]
    largest = int(np.argmax(q[rejected]))
    others[largest] = np.delete(q, rejected[largest]).sum()
    kept = others > 0
    scale, mass = 1.0 / others[kept], excess[kept]
    order = np.argsort(scale)
    scale, mass = scale[order], mass[order]
    below = np.concatenate([[0.0], np.cumsum(mass * scale)])
    above = np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]])
    drafted = (q > 0) & (rest > 0)
    accepted = np.zeros_like(q)
    limit = np.searchsorted(scale, rest[drafted] / q[drafted])
    accepted[drafted] = q[drafted] * below[limit] + rest[drafted] * above[limit]
    return accepted


@dataclass(frozen=True, eq=False)
class AcceptanceEstimate:
    """A mean over random paths of rejected drafts: the acceptance, its standard error, and the mass by token [V]."""

    mean: float
    standard_error: float
    by_token: Floats
    draws: int


def estimate_acceptance(
    p: ArrayLike, q: ArrayLike, k: int, draws: int, rng: np.random.Generator
) -> AcceptanceEstimate:
    """Estimate how often `Recursive("without_replacement")` accepts one of k drafts; unbiased, also for each token.

    Each of `draws` >= 2 paths draws the first k - 2 drafts as they are rejected, weighted by the exact chance of it,
    and ends with the exact acceptance of the last two: the mean varies only with which drafts were rejected first.
    With k <= 2 it is exact. O(V k + V log V) a path.
    """
    p, q = pair(p, q, "estimate_acceptance")
    k = draft_count(k, "estimate_acceptance")
    if draft_count(draws, "estimate_acceptance: draws") < 2:
        raise CalibrationError(f"estimate_acceptance: draws must be >= 2, got {draws}")
    values, by_token = np.empty(draws), np.zeros_like(p)
    for i in range(draws):
        accepted = _one_path(p, q, k, rng)
        values[i] = accepted.sum()
        by_token += accepted / draws
    return AcceptanceEstimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(draws)), by_token, draws)


def _one_path(p: Floats, q: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Give [V] the mass accepted via each token along one random path of rejected drafts."""
    accepted, reached = np.zeros_like(p), 1.0
    while k > 2:
        accepted += reached * np.minimum(p, q)
        excess = np.maximum(q - p, 0.0)
        rejection = float(excess.sum())
        if rejection == 0.0:
            return accepted
        rejected = draw(excess, rng)
        reached *= rejection
        p, q, k = residual(p, q), without(q, np.array([rejected])), k - 1
        if not q.any():
            return accepted
    return accepted + reached * accepted_without_replacement(p, q, k)
