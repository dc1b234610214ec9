"""Delayed tree expansion: one trunk, then several independent branches from its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.common.errors import CalibrationError
from calibration.verification.chains import TokenLevel
from calibration.verification.common import NextToken, RoundLaw, RoundVerdict, Rule
from calibration.verification.gumbel import draw_iid
from calibration.verification.recursive import law_from_the_root, verify_from_the_root
from calibration.verification.trees import DraftTree, draft_tuples, drafting_of

__all__ = ["DelayedAction", "DelayedExpansion", "best_action", "draw_delayed_tree", "merge_branches"]


@dataclass(frozen=True, order=True)
class DelayedAction:
    """What to draft: a trunk of L1 = `trunk` tokens, then K = `branches` of L2 = `length` tokens from its end."""

    branches: int
    trunk: int
    length: int

    def __post_init__(self) -> None:
        """Refuse what drafts nothing."""
        if self.branches < 1 or self.trunk < 0 or self.length < 0 or self.trunk + self.length == 0:
            raise CalibrationError(
                "DelayedAction: must have branches >= 1, trunk and length >= 0 and draft a token, got "
                f"branches={self.branches}, trunk={self.trunk}, length={self.length}"
            )

    @property
    def most_nodes(self) -> int:
        """Nodes of the tree if no two branches share one."""
        return self.trunk + self.branches * self.length

    @property
    def draft_steps(self) -> int:
        """Steps of the drafter, all branches drafted side by side."""
        return self.trunk + self.length


def merge_branches(
    trunk: Sequence[int], branches: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Give (tokens, parents, draws) of the trie of a trunk and of branches from its end, as `DraftTree` takes them.

    Equal prefixes become one node; `draws` still holds one entry for every branch that passes a node, in the order of
    the branches: the number of live paths there.
    """
    tokens, parents = list(trunk), list(range(-1, len(trunk) - 1))
    draws: list[list[int]] = [[node] for node in range(len(trunk))] + [[]]
    index: dict[tuple[int, int], int] = {}
    for branch in branches:
        node = len(trunk) - 1
        for token in branch:
            if (node, token) not in index:
                index[node, token] = len(tokens)
                tokens.append(int(token))
                parents.append(node)
                draws.append([])
            draws[node + 1].append(index[node, token])
            node = index[node, token]
    return tuple(tokens), tuple(parents), tuple(map(tuple, draws))


def draw_delayed_tree(
    action: DelayedAction, target: NextToken, drafter: NextToken, rng: np.random.Generator
) -> DraftTree:
    """Draft a delayed tree, every branch independent of the others given the trunk, and merge it."""
    trunk = _rollout((), action.trunk, drafter, rng)
    branches = [_rollout(trunk, action.length, drafter, rng) for _ in range(action.branches)]
    tokens, parents, draws = merge_branches(trunk, branches)
    return DraftTree.of_models(tokens, parents, target, drafter, draws)


def _rollout(prefix: tuple[int, ...], length: int, drafter: NextToken, rng: np.random.Generator) -> tuple[int, ...]:
    path = prefix
    for _ in range(length):
        path = (*path, int(draw_iid(drafter(path), 1, rng)[0]))
    return path[len(prefix) :]


@dataclass(frozen=True)
class DelayedExpansion:
    """Verification of a delayed tree (arXiv 2602.16994): token by token along the trunk, then by `rule`.

    At each merged node `rule` judges as many drafts as paths are still live there. Lossless for a rule whose drafts
    are drawn independently ("iid"): given its prefix, every live path's next token is an independent draw from q.

    `rule` is one of `Naive("iid")`, `Recursive("iid")`, `KSequential()` or another of independent drafts; `trunk` is
    the trunk's length L1.
    """

    rule: Rule
    trunk: int

    def __post_init__(self) -> None:
        """Refuse a rule for other drafts."""
        if drafting_of(self.rule) != "iid":
            raise CalibrationError(
                f"DelayedExpansion: rule must verify independent drafts, got {self.rule!r} for drafts drawn "
                f"'{drafting_of(self.rule)}'; choose its drafting 'iid'"
            )
        if self.trunk < 0:
            raise CalibrationError(f"DelayedExpansion: trunk must be at least 0, got {self.trunk}")

    @property
    def lossless(self) -> bool:
        """Whether the emitted text is distributed as the verifier's."""
        return type(self.rule).lossless

    def rule_at(self, depth: int) -> Rule:
        """Give the rule that judges the children of nodes of this depth (the root has 0)."""
        return TokenLevel() if depth < self.trunk else self.rule

    def law(self, tree: DraftTree) -> RoundLaw:
        """Give the exact consequence for this tree. The rule's cost per node; [n + 1, V] floats."""
        return law_from_the_root(tree, self.rule_at)

    def verify(self, tree: DraftTree, rng: np.random.Generator) -> RoundVerdict:
        """Accept a path of the tree and emit one token more. The rule's cost per node of that path."""
        return verify_from_the_root(tree, self.rule_at, rng)

    def block_efficiency(self, action: DelayedAction, target: NextToken, drafter: NextToken) -> float:
        """Give the expected tokens of a round, E[tau] + 1, for what the action drafts. Exact.

        `action.trunk` must be this rule's. Every tuple of live paths' tokens at every prefix is visited, V^K of them:
        small vocabularies only.
        """
        if action.trunk != self.trunk:
            raise CalibrationError(f"DelayedExpansion: action must have a trunk of {self.trunk}, got {action.trunk}")
        worth: dict[tuple[tuple[int, ...], int], float] = {}

        def below(prefix: tuple[int, ...], live: int) -> float:
            if len(prefix) == action.draft_steps:
                return 0.0
            if (prefix, live) not in worth:
                drafted = action.branches if len(prefix) == self.trunk else live
                worth[prefix, live] = self._expected(prefix, drafted, target, drafter, below)
            return worth[prefix, live]

        return 1.0 + below((), 1)

    def _expected(
        self,
        prefix: tuple[int, ...],
        live: int,
        target: NextToken,
        drafter: NextToken,
        below: Callable[[tuple[int, ...], int], float],
    ) -> float:
        """Give the expected accepted drafts after a prefix where `live` paths go on, `below` giving those further."""
        p, q, total = target(prefix), drafter(prefix), 0.0
        rule = self.rule_at(len(prefix))
        for drafts, weight in draft_tuples(q, live, "iid"):
            accepted = rule.law(p, q, drafts).accepted
            count = Counter(drafts)
            for token, share in zip(drafts, accepted, strict=True):
                if share > 0.0:
                    total += weight * float(share) * (1.0 + below((*prefix, token), count[token]))
        return total


def best_action(
    block_efficiency: Mapping[DelayedAction, float], seconds: Mapping[DelayedAction, float]
) -> DelayedAction:
    """Give the action with the most expected tokens per second, argmax E[BE(a)] / time(a).

    `block_efficiency` is the predicted E[tau] + 1 of each action (a table by features of the root, or a model's),
    `seconds` what its round takes. Of equally fast ones the one with fewer nodes is given.
    """
    if not block_efficiency or set(block_efficiency) - set(seconds):
        missing = sorted(set(block_efficiency) - set(seconds))
        raise CalibrationError(f"best_action: must have at least one action and seconds for each, missing {missing}")
    slow = [action for action in block_efficiency if not seconds[action] > 0]
    if slow:
        raise CalibrationError(f"best_action: seconds must be above 0, got {seconds[slow[0]]} for {slow[0]}")
    return max(block_efficiency, key=lambda a: (block_efficiency[a] / seconds[a], -a.most_nodes))
