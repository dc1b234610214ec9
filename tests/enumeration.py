"""Exhaustive enumeration of drafts and of what a rule emits, and tests of fit: the oracles of the verification tests.

Nothing here is imported from the package under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy.stats import chi2

Tuples = Iterable[tuple[tuple[int, ...], float]]


def iid_tuples(q: np.ndarray, k: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every ordered tuple of k independent draws from q, with its probability; impossible ones are left out."""
    for drafts in product(np.flatnonzero(q).tolist(), repeat=k):
        yield drafts, float(np.prod([q[x] for x in drafts]))


def without_replacement_tuples(q: np.ndarray, k: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every ordered tuple of k draws from q without replacement, with its probability.

    A support smaller than k is drawn whole: the tuples are then shorter than k.
    """
    if k == 0 or not q.any():
        yield (), 1.0
        return
    for x in np.flatnonzero(q).tolist():
        rest = q.copy()
        rest[x] = 0.0
        left = rest.sum()
        for tail, weight in without_replacement_tuples(rest / left if left > 0 else rest, k - 1):
            yield (x, *tail), float(q[x]) * weight


def outcome(law: Callable[[tuple[int, ...]], Any], tuples: Tuples) -> tuple[np.ndarray, float]:
    """The exact distribution of the emitted token and the exact acceptance, summed over all draft tuples.

    `law(drafts)` gives an object with `.tokens` [V] and `.acceptance`.
    """
    emitted: Any = 0.0
    accepted = 0.0
    for drafts, weight in tuples:
        consequence = law(drafts)
        emitted = emitted + weight * consequence.tokens
        accepted += weight * consequence.acceptance
    return np.asarray(emitted), accepted


def accepted_by_token(law: Callable[[tuple[int, ...]], Any], tuples: Tuples, size: int) -> np.ndarray:
    """The exact mass accepted via each token [V]; `law(drafts).accepted` holds one probability per draft."""
    mass = np.zeros(size)
    for drafts, weight in tuples:
        for draft, accepted in zip(drafts, law(drafts).accepted, strict=True):
            mass[draft] += weight * accepted
    return mass


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    """Half the summed absolute difference of two distributions."""
    return float(0.5 * np.abs(np.asarray(one) - np.asarray(other)).sum())


def chi_square_p_value(counts: np.ndarray, expected: np.ndarray, least: float = 5.0) -> float:
    """The p-value of Pearson's test that `counts` [V] were drawn from the distribution `expected` [V].

    The cells whose expected count is below `least` are pooled, rarest first, as the test's approximation asks for.
    A count where `expected` is zero gives 0; a certain outcome, always met, gives 1.
    """
    counts = np.asarray(counts, float)
    if counts[expected == 0].any():
        return 0.0
    mean = expected * counts.sum()
    order = np.argsort(mean)
    mean, counts = mean[order], counts[order]
    pooled = int(np.searchsorted(mean, least))
    while 0 < pooled < len(mean) and mean[:pooled].sum() < least:
        pooled += 1
    if pooled:
        mean = np.append(mean[:pooled].sum(), mean[pooled:])
        counts = np.append(counts[:pooled].sum(), counts[pooled:])
    mean, counts = mean[mean > 0], counts[mean > 0]
    if len(mean) == 1:
        return 1.0
    return float(chi2.sf(((counts - mean) ** 2 / mean).sum(), len(mean) - 1))


def distributions(size: int) -> st.SearchStrategy[np.ndarray]:
    """Distributions over `size` tokens, from even to nearly certain; many with zeros."""
    weights = st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.sampled_from([1e-9, 1.0, 1.0]))
    lists = st.lists(weights, min_size=size, max_size=size).filter(lambda row: sum(row) > 0)
    return lists.map(lambda row: np.array(row) / np.sum(row))


@st.composite
def instances(draw: Any, most_tokens: int = 5, most_drafts: int = 3) -> tuple[np.ndarray, np.ndarray, int]:
    """(p, q, k): free pairs, equal pairs and pairs without a common token, k up to and beyond the support of q."""
    size = draw(st.integers(2, most_tokens))
    k = draw(st.integers(1, most_drafts))
    p = draw(distributions(size))
    kind = draw(st.sampled_from(["free", "free", "free", "equal", "disjoint"]))
    if kind == "equal":
        return p, p.copy(), k
    if kind == "disjoint":
        cut = draw(st.integers(1, size - 1))
        head, tail = draw(distributions(cut)), draw(distributions(size - cut))
        return np.append(head, np.zeros(size - cut)), np.append(np.zeros(cut), tail), k
    return p, draw(distributions(size)), k


def random_pair(rng: np.random.Generator, size: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A verifier and a drafter whose logits agree in part, as those of language models do; [size] each."""
    common = rng.normal(size=size) * 3.0
    rows = np.exp(common + spread * rng.normal(size=(2, size)))
    p, q = rows / rows.sum(1, keepdims=True)
    return p, q


def every_draft(rule: Any, q: np.ndarray, k: int) -> list[tuple[tuple[int, ...], float]]:
    """Every tuple of drafts that a rule can be given, with its probability, by its own account of its drafting."""
    drafting = rule.drafting
    if drafting == "without_replacement":
        return list(without_replacement_tuples(q, k))
    if drafting == "top":
        best = sorted(np.flatnonzero(q).tolist(), key=lambda token: (-q[token], token))
        return [(tuple(best[:k]), 1.0)]
    return greedy_tuples(q, k) if drafting == "greedy" else list(iid_tuples(q, k))


def greedy_tuples(q: np.ndarray, k: int) -> list[tuple[tuple[int, ...], float]]:
    """The k - 1 most probable tokens and one of the others, with its probability (Hu et al.'s greedy drafts)."""
    best = sorted(np.flatnonzero(q).tolist(), key=lambda token: (-q[token], token))
    top, others = best[: k - 1], best[k - 1 :]
    total = sum(q[x] for x in others)
    return [((*top, x), float(q[x] / total)) for x in others] or [(tuple(top), 1.0)]


def emitted_counts(
    rule: Any, p: np.ndarray, q: np.ndarray, k: int, rounds: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw and verify `rounds` times: how often each token was emitted [V], and how often a draft was accepted."""
    counts, accepted = np.zeros(len(p)), 0
    for _ in range(rounds):
        verdict = rule.verify(p, q, rule.draw(q, k, rng), rng)
        counts[verdict.token] += 1
        accepted += verdict.accepted_index is not None
    return counts, accepted
