"""Retrieval against sorting and counting by brute force, and its datastore on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposers_drawn import CORPUS, TEXT, paths

from calibration.common.errors import CalibrationError
from calibration.proposers import Datastore, RetrievalProposer, RetrievalSettings, draft_trees
from calibration.proposers.retrieval import suffix_array

Starts = list[tuple[int, int]]  # (text, position) of continuations


@given(tokens=st.lists(st.integers(-1, 3), max_size=40), order=st.integers(1, 9))
def test_suffixes_are_sorted_by_their_first_tokens(tokens: list[int], order: int) -> None:
    found = suffix_array(np.array(tokens, dtype=np.int32), order).tolist()
    assert found == sorted(range(len(tokens)), key=lambda p: (tokens[p : p + order], p))


@given(corpus=CORPUS, pattern=st.lists(st.integers(0, 3), min_size=1, max_size=6), order=st.integers(1, 6))
def test_lookups_find_every_occurrence(corpus: list[list[int]], pattern: list[int], order: int) -> None:
    store = Datastore.build(corpus, order=order)
    pattern = pattern[:order]
    first, last = store.find(pattern)
    flat = [token for text in corpus for token in (*text, -1)]
    assert len(store) == len(flat)
    assert sorted(store.suffixes[first:last].tolist()) == [
        p for p in range(len(flat)) if flat[p : p + len(pattern)] == pattern
    ]


def continuations(tokens: list[int], corpus: list[list[int]], settings: RetrievalSettings) -> list[list[int]]:
    """What follows the longest match, text by text."""
    for length in range(min(settings.max_match, len(tokens)), settings.min_match - 1, -1):
        pattern = tokens[-length:]
        found = [
            text[s + length : s + length + settings.max_draft_tokens]
            for text in corpus
            for s in range(len(text) - length)
            if text[s : s + length] == pattern
        ]
        if found:
            return found
    return []


@given(
    tokens=TEXT,
    corpus=CORPUS,
    min_match=st.integers(1, 3),
    nodes=st.integers(1, 8),
    depth=st.integers(1, 5),
    limit=st.integers(0, 6),
)
def test_drafts_equal_brute_force(
    tokens: list[int], corpus: list[list[int]], min_match: int, nodes: int, depth: int, limit: int
) -> None:
    settings = RetrievalSettings(max_match=4, min_match=min_match, nodes=nodes, max_draft_tokens=depth)
    proposer = RetrievalProposer(settings, Datastore.build(corpus, order=6))
    proposer.extend(tokens)
    found = continuations(tokens, corpus, settings)
    weights = Counter(tuple(row[:n]) for row in found for n in range(1, len(row) + 1))
    seen = {path: min(i for i, row in enumerate(found) if tuple(row[: len(path)]) == path) for path in weights}
    best = sorted(weights, key=lambda path: (-weights[path], len(path), seen[path]))[:nodes]
    assert paths(proposer.propose(limit)) == {path for path in best if len(path) <= limit}
    draft_trees.check(proposer.propose(limit))


@given(tokens=TEXT, corpus=CORPUS, limit=st.integers(0, 6))
def test_chains_follow_the_heaviest_child(tokens: list[int], corpus: list[list[int]], limit: int) -> None:
    settings = RetrievalSettings(max_match=4, min_match=1, shape="chain", max_draft_tokens=5)
    proposer = RetrievalProposer(settings, Datastore.build(corpus, order=4))
    proposer.extend(tokens)
    found = continuations(tokens, corpus, settings)
    path: list[int] = []
    while len(path) < limit:
        below = Counter(row[len(path)] for row in found if len(row) > len(path) and row[: len(path)] == path)
        if not below:
            break
        path.append(max(below, key=lambda token: below[token]))
    draft = proposer.propose(limit)
    assert list(draft.tokens) == path
    assert draft.parents is None


def test_of_many_occurrences_those_at_even_distances_are_read() -> None:
    corpus = [[1, 10 + i] for i in range(10)]
    settings = RetrievalSettings(min_match=1, max_match=1, max_occurrences=5)
    proposer = RetrievalProposer(settings, Datastore.build(corpus))
    proposer.extend([1])
    assert paths(proposer.propose(4)) == {(10,), (12,), (14,), (16,), (18,)}


def test_a_datastore_survives_the_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = Datastore.build(rng.integers(0, 50, (20, 30)).tolist(), order=5, notes={"source": "drawn"})
    path = store.save(tmp_path / "deep" / "store.npz")
    again = Datastore.load(path)
    assert (again.order, again.notes) == (5, {"source": "drawn"})
    assert np.array_equal(again.tokens, store.tokens)
    assert np.array_equal(again.suffixes, store.suffixes)
    pattern = store.tokens[3:6].tolist()
    assert again.find(pattern) == store.find(pattern)
    assert [file.name for file in path.parent.iterdir()] == ["store.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Datastore.build([[1, 2, 3]]).save(tmp_path / "store.npz")

    def torn(file: object, **arrays: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(OSError, match="disk full"):
        Datastore.build([[4, 5, 6]]).save(path)
    assert Datastore.load(path).tokens.tolist() == [1, 2, 3, -1]
    assert [file.name for file in tmp_path.iterdir()] == ["store.npz"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = Datastore.build([[1, 2, 3]] * 50).save(tmp_path / "store.npz")
    whole = path.read_bytes()
    with pytest.raises(CalibrationError, match="not found"):
        Datastore.load(tmp_path / "absent.npz")
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:300] + b"\x00\xff" + whole[302:]):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"store\.npz"):
            Datastore.load(path)
    np.savez(path, about=np.array('{"kind": "else"}'), tokens=np.zeros(1, int), suffixes=np.zeros(1, int))
    with pytest.raises(CalibrationError, match="must be a paceline token datastore"):
        Datastore.load(path)


@pytest.mark.parametrize(
    ("tokens", "suffixes"),
    [([1, 2, -1], [0, 1, 1]), ([1, 2, -1], [0, 1]), ([1, 2, 3], [0, 1, 2]), ([-2, -1], [0, 1])],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, tokens: list[int], suffixes: list[int]) -> None:
    store = Datastore(np.array([1, -1], dtype=np.int32), np.array([1, 0]), 4)
    store.tokens, store.suffixes = np.array(tokens, dtype=np.int32), np.array(suffixes)
    with pytest.raises(CalibrationError, match="must match each other"):
        Datastore.load(store.save(tmp_path / "store.npz"))


def test_unfit_settings_and_tokens_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"sequence 1 .*token ids"):
        Datastore.build([[1], [-4]])
    with pytest.raises(CalibrationError, match="order must be >= 1"):
        Datastore.build([[1]], order=0)
    with pytest.raises(CalibrationError, match="datastore's order 2"):
        RetrievalProposer(RetrievalSettings(max_match=3), Datastore.build([[1]], order=2))
    with pytest.raises(CalibrationError) as caught:
        RetrievalSettings(max_match=2, min_match=3, shape="bush", nodes=0, max_occurrences=0)
    for name in ("min_match", "shape", "nodes", "max_occurrences"):
        assert name in str(caught.value)
