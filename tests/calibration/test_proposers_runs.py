"""What every proposer promises: schedules do not matter, shorter drafts are cuts, proposing changes nothing."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposers_drawn import CORPUS, KINDS, TEXT, paths

import calibration.proposers
from calibration.common.errors import CalibrationError
from calibration.proposers import (
    Datastore,
    Draft,
    LookupSettings,
    Proposer,
    RetrievalSettings,
    SuffixSettings,
    draft_trees,
    make,
    maker,
    proposals,
    run_lengths,
)
from calibration.proposers.lookup import lookup_runs
from calibration.traces import bundled

EVERY = pytest.mark.parametrize("kind", KINDS)


def fresh(kind: str, corpus: list[list[int]]) -> Proposer:
    settings, takes = KINDS[kind]
    return make(settings, corpus=corpus if takes else None)


def follows(draft: Draft, text: list[int]) -> int:
    """How long a beginning of `text` is a path of the draft."""
    depth = 0
    while depth < len(text) and tuple(text[: depth + 1]) in paths(draft):
        depth += 1
    return depth


@EVERY
@given(prompt=TEXT, output=TEXT, corpus=CORPUS, data=st.data())
def test_a_live_loop_accepts_what_was_recorded(
    kind: str, prompt: list[int], output: list[int], corpus: list[list[int]], data: st.DataObject
) -> None:
    recorded = run_lengths(proposals(fresh(kind, corpus), prompt, output, 8), output)
    live = fresh(kind, corpus)
    live.extend(prompt)
    t = 0
    while t < len(output):
        k = data.draw(st.integers(0, 8))
        draft = live.propose(k)
        hits = follows(draft, output[t:])
        assert hits == min(recorded.run[t], k)
        assert draft_trees.depth(draft) == min(recorded.depth[t], k)
        if draft.tokens:
            assert len(draft.tokens) == recorded.nodes[t, min(k, recorded.nodes.shape[1]) - 1]
        live.extend(output[t : t + hits + 1])
        t += hits + 1


@EVERY
@given(tokens=TEXT, corpus=CORPUS, short=st.integers(0, 9), long=st.integers(0, 9))
def test_shorter_drafts_are_cuts_and_keep_the_contract(
    kind: str, tokens: list[int], corpus: list[list[int]], short: int, long: int
) -> None:
    short, long = sorted((short, long))
    proposer = fresh(kind, corpus)
    proposer.extend(tokens)
    draft = draft_trees.check(proposer.propose(long))
    assert draft_trees.depth(draft) <= long
    assert proposer.propose(short) == draft_trees.cut(draft, short)


@EVERY
@given(first=TEXT, second=TEXT, corpus=CORPUS)
def test_proposing_changes_nothing(kind: str, first: list[int], second: list[int], corpus: list[list[int]]) -> None:
    asked, silent = fresh(kind, corpus), fresh(kind, corpus)
    for token in first + second:
        asked.propose(3)
        assert asked.propose(8) == asked.propose(8)
        asked.extend([token])
    silent.extend(first)
    silent.extend(second)
    assert asked.propose(8) == silent.propose(8)


@EVERY
@given(one=TEXT, two=TEXT, corpus=CORPUS)
def test_requests_of_one_maker_do_not_hear_of_each_other(
    kind: str, one: list[int], two: list[int], corpus: list[list[int]]
) -> None:
    settings, takes = KINDS[kind]
    shared = maker(settings, corpus=corpus if takes else None)
    a, b = shared(), shared()
    for i in range(max(len(one), len(two))):
        a.extend(one[i : i + 1])
        b.extend(two[i : i + 1])
    assert a.propose(8) == proposals(fresh(kind, corpus), one, [0], 8)[0]
    assert b.propose(8) == proposals(fresh(kind, corpus), two, [0], 8)[0]


@given(prompt=TEXT, output=TEXT)
def test_prompt_lookup_records_what_it_always_did(prompt: list[int], output: list[int]) -> None:
    runs = run_lengths(proposals(make(LookupSettings()), prompt, output, 20), output)
    assert (runs.run.tolist(), runs.depth.tolist()) == lookup_runs(prompt, output)


@pytest.mark.parametrize("name", ["smollm2-135m-cpu-greedy", "smollm2-135m-cpu-sampled"])
def test_bundled_recordings_of_prompt_lookup_are_reproduced(name: str) -> None:
    traces = bundled(name)
    positions = traces.frame("positions").query("drafter == 'prompt-lookup'")
    fresh_lookup = maker(LookupSettings())
    for sequence in traces.sequences.to_pylist():
        output = sequence["output_token_ids"]
        runs = run_lengths(proposals(fresh_lookup(), sequence["prompt_token_ids"], output, 20), output)
        recorded = positions[positions["sequence_id"] == sequence["sequence_id"]].sort_values("position")
        assert runs.run.tolist() == recorded["run_length"].tolist()
        assert runs.depth.tolist() == recorded["proposal_length"].tolist()


def test_runs_of_trees_count_nodes_by_depth() -> None:
    tree = Draft((1, 2, 3, 4, 5), (-1, -1, 1, 1, 3))
    runs = run_lengths([tree, Draft((9, 9)), Draft(())], [2, 4, 5])
    assert runs.run.tolist() == [3, 0, 0]
    assert runs.depth.tolist() == [3, 2, 0]
    assert runs.nodes.tolist() == [[2, 4, 5], [1, 2, 2], [0, 0, 0]]


def test_runs_end_with_the_text_and_need_a_draft_a_position() -> None:
    runs = run_lengths([Draft((7, 8, 9)), Draft((8, 9))], [7, 8])
    assert runs.run.tolist() == [2, 1]
    assert run_lengths([], []).nodes.shape == (0, 0)
    with pytest.raises(ValueError, match="one a position"):
        run_lengths([Draft(())], [])


def test_corpora_and_datastores_go_where_they_are_used() -> None:
    store = Datastore.build([[1, 2, 3]])
    proposer = make(RetrievalSettings(), datastore=store)
    proposer.extend([1, 2])
    assert proposer.propose(4) == Draft((3,), (-1,))
    with pytest.raises(CalibrationError, match="retrieval: needs a corpus or a datastore, got neither"):
        make(RetrievalSettings())
    with pytest.raises(CalibrationError, match="got both"):
        make(RetrievalSettings(), corpus=[[1]], datastore=store)
    with pytest.raises(CalibrationError, match="prompt lookup takes none"):
        make(LookupSettings(), corpus=[[1]])
    with pytest.raises(CalibrationError, match="for retrieval alone"):
        make(SuffixSettings(), datastore=store)
    with pytest.raises(CalibrationError, match=r"ngram_min.*max_draft_tokens"):
        LookupSettings(ngram_min=4, max_draft_tokens=0)


def test_every_proposer_drafts_something_on_text_that_repeats() -> None:
    text = np.random.default_rng(1).integers(0, 40, 60).tolist()
    for kind, (settings, takes) in KINDS.items():
        runs = run_lengths(proposals(make(settings, corpus=[text] if takes else None), text, text, 4), text)
        assert runs.run.mean() > 1.5, kind


def test_the_example_of_the_package_holds() -> None:
    outcome = doctest.testmod(calibration.proposers)
    assert outcome.attempted >= 4
    assert outcome.failed == 0
