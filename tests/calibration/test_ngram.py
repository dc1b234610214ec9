"""Prompt lookup against a search by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.proposers.lookup import NgramIndex, lookup_runs

TOKENS = st.lists(st.integers(0, 3), max_size=30)


def brute_force(tokens: list[int], ngram_max: int, ngram_min: int, limit: int) -> list[int]:
    """Scan for every n, longest first, from the left."""
    for n in range(ngram_max, ngram_min - 1, -1):
        if len(tokens) < n:
            continue
        suffix = tokens[len(tokens) - n :]
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + limit]
    return []


@given(tokens=TOKENS, ngram_max=st.integers(1, 4), limit=st.integers(1, 6), data=st.data())
def test_proposals_equal_brute_force(tokens: list[int], ngram_max: int, limit: int, data: st.DataObject) -> None:
    ngram_min = data.draw(st.integers(1, ngram_max))
    index = NgramIndex(ngram_max=ngram_max, ngram_min=ngram_min, max_draft_tokens=limit)
    for end, token in enumerate(tokens):
        assert index.propose() == brute_force(tokens[:end], ngram_max, ngram_min, limit)
        index.extend([token])
    assert index.propose(2) == brute_force(tokens, ngram_max, ngram_min, min(2, limit))


def test_longest_then_earliest_match_wins() -> None:
    #        0  1  2  3  4  5  6  7  8
    tokens = [7, 1, 2, 8, 1, 2, 9, 1, 2]
    assert NgramIndex(tokens, ngram_max=3).propose(3) == [8, 1, 2]
    assert NgramIndex([*tokens, 9, 1, 2], ngram_max=3).propose(2) == [9, 1]


@given(prompt=TOKENS, output=TOKENS)
def test_runs_are_matches_of_the_proposal(prompt: list[int], output: list[int]) -> None:
    runs, proposals = lookup_runs(prompt, output, ngram_max=3, ngram_min=1, max_draft_tokens=4)
    assert len(runs) == len(proposals) == len(output)
    for t, (run, proposed) in enumerate(zip(runs, proposals, strict=True)):
        draft = brute_force(prompt + output[:t], 3, 1, 4)
        assert proposed == len(draft)
        assert draft[:run] == output[t : t + run]
        assert run == len(draft) or t + run == len(output) or draft[run] != output[t + run]


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="ngram_min"):
        NgramIndex(ngram_max=2, ngram_min=3)
    with pytest.raises(ValueError, match="max_draft_tokens"):
        NgramIndex(max_draft_tokens=0)
