"""The speculation memory against weights summed by hand, and what its stopping rule learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposers_drawn import CORPUS, TEXT

from calibration.common.errors import CalibrationError
from calibration.proposers import Memory, MemoryProposer, MemorySettings

SETTINGS = MemorySettings(max_order=3, half_life=1.0, thresholds=(0.1, 0.3, 0.6, 1.0), first_threshold=0.3)


def recalled(
    tokens: list[int], corpus: list[list[int]], settings: MemorySettings, limit: int
) -> tuple[list[int], list[float]]:
    """Draft and hit scores with no threshold, from all occurrences of every run."""
    draft: list[int] = []
    scores: list[float] = []
    score, now = 1.0, len(tokens)
    while len(draft) < limit:
        text = [*tokens, *draft]
        for order in range(min(settings.max_order, len(text)), settings.min_order - 1, -1):
            run = text[len(text) - order :]
            seen = [
                (other[s + order], 0, settings.corpus_weight)
                for other in corpus
                for s in range(len(other) - order)
                if other[s : s + order] == run
            ]
            seen += [
                (tokens[s + order], s + order, 1.0)
                for s in range(len(tokens) - order)
                if tokens[s : s + order] == run
            ]
            if seen:
                break
        else:
            return draft, scores
        weights: dict[int, float] = {}
        last: dict[int, int] = {}
        for place, (token, when, amount) in enumerate(seen):
            weights[token] = weights.get(token, 0.0) + amount * 0.5 ** ((now - when) / settings.half_life)
            last[token] = place
        best = max(weights, key=lambda token: (weights[token], last[token]))
        score *= weights[best] / (sum(weights.values()) + settings.doubt)
        draft.append(best)
        scores.append(score)
    return draft, scores


def above(scores: list[float], theta: float) -> int:
    """How many scores come before the first that is not above `theta`."""
    return next((i for i, score in enumerate(scores) if score <= theta), len(scores))


@given(tokens=TEXT, corpus=CORPUS, limit=st.integers(0, 6), theta=st.sampled_from([0.05, 0.37]))
def test_drafts_equal_sums_of_weights(tokens: list[int], corpus: list[list[int]], limit: int, theta: float) -> None:
    # weights of one and of a half a token ago are powers of two: sums are exact, and so are ties
    settings = replace(SETTINGS, corpus_weight=0.5, thresholds=(theta,), first_threshold=theta)
    proposer = MemoryProposer(settings, Memory(settings, corpus))
    proposer.extend(tokens)
    draft, scores = recalled(tokens, corpus, settings, limit)
    assert list(proposer.propose(limit).tokens) == draft[: above(scores, theta)]


@given(tokens=TEXT, warm_up=st.integers(0, 4))
def test_the_threshold_is_the_best_average_over_all_settled_positions(tokens: list[int], warm_up: int) -> None:
    settings = replace(SETTINGS, warm_up=warm_up, rate=0.25, max_draft_tokens=4)
    settled: list[tuple[int, int, np.ndarray]] = []
    for t in range(1, len(tokens)):
        draft, scores = recalled(tokens[:t], [], settings, 4)
        draft = draft[: above(scores, settings.thresholds[0])]
        if not draft:
            continue
        run = 0
        while run < min(len(draft), len(tokens) - t) and draft[run] == tokens[t + run]:
            run += 1
        if run == len(draft) or t + run < len(tokens):
            proposed = np.array([above(scores[: len(draft)], theta) for theta in settings.thresholds])
            earned = np.minimum(run, proposed) - settings.draft_cost * proposed
            settled.append((t + min(run + 1, len(draft)), t, earned))
    average = np.zeros(len(settings.thresholds))
    for _, _, earned in sorted(settled, key=lambda item: item[:2]):
        average += settings.rate * (earned - average)
    expected = settings.first_threshold
    if len(settled) > warm_up:
        expected = max(zip(average.tolist(), settings.thresholds, strict=True))[1]
    proposer = MemoryProposer(settings)
    proposer.extend(tokens)
    assert proposer.threshold == expected


def test_the_rule_drafts_long_in_loops_stops_in_noise_and_recovers() -> None:
    rng = np.random.default_rng(0)
    proposer = MemoryProposer(MemorySettings())
    loop = [5, 6, 7, 8, 9, 10]
    proposer.extend(loop * 20)
    assert proposer.propose(8).tokens == (5, 6, 7, 8, 9, 10, 5, 6)
    # every pair of tokens is as likely as any other: what followed once says nothing
    proposer.extend(rng.integers(0, 30, 1500).tolist())
    assert proposer.threshold == 1.0
    assert proposer.propose(8).tokens == ()
    proposer.extend(loop * 30)
    assert proposer.propose(8).tokens == (5, 6, 7, 8, 9, 10, 5, 6)


def test_unfit_settings_are_refused() -> None:
    with pytest.raises(CalibrationError, match="orders"):
        MemoryProposer(MemorySettings(max_order=3), Memory(MemorySettings(max_order=4)))
    with pytest.raises(CalibrationError) as caught:
        MemorySettings(min_order=5, half_life=0, thresholds=(0.5, 0.2), first_threshold=0.4, rate=2, doubt=-1)
    for name in ("min_order", "half_life", "thresholds", "first_threshold", "rate", "doubt"):
        assert name in str(caught.value)
