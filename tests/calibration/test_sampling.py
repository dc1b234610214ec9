"""Distributions and draws against plain Python and against the identities of speculative sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import calibration.models.sampling as sampling
from calibration.models.sampling import distribution, draw, entropy, generator_for, processed, residual
from calibration.traces import DecodingInfo

LOGITS = st.lists(st.integers(-32, 32).map(lambda i: i / 4), min_size=2, max_size=40)
WEIGHTS = st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any)


def nucleus(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Top-p by the book: take tokens from the largest down until the mass reaches `top_p`."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    mass, last = 0.0, 0.0
    for p in sorted(probs, reverse=True):
        mass, last = mass + p, p
        if mass >= top_p:
            break
    kept = [p if p >= last * (1 - 1e-6) else 0.0 for p in probs]
    return [p / sum(kept) for p in kept]


@given(LOGITS, st.sampled_from([0.5, 0.8, 1.0, 1.7]), st.sampled_from([0.1, 0.5, 0.9, 0.95]))
def test_top_p_keeps_the_smallest_set_that_reaches_its_mass(logits, temperature, top_p):
    got = distribution(torch.tensor([logits]), temperature, top_p)[0].tolist()
    low, high = (nucleus(logits, temperature, top_p + shift) for shift in (-1e-5, 1e-5))
    # A mass that reaches top_p to the last bit may fall either way in float32.
    assert any(got == pytest.approx(wanted, abs=2e-5) for wanted in (low, high))


@given(LOGITS, st.sampled_from([0.5, 1.0, 2.0]))
def test_without_top_p_it_is_the_softmax(logits, temperature):
    got = distribution(torch.tensor(logits), temperature).double().numpy()
    scaled = np.asarray(logits) / temperature
    wanted = np.exp(scaled - scaled.max())
    np.testing.assert_allclose(got, wanted / wanted.sum(), rtol=1e-5, atol=1e-8)


def test_rows_wider_than_the_sorted_head_come_out_the_same(monkeypatch):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 4, 50)[:, None]
    whole = distribution(logits, 0.8, 0.9)
    monkeypatch.setattr(sampling, "HEAD", 16)
    widths = (whole > 0).sum(-1)
    assert widths.min() < 16 < widths.max()
    torch.testing.assert_close(distribution(logits, 0.8, 0.9), whole)


def test_shapes_are_kept_and_greedy_is_not_cut():
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    sampled = processed(logits, DecodingInfo(mode="sampled", temperature=0.7, top_p=0.5))
    greedy = processed(logits, DecodingInfo(mode="greedy"))
    assert sampled.shape == greedy.shape == logits.shape
    assert (sampled == 0).any()
    torch.testing.assert_close(greedy, torch.softmax(logits, -1))


def test_entropy_of_known_distributions():
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert entropy(probs).tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])


@given(WEIGHTS, WEIGHTS)
def test_accepting_and_resampling_gives_back_the_verifiers_distribution(a, b):
    """min(p, q) + (1 - sum min(p, q)) * residual = p: what makes speculative sampling lossless."""
    p, q = (torch.tensor([w], dtype=torch.float64) / sum(w) for w in (a, b))
    accepted = torch.minimum(p, q)
    emitted = accepted + (1 - accepted.sum()) * residual(p, q)
    torch.testing.assert_close(emitted, p)


def test_residual_behind_the_last_draft_is_the_bonus_distribution():
    p = torch.tensor([[0.2, 0.3, 0.5]])
    torch.testing.assert_close(residual(p, torch.zeros_like(p)), p)
    torch.testing.assert_close(residual(p, p), p)


def test_draws_follow_the_distribution_and_never_leave_its_support():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = draw(probs.expand(20_000, 4), generator_for(torch.device("cpu"), 3))
    counts = np.bincount(drawn.numpy(), minlength=4)
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3]], 20_000 * np.array([0.5, 0.3, 0.2])).pvalue > 1e-3


def test_generators_differ_by_every_part_of_the_seed_and_repeat():
    def first(*seed: int) -> float:
        return float(torch.rand(1, generator=generator_for(torch.device("cpu"), *seed)))

    assert first(1, 2) == first(1, 2)
    assert len({first(1, 2), first(2, 1), first(1, 3), first(0, 0)}) == 4
