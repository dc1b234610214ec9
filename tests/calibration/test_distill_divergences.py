"""Divergences against plain numpy, closed forms, and gradients against finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from calibration.common.errors import CalibrationError
from calibration.training.learner import (
    divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    total_variation,
    total_variation_plus,
)

SMOOTH = ("fkl", "rkl", "jsd")


def drawn(seed: int, rows: int = 5, vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    return p, q


def naive(name: str, p_logits: np.ndarray, q_logits: np.ndarray, beta: float) -> np.ndarray:
    p, q = softmax(p_logits, -1), softmax(q_logits, -1)
    m = beta * p + (1 - beta) * q
    return {
        "fkl": rel_entr(p, q).sum(-1),
        "rkl": rel_entr(q, p).sum(-1),
        "jsd": beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1),
        "tvd": 1 - np.minimum(p, q).sum(-1),
    }[name]


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "tvd"])
@given(seed=st.integers(0, 2**32), beta=st.floats(0.05, 0.95))
def test_values_are_those_of_the_definitions(name, seed, beta):
    p, q = drawn(seed)
    found = divergence(name, beta)(p, q)
    assert found.shape == (5,)
    assert np.allclose(found.numpy(), naive(name, p.numpy(), q.numpy(), beta), atol=1e-12)
    assert np.allclose(divergence(name, beta)(p, p + 3.0).numpy(), 0, atol=1e-12)


def test_total_variation_is_the_rejection_of_speculative_sampling():
    """Drawn by hand: a token from q, accepted with min(1, p/q)."""
    p_logits, q_logits = drawn(1, rows=1)
    p, q = softmax(p_logits[0].numpy()), softmax(q_logits[0].numpy())
    rng = np.random.default_rng(0)
    tokens = rng.choice(7, 200_000, p=q)
    rejected = (rng.random(200_000) >= p[tokens] / q[tokens]).mean()
    assert float(total_variation(p_logits, q_logits)) == pytest.approx(rejected, abs=0.005)


def test_jsd_tends_to_both_kls_at_its_ends():
    p, q = drawn(2)
    small = 1e-6
    assert torch.allclose(jensen_shannon(p, q, small) / small, forward_kl(p, q), rtol=1e-3)
    assert torch.allclose(jensen_shannon(p, q, 1 - small) / small, reverse_kl(p, q), rtol=1e-3)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_finite_differences(name):
    p, q = drawn(3, rows=2)
    assert torch.autograd.gradcheck(lambda x: divergence(name, 0.3)(p, x), q.requires_grad_(True))


def test_the_gradient_of_total_variation():
    """d/dz_v of 1/2 sum |p - q| = q_v (E_q[s] - s_v) / 2 with s = sign(p - q)."""
    p, q = drawn(4, rows=3)
    q.requires_grad_(True)
    total_variation(p, q).sum().backward()
    dist, sign = q.detach().softmax(-1), torch.sign(p.softmax(-1) - q.detach().softmax(-1))
    wanted = 0.5 * dist * ((dist * sign).sum(-1, keepdim=True) - sign)
    assert torch.allclose(q.grad, wanted, atol=1e-12)
    step = 1e-6
    for row, token in itertools.product(range(3), range(7)):
        moved = q.detach().clone()
        moved[row, token] += step
        slope = (total_variation(p, moved) - total_variation(p, q.detach())).sum() / step
        assert float(slope) == pytest.approx(float(wanted[row, token]), abs=1e-5)


def test_tvd_plus_in_expectation_is_the_gradient_of_tvd_scaled():
    """grad TVD = -E_q[r grad log q]: with normalised rewards the mean drops out and 1 / std remains."""
    p, q = drawn(5)
    parts = []
    for function in (total_variation, total_variation_plus):
        leaf = q.clone().requires_grad_(True)
        function(p, leaf).sum().backward()
        parts.append(leaf.grad)
    dist = q.softmax(-1)
    mean = (dist * (p.softmax(-1) > dist)).sum(-1).mean()
    assert torch.allclose(parts[1] * (mean * (1 - mean)).sqrt(), parts[0], atol=1e-12)


def test_sampled_tvd_plus_points_the_same_way_with_less_spread_than_raw_rewards():
    p, q = drawn(6, rows=4000)
    p, q = p[:1].expand(4000, -1).clone(), q[:1].expand(4000, -1).clone()
    tokens = torch.multinomial(q.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    leaf = q.clone().requires_grad_(True)
    total_variation_plus(p, leaf, tokens).sum().backward()
    exact = q[:1].clone().requires_grad_(True)
    total_variation(p[:1], exact).sum().backward()
    dist, drawn_one = q.softmax(-1), torch.nn.functional.one_hot(tokens, 7)
    reward = (p.softmax(-1) > dist).double().gather(-1, tokens[:, None])
    raw = -reward * (drawn_one - dist)
    std = reward.std(correction=0)
    normalised = leaf.grad * std
    error = normalised.std(0) / 4000**0.5
    assert ((normalised.mean(0) - exact.grad[0]).abs() < 4 * error + 1e-6).all()
    assert normalised.var(0).sum() < raw.var(0).sum()


@pytest.mark.parametrize("name", [*SMOOTH, "tvd", "tvd++"])
def test_the_verifier_takes_no_gradient_and_far_tails_stay_finite(name):
    p, q = drawn(7)
    p[:, 0], q[:, 1] = -1e4, -1e4
    p.requires_grad_(True)
    q.requires_grad_(True)
    divergence(name)(p, q).sum().backward()
    assert p.grad is None
    assert torch.isfinite(q.grad).all()


def test_faults():
    with pytest.raises(CalibrationError, match="not known, got 'fk'; did you mean 'fkl'"):
        divergence("fk")
    p, q = drawn(8)
    with pytest.raises(CalibrationError, match=r"must lie in \(0, 1\), got 1"):
        jensen_shannon(p, q, 1.0)
    assert np.allclose(forward_kl(p, q).numpy(), naive("fkl", p.numpy(), q.numpy(), 0.5))
