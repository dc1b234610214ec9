"""Drawing the drafts: independent draws, Gumbel-top-k, the most probable tokens, and stochastic beam search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.verification.common import Drafting, Drafts, choice, distribution, draft_count, draft_tokens, without


def draw_drafts(q: ArrayLike, k: int, rng: np.random.Generator, drafting: Drafting) -> Ints:
    """Draw drafts [k] from q [V]: "iid", "without_replacement" (in order), "top" or "greedy" (top k - 1 and a draw).

    All but "iid" give fewer than k where q has fewer tokens of positive probability. O(V).
    """
    choice("drafting", drafting, ("iid", "without_replacement", "top", "greedy"), "draw_drafts")
    if drafting == "iid":
        return draw_iid(q, k, rng)
    if drafting == "without_replacement":
        return gumbel_top_k(q, k, rng)
    if drafting == "top":
        return top_k(q, k)
    top, rest = split_top(distribution("q", q, "draw_drafts"), draft_count(k, "draw_drafts"))
    return np.concatenate([top, draw_iid(rest, 1, rng)]) if rest.any() else top


def draw_iid(q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
    """Draw k independent tokens from q [V] by inverting its cumulative sum; O(V + k log V)."""
    checked, k = distribution("q", q, "draw_iid"), draft_count(k, "draw_iid")
    support = np.flatnonzero(checked)
    cumulative = np.cumsum(checked[support])
    places = np.searchsorted(cumulative, rng.random(k) * cumulative[-1], side="right")
    return np.asarray(support[np.minimum(places, len(support) - 1)])


def gumbel_top_k(q: ArrayLike, k: int, rng: np.random.Generator) -> Ints:
    """Draw k distinct tokens from q [V] without replacement, in the order of the draws; O(V).

    The k largest of log q + Gumbel noise (Vieira 2014; Kool et al. 2019), as Recursive Speculative Decoding drafts
    (RSD-C, Jeon et al. 2024). A support smaller than k is drawn whole.
    """
    checked, k = distribution("q", q, "gumbel_top_k"), draft_count(k, "gumbel_top_k")
    support = np.flatnonzero(checked)
    # NOTE: Gumbel noise is -log of an exponential one, so the largest log q + Gumbel is the smallest exponential / q.
    # Without its logarithms, 150,000 tokens take a fifth of the time (0.6 against 3.6 ms).
    times = rng.standard_exponential(len(support)) / checked[support]
    k = min(k, len(support))
    first = np.argpartition(times, k - 1)[:k]
    return support[first[np.argsort(times[first])]]


def top_k(q: ArrayLike, k: int) -> Ints:
    """Give the k most probable tokens of q [V], most probable first; among equals the lower id first. O(V).

    Tokens of probability 0 are left out.
    """
    checked, k = distribution("q", q, "top_k"), draft_count(k, "top_k")
    support = np.flatnonzero(checked)
    if len(support) > k:
        least = np.partition(checked[support], len(support) - k)[len(support) - k]
        support = support[checked[support] >= least]
    return support[np.argsort(-checked[support], kind="stable")][:k]


def split_top(q: Floats, k: int) -> tuple[Ints, Floats]:
    """Give the k - 1 most probable tokens of q and q' [V], the others normalised (all zeros where there are none)."""
    top = top_k(q, k - 1) if k > 1 else np.empty(0, dtype=np.int64)
    return top, without(q, top)


def without_replacement_probability(q: ArrayLike, drafts: Drafts) -> float:
    """Give the exact probability that draws without replacement from q [V] begin with `drafts` [k] in this order."""
    where = "without_replacement_probability"
    rest = distribution("q", q, where).copy()
    probability = 1.0
    for token in draft_tokens(drafts, rest, where, distinct=True).tolist():
        probability *= rest[token] / rest.sum()
        rest[token] = 0.0
    return float(probability)


@dataclass(frozen=True)
class BeamNode:
    """A sequence in a stochastic beam: its tokens, the node it extends, its log q and its perturbed log q."""

    tokens: tuple[int, ...]
    parent: int
    """Index of the node that this one extends in the list of all nodes, -1 on the first level."""
    log_probability: float
    perturbed: float


def stochastic_beam_search(
    conditional: Callable[[tuple[int, ...]], ArrayLike], width: int, depth: int, rng: np.random.Generator
) -> list[BeamNode]:
    """Draw `width` sequences of `depth` tokens without replacement, and give every node of every level's beam.

    `conditional(prefix)` gives q [V] after the prefix; it is called once for every node above the last level. Levels
    follow one another, each ordered by falling perturbed value. Every level is a draw without replacement, in order,
    from the distribution of sequences of its length; a node's children, in the order in which they stand here, are
    draws without replacement from its q whose number does not depend on the tokens not yet seen, so that
    `Recursive("without_replacement")` verifies the tree without loss (RSD-S). O(width V) a level.

    Sources: Kool et al. 2019 (the perturbed value of a child, given its parent's); Jeon et al. 2024 (RSD).
    """
    width = draft_count(width, "stochastic_beam_search: width")
    depth = draft_count(depth, "stochastic_beam_search: depth")
    level, nodes = [BeamNode((), -1, 0.0, 0.0)], list[BeamNode]()
    start = -1
    for _ in range(depth):
        children = [
            child
            for index, node in enumerate(level)
            for child in _children(node, index + start if node.tokens else -1, conditional(node.tokens), width, rng)
        ]
        level = sorted(children, key=lambda node: -node.perturbed)[:width]
        start = len(nodes)
        nodes.extend(level)
    return nodes


def _children(
    node: BeamNode, index: int, conditional: ArrayLike, width: int, rng: np.random.Generator
) -> list[BeamNode]:
    """Give the `width` best children of a node, their Gumbels conditioned on the largest being the node's own."""
    q = distribution("q", conditional, "stochastic_beam_search: conditional")
    support = np.flatnonzero(q)
    log_q = node.log_probability + np.log(q[support])
    free = log_q + rng.gumbel(size=len(support))
    best = np.argpartition(-free, min(width, len(free)) - 1)[:width]
    perturbed = _conditioned(free[best], node.perturbed)
    return [
        BeamNode((*node.tokens, int(support[b])), index, float(log_q[b]), float(value))
        for b, value in zip(best, perturbed, strict=True)
    ]


def _conditioned(free: Floats, largest: float) -> Floats:
    """Give free Gumbels shifted so that their maximum is `largest`: -log(exp(-largest) - exp(-max) + exp(-free)).

    In the stable form of Kool et al. 2019, appendix B.3; monotone, so that only the best need it.
    """
    gap = free - free.max()
    with np.errstate(divide="ignore"):
        shifted = largest - free + np.log(-np.expm1(gap))
    return np.asarray(largest - np.maximum(0.0, shifted) - np.log1p(np.exp(-np.abs(shifted))))
