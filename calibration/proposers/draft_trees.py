"""Draft trees as pure functions: build, check, cut, prune, fuse, and how far a text follows them.

Depths count from 1 (a first drafted token). All functions take chains as well; cutting or pruning a chain gives a
chain, building or fusing gives a tree.

Recording of proposers: what they propose at every position of a text, and how far it is accepted.

Exact in greedy and in sampled decoding: a proposal is a given string or tree of given tokens, accepted as far as the
trajectory follows it. (Sampled: given tokens have q = 1, so that each is accepted with probability p, which is to say
whenever the verifier's own draw is that token.) Since proposals depend on committed tokens alone and shorter drafts
are cuts of longer ones, a round that starts at t with drafts of k tokens accepts min(run[t], k), whatever the rounds
before it were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.common.errors import CalibrationError
from calibration.proposers.protocol import Draft, Proposer

_Trie = list[dict[int, int]]  # children by token of every node; node 0 is the committed text


def check(draft: Draft) -> Draft:
    """Give `draft` back, or raise `CalibrationError` with the first node that breaks the contract of `Draft`."""
    parents = _parents(draft)
    if len(parents) != len(draft.tokens):
        raise CalibrationError(f"draft: must have one parent a token, got {len(parents)} of {len(draft.tokens)}")
    depth: list[int] = []
    seen: set[tuple[int, int]] = set()
    for i, (token, parent) in enumerate(zip(draft.tokens, parents, strict=True)):
        if not -1 <= parent < i:
            raise CalibrationError(f"draft node {i}: parent must lie in [-1, {i - 1}], got {parent}")
        depth.append(1 if parent < 0 else depth[parent] + 1)
        if i and depth[i] < depth[i - 1]:
            raise CalibrationError(f"draft node {i}: must not be shallower than the one before, got depth {depth[i]}")
        if (parent, token) in seen:
            raise CalibrationError(f"draft node {i}: siblings must have distinct tokens, got {token} twice")
        seen.add((parent, token))
    return draft


def depths(draft: Draft) -> tuple[int, ...]:
    """Give the depth of every node, 1 for a first token."""
    if draft.parents is None:
        return tuple(range(1, len(draft.tokens) + 1))
    found: list[int] = []
    for parent in draft.parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return tuple(found)


def depth(draft: Draft) -> int:
    """Give how many tokens deep the draft is; 0 where it is empty."""
    if draft.parents is None:
        return len(draft.tokens)
    node, count = len(draft.tokens) - 1, 0  # the last node is one of the deepest
    while node >= 0:
        node, count = draft.parents[node], count + 1
    return count


def nodes_by_depth(draft: Draft) -> tuple[int, ...]:
    """Give the number of nodes of depth 1, 2, ... down to the depth of the draft."""
    counts = [0] * depth(draft)
    for level in depths(draft):
        counts[level - 1] += 1
    return tuple(counts)


def accepted(draft: Draft, continuation: Sequence[int]) -> int:
    """Give how many tokens deep `continuation` follows the draft, bonus excluded; one pass over the nodes."""
    at, count = -1, 0
    for node, token in enumerate(draft.tokens):
        if count == len(continuation):
            break
        parent = node - 1 if draft.parents is None else draft.parents[node]
        if parent == at and token == continuation[count]:
            at, count = node, count + 1
    return count


def cut(draft: Draft, draft_tokens: int) -> Draft:
    """Give the nodes of `draft` down to depth `draft_tokens`: a prefix of it."""
    if draft.parents is None:
        return Draft(draft.tokens[: max(draft_tokens, 0)])
    kept = sum(nodes_by_depth(draft)[: max(draft_tokens, 0)])
    return Draft(draft.tokens[:kept], draft.parents[:kept])


def breadth_first(tokens: Sequence[int], parents: Sequence[int]) -> Draft:
    """Give the tree of nodes listed in any order that puts parents first; siblings with one token are merged.

    Siblings stand in the order in which they were listed. Raises `CalibrationError` where a parent does not come
    first.
    """
    if len(tokens) != len(parents):
        raise CalibrationError(f"draft: must have one parent a token, got {len(parents)} of {len(tokens)}")
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise CalibrationError(f"draft node {node}: parent must lie in [-1, {node - 1}], got {parent}")
    trie: _Trie = [{}]
    _insert(trie, tokens, parents)
    return _laid_out(trie)


def from_paths(paths: Iterable[Sequence[int]]) -> Draft:
    """Give the tree whose branches from the root are `paths`, common beginnings merged."""
    trie: _Trie = [{}]
    for path in paths:
        _insert(trie, path, range(-1, len(path) - 1))
    return _laid_out(trie)


def fuse(*drafts: Draft) -> Draft:
    """Give the union of several drafts of one position: nodes with the same tokens up to and with themselves are one.

    It accepts what the best of them accepts, at the price of verifying the union once. This is how a retrieved tree
    joins a model's (RASD, our reading of its longest-prefix matching) and how trees of two drafters are
    verified together (TAPS, Merged-Tree Verification). Among siblings, those of earlier arguments stand first.
    """
    trie: _Trie = [{}]
    for draft in drafts:
        _insert(trie, draft.tokens, _parents(draft))
    return _laid_out(trie)


def prune(
    draft: Draft,
    *,
    allowed_first_tokens: Collection[int] | None = None,
    path_probabilities: Sequence[float] | None = None,
    min_probability: float = 0.0,
    max_nodes: int | None = None,
) -> Draft:
    """Give what a drafter leaves of a retrieved `draft` (RASD, our reading); a node goes together with all below it.

    `allowed_first_tokens`: the first tokens that may stay, say the drafter's top m at this position.
    `path_probabilities`: the drafter's probability of each node's path from the root, so that none is above its
    parent's; nodes below `min_probability` go, and of the rest the `max_nodes` most probable stay, shallower ones
    where equal. Raises `CalibrationError` where these do not fit the draft.
    """
    parents = _parents(draft)
    kept = [True] * len(parents)
    if max_nodes is not None and max_nodes < 0:
        raise CalibrationError(f"max_nodes: must be >= 0, got {max_nodes}")
    if path_probabilities is not None:
        kept = _probable(parents, path_probabilities, min_probability, max_nodes)
    elif min_probability > 0 or max_nodes is not None:
        raise CalibrationError("prune: min_probability and max_nodes need path_probabilities, got none")
    place: dict[int, int] = {-1: -1}
    nodes: list[int] = []
    for node, parent in enumerate(parents):
        first = parent < 0 and allowed_first_tokens is not None
        if parent in place and kept[node] and not (first and draft.tokens[node] not in allowed_first_tokens):  # type: ignore[operator]
            place[node] = len(nodes)
            nodes.append(node)
    tokens = tuple(draft.tokens[node] for node in nodes)
    return Draft(tokens, None if draft.parents is None else tuple(place[parents[node]] for node in nodes))


def path_probabilities(draft: Draft, conditional: Sequence[float]) -> tuple[float, ...]:
    """Give the probability of every node's path: the product of `conditional`, node given parent, from the root on.

    Their sum is the expected number of accepted tokens where `conditional` is the verifier's.
    """
    found: list[float] = []
    for probability, parent in zip(conditional, _parents(draft), strict=True):
        found.append(probability * (found[parent] if parent >= 0 else 1.0))
    return tuple(found)


def _probable(
    parents: Sequence[int], probabilities: Sequence[float], min_probability: float, max_nodes: int | None
) -> list[bool]:
    """Say of every node whether its path is probable enough to stay."""
    if len(probabilities) != len(parents):
        raise CalibrationError(
            f"path_probabilities: must hold one number a node ({len(parents)}), got {len(probabilities)}"
        )
    for node, (parent, probability) in enumerate(zip(parents, probabilities, strict=True)):
        ceiling = 1.0 if parent < 0 else probabilities[parent]
        if not 0.0 <= probability <= ceiling:
            raise CalibrationError(f"path_probabilities[{node}]: must lie in [0, {ceiling}], got {probability}")
    order = sorted(range(len(parents)), key=lambda node: (-probabilities[node], node))
    chosen = {node for node in order[:max_nodes] if probabilities[node] >= min_probability}
    return [node in chosen for node in range(len(parents))]


def _parents(draft: Draft) -> Sequence[int]:
    return range(-1, len(draft.tokens) - 1) if draft.parents is None else draft.parents


def _insert(trie: _Trie, tokens: Sequence[int], parents: Sequence[int]) -> None:
    """Add a tree to the trie, node by node."""
    place: list[int] = []
    for token, parent in zip(tokens, parents, strict=True):
        children = trie[0 if parent < 0 else place[parent]]
        if token not in children:
            children[token] = len(trie)
            trie.append({})
        place.append(children[token])


def _laid_out(trie: _Trie) -> Draft:
    """Give the trie breadth first."""
    tokens: list[int] = []
    parents: list[int] = []
    level = [(0, -1)]
    while level:
        below = []
        for node, index in level:
            for token, child in trie[node].items():
                below.append((child, len(tokens)))
                tokens.append(token)
                parents.append(index)
        level = below
    return Draft(tuple(tokens), tuple(parents))


@dataclass(frozen=True)
class ProposalRuns:
    """Acceptance of the proposals at every position of one output of T tokens; lengths exclude the bonus token.

    `run` [T]: how many tokens deep the text follows the proposal. `depth` [T]: how deep the proposal is. `nodes` [T,
    D]: how many nodes it has down to depth 1 .. D, D the greatest depth of all: what a cut at that depth verifies.
    """

    run: NDArray[np.int64]
    depth: NDArray[np.int64]
    nodes: NDArray[np.int64]


def proposals(proposer: Proposer, prompt: Sequence[int], output: Sequence[int], max_draft_tokens: int) -> list[Draft]:
    """Give what a fresh `proposer` drafts at every position t of `output`, which is given `prompt` and output[:t]."""
    proposer.extend(prompt)
    drafts = []
    for token in output:
        drafts.append(proposer.propose(max_draft_tokens))
        proposer.extend([token])
    return drafts


def run_lengths(drafts: Sequence[Draft], output: Sequence[int]) -> ProposalRuns:
    """Compare the proposals at every position with the text; the last runs end with it."""
    if len(drafts) != len(output):
        raise ValueError(f"drafts: must hold one a position ({len(output)}), got {len(drafts)}")
    deep = np.array([depth(draft) for draft in drafts], dtype=np.int64)
    nodes = np.zeros((len(drafts), int(deep.max(initial=0))), dtype=np.int64)
    run = np.zeros(len(drafts), dtype=np.int64)
    for t, draft in enumerate(drafts):
        nodes[t, : deep[t]] = nodes_by_depth(draft)
        run[t] = accepted(draft, output[t : t + int(deep[t])])
    return ProposalRuns(run, deep, nodes.cumsum(axis=1))
