"""The classifier of prompts: what it learns, and what it must not see."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import random_runs, traces_of
from scipy.sparse import csr_matrix
from several import COSTS, routed, several

from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator import simulate
from simulator.drafter_routing.make import mean_accepted
from simulator.drafter_routing.prompts import (
    equal_rows,
    naive_bayes,
    out_of_fold,
    prompt_contexts,
    token_counts,
)
from simulator.playback.replay import select_sequences
from simulator.playback.signals import DrafterRecording

ACCEPTED = {"policy": "classifier", "by": "accepted"}


def separable(rng: np.random.Generator, number: int = 60, *, informative: bool = True) -> TraceSet:
    """Two kinds of prompts with words of their own (or not), each liked by another drafter."""
    kinds = rng.integers(0, 2, number)
    runs = {
        name: [random_runs(rng, 40, alpha=0.9 if kind == own else 0.1) for kind in kinds]
        for own, name in enumerate(("a", "b"))
    }
    prompts = [rng.integers(0, 40, 20) + (1000 + 20 * kind if informative else 0) for kind in kinds]
    return several(runs, prompts=[prompt.tolist() for prompt in prompts])


def test_it_routes_each_prompt_to_the_drafter_that_likes_its_kind() -> None:
    traces = separable(np.random.default_rng(0))
    result = simulate(routed(ACCEPTED, 4), traces)
    told = result.summary["drafter_routing"]
    assert told["held_out_accuracy"] > 0.9
    best = simulate(routed({"policy": "oracle_request"}, 4), traces).requests["rounds"].to_numpy().sum()
    single = min(
        simulate(routed(None, 4, drafters=[name]), traces).requests["rounds"].to_numpy().sum() for name in ("a", "b")
    )
    routed_rounds = result.requests["rounds"].to_numpy().sum()
    assert best <= routed_rounds < 0.75 * single


def test_prompts_that_say_nothing_are_guessed_no_better_than_by_chance() -> None:
    """With labels unrelated to the words, a model that saw a prompt's own label would still get it right."""
    accuracies = [
        simulate(routed(ACCEPTED, 4), separable(np.random.default_rng(seed), 80, informative=False)).summary[
            "drafter_routing"
        ]["held_out_accuracy"]
        for seed in range(4)
    ]
    # 320 guesses in all: the standard error of a coin is .028.
    assert abs(np.mean(accuracies) - 0.5) < 0.1


@given(st.integers(0, 2**32), st.integers(2, 6))
@settings(max_examples=40)
def test_no_prompt_is_classified_with_its_own_label(seed: int, folds: int) -> None:
    """Whatever label a prompt has, its own guess stays the same; its equals change with it."""
    rng = np.random.default_rng(seed)
    counts = csr_matrix(rng.integers(0, 3, (12, 6)).astype(float))
    labels = rng.integers(0, 3, 12)
    guesses = out_of_fold(counts, labels, 3, folds, seed)
    row = int(rng.integers(12))
    twins = equal_rows(counts) == equal_rows(counts)[row]
    changed = np.where(twins, (labels + 1) % 3, labels)
    assert out_of_fold(counts, changed, 3, folds, seed)[row] == guesses[row]


def test_naive_bayes_counts_as_it_should() -> None:
    texts, labels = [[0, 0, 1], [1, 2], [2, 2, 2]], [0, 0, 1]
    counts = csr_matrix(np.array([[text.count(token) for token in range(3)] for text in texts], dtype=float))
    prior, likelihood = naive_bayes(counts, np.array(labels), 3)
    for kind in range(3):
        words = Counter(token for text, label in zip(texts, labels, strict=True) if label == kind for token in text)
        share = labels.count(kind) / 3
        assert prior[kind] == (pytest.approx(math.log(share)) if share else -math.inf)
        for token in range(3):
            assert likelihood[kind, token] == pytest.approx(math.log((1 + words[token]) / (3 + words.total())))


def test_contexts_are_the_distinct_prompts_and_their_cosines() -> None:
    traces = several({"a": [[0, 0]] * 3, "b": [[0, 0]] * 3}, prompts=[[5, 9, 5], [7], [9, 5, 5]])
    context_of, similarity = prompt_contexts(token_counts(traces, select_sequences(traces), "a test"))
    assert context_of == [0, 1, 0]
    assert similarity == pytest.approx(np.eye(2))
    other = several({"a": [[0, 0]] * 2}, prompts=[[5, 9, 5], [5]])
    _, similarity = prompt_contexts(token_counts(other, select_sequences(other), "a test"))
    assert similarity[0, 1] == pytest.approx(2 / math.sqrt(5))


def test_labels_weigh_prices_where_asked() -> None:
    """Drafter b accepts a little more and costs a hundred times as much."""
    rng = np.random.default_rng(1)
    runs = {name: [random_runs(rng, 60, alpha=alpha) for _ in range(20)] for name, alpha in (("a", 0.6), ("b", 0.8))}
    traces = several(runs, prompts=[[i, i + 1] for i in range(20)])
    dear = {"kind": "linear", "base_s": 0.3, "per_token_s": 0.02, "per_context_token_s": 0.0002}
    drafted = {}
    for by in ("accepted", "tokens_per_second"):
        scenario = routed({"policy": "classifier", "by": by}, 4, costs={**COSTS, "drafters": {"b": dear}})
        tally = simulate(scenario, traces).summary["drafter_routing"]["drafters"]
        drafted[by] = {name: part["rounds"] for name, part in tally.items()}
    assert drafted["accepted"]["b"] > drafted["accepted"]["a"]
    assert drafted["tokens_per_second"]["b"] == 0


@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=9), min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=40)
def test_expected_accepted_tokens_of_sampled_drafts(rows: list[list[float]], longest: int) -> None:
    traces = traces_of([[0] * len(row) for row in rows], probabilities=rows)
    table = select_sequences(traces)
    values = mean_accepted(DrafterRecording(traces, "drafter", table), longest)
    for row, value in zip(rows, values, strict=True):
        each = [
            sum(math.prod(row[t : t + j]) for j in range(1, longest + 1) if t + j <= len(row))
            for t in range(1, len(row))
        ]
        assert value == pytest.approx(np.mean(each), abs=1e-6)


def test_recorded_runs_are_averaged_as_they_are() -> None:
    traces = traces_of([[0, 3, 2, 1, 0], [1, 0]])
    assert mean_accepted(DrafterRecording(traces, "drafter", select_sequences(traces)), 2) == pytest.approx(
        [5 / 4, 0]
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"policy": "classifier"}, "must be recorded for routing.drafter policy 'classifier'; missing for 3 of 3"),
        ({"policy": "pak_ucb"}, "policy 'pak_ucb' with features 'tokens'; missing for 3 of 3 sequences, first 'req"),
    ],
)
def test_prompts_without_token_ids_are_refused(rule: dict[str, str], message: str) -> None:
    traces = several({"a": [[0, 0]] * 3, "b": [[0, 0]] * 3})
    with pytest.raises(ReplayError, match=r"sequences\.parquet: column 'prompt_token_ids': .*" + message):
        simulate(routed(rule), traces)


def test_equal_prompts_teach_nothing() -> None:
    traces = several({"a": [[0, 0]] * 3, "b": [[0, 0]] * 3}, prompts=[[1, 2]] * 3)
    with pytest.raises(ReplayError, match="at least 2 different prompts"):
        simulate(routed({"policy": "classifier"}), traces)
