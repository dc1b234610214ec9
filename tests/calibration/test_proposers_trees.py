"""Draft trees against sets of paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposers_drawn import listed_paths, listed_trees, paths

from calibration.common.errors import CalibrationError
from calibration.proposers import Draft, draft_trees

TREES = listed_trees().map(lambda listed: draft_trees.breadth_first(*listed))
CHAINS = st.lists(st.integers(0, 3), max_size=8).map(lambda tokens: Draft(tuple(tokens)))
DRAFTS = TREES | CHAINS
TEXT = st.lists(st.integers(0, 3), max_size=12)


@given(listed=listed_trees())
def test_normalised_trees_keep_the_contract_and_the_paths(listed: tuple[list[int], list[int]]) -> None:
    draft = draft_trees.breadth_first(*listed)
    assert draft_trees.check(draft) is draft
    assert paths(draft) == listed_paths(*listed)
    assert len(draft.tokens) == len(paths(draft))


@given(branches=st.lists(TEXT, max_size=5))
def test_trees_from_paths_hold_their_beginnings(branches: list[list[int]]) -> None:
    draft = draft_trees.check(draft_trees.from_paths(branches))
    assert paths(draft) == {tuple(b[:n]) for b in branches for n in range(1, len(b) + 1)}


@given(draft=DRAFTS, text=TEXT)
def test_accepted_is_the_longest_beginning_that_is_a_path(draft: Draft, text: list[int]) -> None:
    longest = max((n for n in range(1, len(text) + 1) if tuple(text[:n]) in paths(draft)), default=0)
    assert draft_trees.accepted(draft, text) == longest


@given(draft=DRAFTS, limit=st.integers(-1, 12))
def test_cuts_are_prefixes_of_limited_depth(draft: Draft, limit: int) -> None:
    cut = draft_trees.cut(draft, limit)
    assert draft_trees.check(cut).tokens == draft.tokens[: len(cut.tokens)]
    assert (cut.parents is None) == (draft.parents is None)
    assert paths(cut) == {path for path in paths(draft) if len(path) <= limit}
    assert draft_trees.depth(cut) == max(map(len, paths(cut)), default=0)


@given(draft=DRAFTS)
def test_counts_by_depth(draft: Draft) -> None:
    lengths = sorted(map(len, paths(draft)))
    assert list(draft_trees.depths(draft)) == lengths
    assert draft_trees.nodes_by_depth(draft) == tuple(
        lengths.count(level) for level in range(1, max(lengths, default=0) + 1)
    )


@given(a=DRAFTS, b=DRAFTS, text=TEXT)
def test_a_fused_tree_is_the_union_and_accepts_the_better(a: Draft, b: Draft, text: list[int]) -> None:
    fused = draft_trees.check(draft_trees.fuse(a, b))
    assert paths(fused) == paths(a) | paths(b)
    assert draft_trees.accepted(fused, text) == max(draft_trees.accepted(a, text), draft_trees.accepted(b, text))
    assert len(fused.tokens) <= len(a.tokens) + len(b.tokens)


def test_among_siblings_the_first_draft_stands_first() -> None:
    a, b = Draft((7, 8)), Draft((5, 7, 6, 9), (-1, -1, 0, 1))
    assert draft_trees.fuse(a, b) == Draft((7, 5, 8, 9, 6), (-1, -1, 0, 0, 1))


@given(draft=DRAFTS, allowed=st.sets(st.integers(0, 3)))
def test_pruning_by_first_tokens(draft: Draft, allowed: set[int]) -> None:
    pruned = draft_trees.check(draft_trees.prune(draft, allowed_first_tokens=allowed))
    assert paths(pruned) == {path for path in paths(draft) if path[0] in allowed}
    assert (pruned.parents is None) == (draft.parents is None)


@given(draft=DRAFTS, data=st.data())
def test_pruning_by_path_probability(draft: Draft, data: st.DataObject) -> None:
    conditional = {path: data.draw(st.sampled_from([0.25, 0.5, 1.0])) for path in sorted(paths(draft))}
    ordered = _in_order(draft)
    probability = {path: _product(conditional, path) for path in ordered}
    given_parents = [conditional[path] for path in ordered]
    assert draft_trees.path_probabilities(draft, given_parents) == tuple(probability.values())
    floor, budget = data.draw(st.sampled_from([0.0, 0.3])), data.draw(st.none() | st.integers(0, 6))
    pruned = draft_trees.prune(
        draft,
        path_probabilities=[probability[path] for path in ordered],
        min_probability=floor,
        max_nodes=budget,
    )
    draft_trees.check(pruned)
    kept = paths(pruned)
    enough = [path for path in ordered if probability[path] >= floor]
    assert kept <= set(enough)
    assert len(kept) == (len(enough) if budget is None else min(budget, len(enough)))
    left = set(enough) - kept
    assert not left or min(probability[p] for p in kept or left) >= max(probability[p] for p in left) or budget == 0


def _in_order(draft: Draft) -> list[tuple[int, ...]]:
    parents = range(-1, len(draft.tokens)) if draft.parents is None else draft.parents
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, parents, strict=False):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def _product(conditional: dict[tuple[int, ...], float], path: tuple[int, ...]) -> float:
    value = 1.0
    for n in range(1, len(path) + 1):
        value *= conditional[path[:n]]
    return value


@pytest.mark.parametrize(
    ("draft", "fault"),
    [
        (Draft((1, 2), (-1,)), "one parent a token"),
        (Draft((1, 2), (-1, 1)), "node 1: parent must lie in"),
        (Draft((1, 2, 3), (-1, 0, -1)), "node 2: must not be shallower"),
        (Draft((1, 1), (-1, -1)), "distinct tokens"),
    ],
)
def test_broken_drafts_are_refused(draft: Draft, fault: str) -> None:
    with pytest.raises(CalibrationError, match=fault):
        draft_trees.check(draft)


def test_unfit_arguments_are_refused() -> None:
    draft = Draft((1, 2))
    with pytest.raises(CalibrationError, match="one number a node"):
        draft_trees.prune(draft, path_probabilities=[0.5])
    with pytest.raises(CalibrationError, match=r"path_probabilities\[1\].*0.5"):
        draft_trees.prune(draft, path_probabilities=[0.5, 0.6])
    with pytest.raises(CalibrationError, match="max_nodes: must be >= 0, got -1"):
        draft_trees.prune(draft, path_probabilities=[0.5, 0.5], max_nodes=-1)
    with pytest.raises(CalibrationError, match="need path_probabilities"):
        draft_trees.prune(draft, max_nodes=1)
    with pytest.raises(CalibrationError, match="parent must lie in"):
        draft_trees.breadth_first([1, 2], [-1, 1])
    with pytest.raises(CalibrationError, match="one parent a token"):
        draft_trees.breadth_first([1, 2], [-1])
