"""Drafters with a trimmed head: what is kept, what q becomes, and replay against the live loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distilled import tiny_corpus
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from replayed import GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, written
from tiny import random_prompts

from calibration.common.errors import CalibrationError
from calibration.drafters import EarlyExit, PromptLookup, Trimmed, build_drafter
from calibration.drafters.standalone import most_frequent, save_token_counts, token_counts
from calibration.drafters.trimmed_head import PaddedHead, TrimmedHead
from calibration.models.sampling import processed


@pytest.fixture(scope="module")
def counts_path(tiny, tmp_path_factory):
    """What the verifier writes to some prompts, as a table."""
    counts = np.zeros(97, dtype=np.int64)
    for output in written(tiny, GREEDY, random_prompts(3, 12), 30):
        np.add.at(counts, list(output.ids), 1)
    path = tmp_path_factory.mktemp("counts") / "counts.csv"
    save_token_counts(counts, path)
    return str(path)


def trimmed(path, **changed):
    return Trimmed(drafter=EarlyExit(layers=3), counts_path=path, **changed)


@given(st.lists(st.integers(0, 9), min_size=5, max_size=30).filter(any), st.floats(0.01, 1), st.data())
def test_the_most_frequent_tokens(counts, coverage, data):
    counts = np.array(counts)
    size = data.draw(st.integers(1, len(counts)))
    kept = most_frequent(counts, size)
    left_out = np.delete(counts, kept)
    assert len(kept) == size
    assert (np.diff(kept) > 0).all()
    assert counts[kept].min() >= left_out.max(initial=0)
    covered = most_frequent(counts, coverage=coverage)
    share = counts[covered].sum() / counts.sum()
    assert share >= coverage - 1e-9
    fewer = most_frequent(counts, len(covered) - 1)
    assert counts[fewer].sum() / counts.sum() < coverage


def test_counts_are_written_and_read(tmp_path):
    counts = np.array([0, 5, 0, 2, 5])
    save_token_counts(counts, tmp_path / "c.csv")
    assert (tmp_path / "c.csv").read_text().split() == ['"token","count"', "1,5", "4,5", "3,2"]
    assert token_counts(tmp_path / "c.csv", 5).tolist() == counts.tolist()
    with pytest.raises(CalibrationError, match=r"tokens must lie in \[0, 3\], got 4"):
        token_counts(tmp_path / "c.csv", 4)


def test_a_corpus_is_counted(tiny, tmp_path):
    texts = tiny_corpus(tiny, tmp_path / "corpus", count=8)
    wanted = np.bincount([i for text in texts for i in text.output_ids], minlength=97)
    assert token_counts(tmp_path / "corpus", 97).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("token,count\n1,-2\n", "count must be >= 0"),
        ("a,b\n1,2\n", "integer columns"),
        ("token,count\n1,0\n", "none"),
    ],
)
def test_broken_tables_are_refused(tmp_path, text, words):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(CalibrationError, match=words):
        token_counts(tmp_path / "c.csv", 5)
    with pytest.raises(CalibrationError, match="must be a TraceSet"):
        token_counts(tmp_path, 5)


def test_q_is_the_whole_q_on_the_kept_tokens_normalised(tiny, counts_path):
    whole = EarlyExit(layers=3).build(tiny)
    drafter = trimmed(counts_path, tokens=20).build(tiny)
    kept = most_frequent(token_counts(counts_path, 97), 20)
    tokens = torch.tensor(random_prompts(0, 2, 9, 9))
    q = torch.softmax(whole.model(input_ids=tokens).logits, -1)
    cut = torch.zeros_like(q)
    cut[..., kept] = q[..., kept]
    found = torch.softmax(drafter.model(input_ids=tokens).logits, -1)
    torch.testing.assert_close(found, cut / cut.sum(-1, keepdim=True))
    torch.testing.assert_close(torch.softmax(whole.model(input_ids=tokens).logits, -1), q)  # the whole one stays


def test_only_the_kept_rows_are_multiplied(tiny):
    head = TrimmedHead(tiny.model.lm_head, torch.tensor([3, 5, 8]))
    assert head.weight.shape == (3, 32)
    assert sum(p.numel() for p in head.parameters()) == 96
    with pytest.raises(CalibrationError, match="one linear layer, got PaddedHead"):
        TrimmedHead(PaddedHead(tiny.model.lm_head, 100), torch.tensor([3]))


def test_the_manifest_says_what_was_kept(tiny, counts_path):
    info = trimmed(counts_path, coverage=0.9).build(tiny).info
    told = info.settings
    assert told["coverage"] >= 0.9
    assert told["drafter"] == {"paradigm": "early-exit", "exit_layer": 3}
    assert len(told["counts_sha256"]) == len(told["kept_sha256"]) == 64
    assert info.name == "exit-3-vocab-0.9"
    # The body and the embedding of three layers as before, and a head of its own.
    assert info.parameters == EarlyExit(layers=3).build(tiny).info.parameters + 32 * told["tokens"]
    assert info.parameters_non_embedding == EarlyExit(layers=3).build(tiny).info.parameters_non_embedding


def test_live_rounds_are_those_of_the_replay(tiny, counts_path):
    assert same_rounds(tiny, trimmed(counts_path, tokens=30).build(tiny)) > 10


def test_greedy_match_is_the_largest_kept_logit(tiny, counts_path):
    drafter = trimmed(counts_path, tokens=12).build(tiny)
    kept = most_frequent(token_counts(counts_path, 97), 12).tolist()
    whole = EarlyExit(layers=3).build(tiny).model
    prompts = random_prompts(11, 3)
    outputs = written(tiny, GREEDY, prompts, 12)
    recording = recorded(tiny, [drafter], prompts, outputs, GREEDY)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        accept = rows_of(recording.positions, f"r{row}", drafter.name)["accept_probability"]
        for t, token in enumerate(output.ids):
            logits = whole(input_ids=torch.tensor([[*prompt, *output.ids[:t]]])).logits[0, -1]
            assert accept[t] == (max(kept, key=lambda i: float(logits[i])) == token)


def test_sampled_acceptance_is_the_overlap_on_the_kept_tokens(tiny, counts_path):
    """sum of min(p, q') over the kept, and 0 for an emitted token that is not among them."""
    drafter = trimmed(counts_path, tokens=12).build(tiny)
    kept = set(most_frequent(token_counts(counts_path, 97), 12).tolist())
    prompts = random_prompts(2, 6)
    runs = live(tiny, drafter, prompts, 3, SAMPLED, 16)
    recording = recorded(tiny, [drafter], prompts, runs, SAMPLED)
    outside = 0
    for row, (prompt, run) in enumerate(zip(prompts, runs, strict=True)):
        rows = rows_of(recording.positions, f"r{row}", drafter.name)
        for t, token in enumerate(run.ids):
            text = torch.tensor([[*prompt, *run.ids[:t]]])
            p, q = (processed(m(input_ids=text).logits[0, -1], SAMPLED) for m in (tiny.model, drafter.model))
            assert rows["overlap"][t] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-5)
            if token not in kept:
                assert rows["accept_probability"][t] == 0
                outside += 1
    assert outside > 5


def test_settings_that_do_not_fit_are_refused(tiny, counts_path):
    for size in ({}, {"tokens": 5, "coverage": 0.5}):
        with pytest.raises(ValidationError, match="one of tokens and coverage"):
            trimmed(counts_path, **size)
    with pytest.raises(CalibrationError, match="tokens must be at most the vocabulary's 97, got 98"):
        build_drafter(trimmed(counts_path, tokens=98), tiny)
    with pytest.raises(CalibrationError, match=r"must be a causal LM that sees tokens alone .* got prompt-lookup"):
        build_drafter(Trimmed(drafter=PromptLookup(), counts_path=counts_path, tokens=9), tiny)


def test_a_step_runs(tiny, counts_path):
    assert trimmed(counts_path, tokens=20).build(tiny).step(2, 16, torch.Generator())() > 0
