"""K-SEQ: its division factor and what it accepts."""

from __future__ import annotations

import numpy as np
import pytest
from enumeration import instances, random_pair
from hypothesis import given, settings

from calibration.verification import KSequential, division_factor


@settings(max_examples=200)
@given(instance=instances(most_drafts=4))
def test_acceptance_is_the_overlap_of_p_with_g_times_q(instance: tuple[np.ndarray, np.ndarray, int]) -> None:
    p, q, k = instance
    factor = division_factor(p, q, k)
    assert 1.0 <= factor <= k
    assert KSequential().acceptance(p, q, k) == pytest.approx(float(np.minimum(factor * q, p).sum()), abs=1e-12)


def test_a_smaller_factor_would_be_lossy() -> None:
    """Just below g*, the mass accepted via some token exceeds p: nothing can make up for it."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        p, q = rng.dirichlet(np.ones(4), size=2)
        smaller = 0.999 * division_factor(p, q, 3)
        share = np.minimum(q, p / smaller)
        accepted = share / share.sum() * (1.0 - (1.0 - share.sum()) ** 3)
        assert np.max(accepted - p) > 1e-6


def test_two_drafts_in_closed_form() -> None:
    """p = (a, 1 - a), q = (0, 1) ... the factor solves 1 - (1 - b)^2 = g b with b = min(1, (1 - a) / g)."""
    p, q = np.array([0.75, 0.25]), np.array([0.0, 1.0])
    # b = 1/(4 g): 2 b - b^2 = 1/4 -> b = 1 - sqrt(3)/2, g = 1/(4 b)
    b = 1.0 - np.sqrt(3.0) / 2.0
    assert division_factor(p, q, 2) == pytest.approx(0.25 / b, rel=1e-12)
    assert KSequential().acceptance(p, q, 2) == pytest.approx(0.25, abs=1e-12)


def test_a_large_vocabulary_keeps_the_identity() -> None:
    p, q = random_pair(np.random.default_rng(4), 150_000)
    for k in (2, 4, 8):
        overlap = float(np.minimum(division_factor(p, q, k) * q, p).sum())
        assert KSequential().acceptance(p, q, k) == pytest.approx(overlap, abs=1e-12)
