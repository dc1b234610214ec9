"""Rollouts: what a drafter feels along its own draft, also beyond the token where the text leaves it."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.models.lane import Lane
from calibration.models.sampling import choose, entropy, processed
from calibration.traces.manifest import DecodingInfo


@torch.inference_mode()
def rollout(
    lane: Lane,
    first: Tensor,
    starts: Tensor,
    *,
    origin: int,
    prompt_tokens: Tensor,
    steps: int,
    decoding: DecodingInfo,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let a drafter run freely from many positions of the same text at once; give (tokens, confidence, entropy).

    Each is [rows, starts, steps - 1] and belongs to steps 2 .. `steps`; step 1 is part of the teacher-forced pass,
    and `first` [rows, starts] are the tokens drafted there. `lane` holds the text's cache with x_i in column
    ``origin`` + i, and is used up.

    All starts are branches packed into one forward pass per step: a branch from t sees the columns of the prompt
    and of x_0 .. x_{t-1}, and of the later ones its own tokens alone. This costs ``steps`` - 1 passes in place of
    starts * (steps - 1), and equals the naive loop but for rounding (a test compares them).
    """
    rows, branches = first.shape
    column = torch.arange(lane.kept.shape[1], device=lane.device)
    visible = lane.kept[:, None, :] & (column < (origin + starts)[:, None])
    own = torch.eye(branches, dtype=torch.bool, device=lane.device).expand(rows, -1, -1)
    token = first
    tokens, confidences, entropies = [], [], []
    for step in range(1, steps):
        visible = torch.cat([visible, own], dim=2)
        logits = lane.forward(token, prompt_tokens[:, None] + starts + (step - 1), visible)
        q = processed(logits, decoding)
        confidences.append(q.amax(-1))
        entropies.append(entropy(q))
        token = choose(logits, decoding, generator)
        tokens.append(token)
    if not confidences:
        empty = torch.zeros(rows, branches, 0, device=lane.device)
        return empty.long(), empty, empty
    return torch.stack(tokens, -1), torch.stack(confidences, -1), torch.stack(entropies, -1)
