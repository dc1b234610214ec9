"""Divergences between the verifier's p and a student's q, per position, from logits; pure functions of torch.

    fkl      KL(p || q) = sum p (log p - log q)                       forward: q must cover p
    rkl      KL(q || p)                                               reverse: q may leave parts of p out
    jsd      beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    tvd      1/2 sum |p - q| = 1 - sum min(p, q)                      1 - acceptance of speculative sampling
    tvd++    the policy-gradient form of tvd with normalised rewards

Sources: for the first four Zhou and others, "DistillSpec: Improving Speculative Decoding via Knowledge Distillation"
(2024); for tvd++ Goel and others, "Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned
LLMs" (2024). Logits are [..., vocabulary], float; a divergence is [...]. Gradients flow into q only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.trained.settings import DivergenceName

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(verifier's logits, student's logits) [..., vocabulary] -> [...]."""


def forward_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Give KL(p || q) in nats."""
    p = p_logits.detach().log_softmax(-1)
    return (p.exp() * (p - q_logits.log_softmax(-1))).sum(-1)


def reverse_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Give KL(q || p) in nats."""
    p, q = p_logits.detach().log_softmax(-1), q_logits.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Give the generalised Jensen-Shannon divergence with weight `beta` on p, 0 < beta < 1, in nats."""
    if not 0 < beta < 1:
        raise CalibrationError(f"beta: must lie in (0, 1), got {beta}")
    p, q = p_logits.detach().log_softmax(-1), q_logits.log_softmax(-1)
    weights = torch.tensor([beta, 1 - beta], dtype=q.dtype, device=q.device).log()
    m = torch.logaddexp(p + weights[0], q + weights[1])
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Give 1/2 sum |p - q|, the probability that speculative sampling rejects a draft from q."""
    return 0.5 * (p_logits.detach().softmax(-1) - q_logits.softmax(-1)).abs().sum(-1)


def total_variation_plus(p_logits: Tensor, q_logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Give a surrogate whose gradient is -E[A(y) grad log q(y)], y drawn from q; its value has no meaning.

    A = (r - mean r) / std r over all positions given at once, with the reward r(y) = 1 where p(y) > q(y). With
    A = r it would be the gradient of the total variation. ``tokens`` [...]: one draw of y from q at each position,
    as direct alignment has it; None takes the expectation over y in full, where the mean drops out and only the
    scale 1 / std remains.
    """
    p, q = p_logits.detach().log_softmax(-1), q_logits.log_softmax(-1)
    reward = (p > q.detach()).to(q.dtype)
    if tokens is not None:
        drawn = reward.gather(-1, tokens[..., None])[..., 0]
        return -_normalised(drawn, drawn.mean()) * q.gather(-1, tokens[..., None])[..., 0]
    weight = q.detach().exp()
    mean = (weight * reward).sum(-1).mean()
    return -(q.exp() * _normalised(reward, mean)).sum(-1)


def _normalised(reward: Tensor, mean: Tensor) -> Tensor:
    """Give (reward - mean) / std of rewards that are 0 or 1."""
    return (reward - mean) / (mean * (1 - mean)).clamp(min=1e-6).sqrt()


def divergence(name: DivergenceName, beta: float = 0.5) -> Divergence:
    """Give the divergence `name`; `beta` is that of ``jsd``. `CalibrationError` for an unknown name."""
    known: dict[str, Divergence] = {
        "fkl": forward_kl,
        "rkl": reverse_kl,
        "jsd": lambda p, q: jensen_shannon(p, q, beta),
        "tvd": total_variation,
        "tvd++": total_variation_plus,
    }
    if name not in known:
        raise CalibrationError(f"divergence: not known, got '{name}'{did_you_mean(name, get_args(DivergenceName))}")
    return known[name]
