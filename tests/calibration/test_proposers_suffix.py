"""Suffix drafting against a search by brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposers_drawn import CORPUS, TEXT

from calibration.common.errors import CalibrationError
from calibration.proposers import Corpus, SuffixProposer, SuffixSettings
from calibration.proposers.suffix import SuffixAutomaton


def occurrences(pattern: list[int], text: list[int]) -> list[int]:
    """Where `pattern` starts in `text`."""
    return [s for s in range(len(text) - len(pattern) + 1) if text[s : s + len(pattern)] == pattern]


def own_match(tokens: list[int], occurrence: str) -> tuple[int, int]:
    """(length, end) of the longest suffix that ends earlier too."""
    for length in range(len(tokens) - 1, 0, -1):
        starts = occurrences(tokens[-length:], tokens[:-1])
        if starts:
            return length, (starts[0] if occurrence == "earliest" else starts[-1]) + length
    return 0, 0


def copied(tokens: list[int], start: int, limit: int) -> list[int]:
    """`limit` tokens from `start`, each also becoming part of what is copied."""
    whole = list(tokens)
    for i in range(limit):
        whole.append(whole[start + i])
    return whole[len(tokens) :]


def followers(pattern: list[int], corpus: list[list[int]]) -> Counter[int]:
    """What follows `pattern` in the corpus, in the order first seen."""
    ends = ((text, s + len(pattern)) for text in corpus for s in occurrences(pattern, text))
    return Counter(text[end] for text, end in ends if end < len(text))


def corpus_draft(tokens: list[int], corpus: list[list[int]], limit: int, floor: float) -> tuple[int, list[int]]:
    """(match length, draft) of the longest suffix that something follows in the corpus."""
    for length in range(len(tokens), 0, -1):
        pattern = tokens[-length:]
        if not followers(pattern, corpus):
            continue
        total = sum(len(occurrences(pattern, text)) for text in corpus)
        draft: list[int] = []
        while len(draft) < limit and (found := followers([*pattern, *draft], corpus)):
            token, count = max(found.items(), key=lambda item: item[1])
            if count < floor * total:
                break
            draft.append(token)
        return length, draft
    return 0, []


@given(
    tokens=TEXT,
    corpus=CORPUS,
    occurrence=st.sampled_from(["earliest", "recent"]),
    min_match=st.integers(1, 3),
    limit=st.integers(0, 6),
    floor=st.sampled_from([0.0, 0.4]),
    factor=st.sampled_from([None, 0.5, 2.0]),
)
def test_drafts_equal_brute_force(
    tokens: list[int],
    corpus: list[list[int]],
    occurrence: str,
    min_match: int,
    limit: int,
    floor: float,
    factor: float | None,
) -> None:
    settings = SuffixSettings(
        min_match=min_match,
        occurrence=occurrence,
        length_factor=factor,
        min_probability=floor,
        max_draft_tokens=5,
    )
    proposer = SuffixProposer(settings, Corpus(corpus))
    for token in tokens:
        proposer.extend([token])
    own, end = own_match(tokens, occurrence)
    matched, _ = corpus_draft(tokens, corpus, 0, floor)
    most = min(limit, 5)
    if factor is not None:
        most = min(most, int(factor * max(own, matched)))
    if max(own, matched) < min_match or most == 0:
        expected: list[int] = []
    elif matched > own:
        expected = corpus_draft(tokens, corpus, most, floor)[1]
    else:
        expected = copied(tokens, end, most)
    assert list(proposer.propose(limit).tokens) == expected


@given(tokens=TEXT)
def test_the_automaton_accepts_exactly_the_substrings_and_stays_small(tokens: list[int]) -> None:
    automaton = SuffixAutomaton(tokens)
    assert len(automaton.link) <= max(2 * len(tokens), 2)
    strings = {()}
    frontier: list[tuple[tuple[int, ...], int]] = [((), 0)]
    while frontier:
        path, state = frontier.pop()
        for token, target in automaton.following[state].items():
            strings.add((*path, token))
            frontier.append(((*path, token), target))
    assert strings == {tuple(tokens[a:b]) for a in range(len(tokens) + 1) for b in range(a, len(tokens) + 1)}


@given(corpus=CORPUS)
def test_states_count_their_occurrences(corpus: list[list[int]]) -> None:
    index = Corpus(corpus)
    for pattern in {tuple(text[a:b]) for text in corpus for a in range(len(text)) for b in range(a + 1, a + 4)}:
        state = 0
        for token in pattern:
            state = index.following[state][token]
        assert index.occurrences[state] == sum(len(occurrences(list(pattern), text)) for text in corpus)


def test_loops_are_copied_beyond_the_present_end() -> None:
    proposer = SuffixProposer(SuffixSettings())
    proposer.extend([9, 1, 2, 3, 1, 2])
    assert proposer.propose(7).tokens == (3, 1, 2, 3, 1, 2, 3)


def test_extension_takes_a_bounded_number_of_steps_a_token() -> None:
    rng = np.random.default_rng(3)
    for alphabet in (1, 2, 50):
        tokens = rng.integers(0, alphabet, 4000).tolist()
        automaton = SuffixAutomaton(tokens)
        transitions = sum(map(len, automaton.following))
        assert len(automaton.link) <= 2 * len(tokens)
        assert transitions <= 3 * len(tokens)


def test_corpora_hold_token_ids_alone() -> None:
    with pytest.raises(CalibrationError, match=r"sequence 1 .*got -1"):
        Corpus([[0], [3, -1]])


def test_every_fault_of_the_settings_is_named() -> None:
    with pytest.raises(CalibrationError) as caught:
        SuffixSettings(min_match=0, occurrence="lately", min_probability=2.0, length_factor=0, max_draft_tokens=0)
    for name in ("min_match", "occurrence", "min_probability", "length_factor", "max_draft_tokens"):
        assert name in str(caught.value)
