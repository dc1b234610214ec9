"""The tri-gram model against counting, its search against a plain one over paths."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposers_drawn import CORPUS, TEXT, paths

from calibration.common.errors import CalibrationError
from calibration.proposers import TrigramCounts, TrigramProposer, TrigramSettings, draft_trees


def counted(tokens: list[int], corpus: list[list[int]], order: int, weight: int) -> Counter[tuple[int, ...]]:
    """n-grams of the corpus and of the text, the latter by `weight`."""
    found: Counter[tuple[int, ...]] = Counter()
    for text, amount in [*((text, 1) for text in corpus), (tokens, weight)]:
        for end in range(order, len(text) + 1):
            found[tuple(text[end - order : end])] += amount
    return found


@given(tokens=TEXT, corpus=CORPUS, smooth=st.sampled_from([0.5, 2.0]), weight=st.integers(1, 3))
def test_probabilities_equal_the_formula(
    tokens: list[int], corpus: list[list[int]], smooth: float, weight: int
) -> None:
    settings = TrigramSettings(branching=8, back_off=smooth, online_weight=weight)
    proposer = TrigramProposer(settings, TrigramCounts(corpus, branching=8))
    proposer.extend(tokens)
    pairs, triples = counted(tokens, corpus, 2, weight), counted(tokens, corpus, 3, weight)
    for a in range(4):
        for b in range(4):
            total2 = sum(n for key, n in pairs.items() if key[0] == b)
            total3 = sum(n for key, n in triples.items() if key[:2] == (a, b))
            found = proposer.probabilities([a, b])
            assert {x for x, _ in found} == {key[1] for key in pairs if key[0] == b}
            for x, probability in found:
                exact = (triples[a, b, x] + smooth * pairs[b, x] / total2) / (total3 + smooth)
                assert probability == pytest.approx(exact, abs=1e-12)
            assert not found or sum(p for _, p in found) == pytest.approx(1.0)
            assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)


@given(tokens=st.lists(st.integers(0, 6), max_size=60), keep=st.integers(1, 4))
def test_the_best_followers_are_kept_exactly(tokens: list[int], keep: int) -> None:
    counts = TrigramCounts([tokens], branching=keep)
    for b in set(tokens[:-1]):
        seen = [(tokens[i + 1], i) for i in range(len(tokens) - 1) if tokens[i] == b]
        number = Counter(x for x, _ in seen)
        last = dict(seen)
        assert counts.contexts[b].best == sorted(number, key=lambda x: (-number[x], -last[x]))[:keep]


def searched(proposer: TrigramProposer, tokens: list[int], settings: TrigramSettings) -> set[tuple[int, ...]]:
    """The search of the module's docstring, on dictionaries by path."""
    visits: Counter[tuple[int, ...]] = Counter()
    values: dict[tuple[int, ...], list[float]] = {}
    prior: dict[tuple[int, ...], float] = {}
    for _ in range(settings.simulations):
        if len(prior) == settings.nodes:
            break
        path: tuple[int, ...] = ()
        fresh = False
        while len(path) < settings.max_draft_tokens and not fresh:
            candidates = proposer.probabilities([*tokens, *path][-2:])
            if not candidates:
                break
            scores = []
            for token, m in candidates:
                child = (*path, token)
                q = sum(values.get(child, [])) / max(visits[child], 1)
                scores.append(q + settings.exploration * m * sqrt(visits[path]) / (1 + visits[child]))
            token, m = candidates[scores.index(max(scores))]
            path = (*path, token)
            fresh = path not in prior
            prior[path] = m
        for start in range(len(path) + 1):
            visits[path[:start]] += 1
            product, value = 1.0, 0.0
            for end in range(start, len(path) + 1):
                if end:
                    product *= prior[path[:end]]
                    value += product
            values.setdefault(path[:start], []).append(value / settings.max_draft_tokens)
    return set(prior)


@given(tokens=TEXT, corpus=CORPUS, nodes=st.integers(1, 12), limit=st.integers(0, 6))
def test_the_search_equals_a_plain_one(tokens: list[int], corpus: list[list[int]], nodes: int, limit: int) -> None:
    settings = TrigramSettings(nodes=nodes, simulations=15, max_draft_tokens=5, branching=3, exploration=0.73)
    proposer = TrigramProposer(settings, TrigramCounts(corpus, branching=3))
    proposer.extend(tokens)
    draft = draft_trees.check(proposer.propose(limit))
    assert paths(draft) == {path for path in searched(proposer, tokens, settings) if len(path) <= limit}


def test_little_exploration_follows_the_most_probable_path_and_much_spreads() -> None:
    corpus = [[1, 2, 3, 4, 5, 6]] * 3 + [[1, 7, 8, 9]] * 2
    deep = TrigramProposer(TrigramSettings(nodes=5, exploration=0.01, branching=8), TrigramCounts(corpus))
    wide = TrigramProposer(TrigramSettings(nodes=5, exploration=50, branching=8), TrigramCounts(corpus))
    for proposer in (deep, wide):
        proposer.extend([1])
    assert paths(deep.propose(8)) == {(2, 3, 4, 5, 6)[:n] for n in range(1, 6)}
    assert {(2,), (7,)} <= paths(wide.propose(1))


def test_the_request_outweighs_the_corpus() -> None:
    proposer = TrigramProposer(TrigramSettings(online_weight=8), TrigramCounts([[1, 2, 3]] * 5))
    assert proposer.probabilities([1, 2])[0][0] == 3
    proposer.extend([1, 2, 4])
    assert proposer.probabilities([1, 2])[0][0] == 4


def test_unfit_settings_are_refused() -> None:
    with pytest.raises(CalibrationError, match="branching: must be 3"):
        TrigramProposer(TrigramSettings(branching=4), TrigramCounts(branching=3))
    with pytest.raises(CalibrationError) as caught:
        TrigramSettings(nodes=0, exploration=-1, back_off=0)
    for name in ("nodes", "exploration", "back_off"):
        assert name in str(caught.value)
