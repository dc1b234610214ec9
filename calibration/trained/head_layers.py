"""A decoder layer whose tokens attend to a shared past and to their own branch: every start drafts at once.

Shapes: R rows, S branches of a row, n new tokens of a branch, M pairs in the past of a row, H query heads in G groups
that share keys and values, d values per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
"""Keys and values [..., tokens, G, d]; keys are rotated to their positions already."""

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Past:
    """What a head has read of each row: M pairs (state after a token, the next token).

    ``cache``: per layer the keys and values [R, M, G, d]. ``real`` [R, M]: False marks padding. ``state``
    [R, M, hidden size]: what a branch that has seen everything up to a pair starts from.
    """

    cache: tuple[KeyValue, ...]
    real: Tensor
    state: Tensor

    def joined(self, later: Past) -> Past:
        """Give this past with `later` behind it."""
        cache = tuple(_cat(a, b, 1) for a, b in zip(self.cache, later.cache, strict=True))
        return Past(cache, torch.cat([self.real, later.real], 1), torch.cat([self.state, later.state], 1))

    def branches(self, last: Tensor) -> Branches:
        """Give branches whose past ends with the pairs in columns `last` [R, S]."""
        column = torch.arange(self.real.shape[1], device=last.device)
        visible = self.real[:, None, :] & (column <= last[:, :, None])
        index = last[:, :, None].expand(-1, -1, self.state.shape[-1])
        return Branches(visible, visible.sum(2), self.state.gather(1, index))


@dataclass(frozen=True)
class Branches:
    """Starts of drafts: which pairs each sees [R, S, M], the position of its first own token, and its state."""

    visible: Tensor
    position: Tensor
    state: Tensor


class RootMeanSquare(nn.Module):
    """An RMS norm, computed in at least float32 whatever the precision around it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Give `x` [..., hidden size] divided by its root mean square and scaled, in the precision of `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return (wide * scale * self.weight).to(x.dtype)


class DecoderLayer(nn.Module):
    """A Llama layer: grouped-query attention with rotary positions, then SwiGLU, both behind an RMS norm."""

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, rope_base: float
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.rope_base = heads, kv_heads, head_dim, rope_base
        self.attention_norm = RootMeanSquare(hidden)
        self.query = nn.Linear(hidden, heads * head_dim, bias=False)
        self.key = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.mlp_norm = RootMeanSquare(hidden)
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def remember(self, x: Tensor, position: Tensor) -> KeyValue:
        """Give the keys and values [..., n, G, d] of tokens `x` [..., n, hidden size] at `position` [..., n]."""
        return self._remember(self.attention_norm(x), position)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        past: KeyValue | None,
        visible: Tensor | None,
        own: KeyValue | None,
        among: Tensor,
    ) -> tuple[Tensor, KeyValue]:
        """Run new tokens `x` [R, S, n, hidden size] of S branches; give them, and the branches' own keys and values.

        ``past`` [R, M, G, d] is seen where ``visible`` [R, S, M] says; ``own`` [R, S, m, G, d] is what each branch
        fed before; ``among`` [..., n, m + n] says what the new tokens see of their own branch.
        """
        normed = self.attention_norm(x)
        query = _rotated(in_heads(self.query(normed), self.heads), position, self.rope_base)
        mine = self._remember(normed, position)
        own = mine if own is None else _cat(own, mine, 2)
        x = x + self.out(attend(query, past, visible, own, among).flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed)), own

    def _remember(self, normed: Tensor, position: Tensor) -> KeyValue:
        key = _rotated(in_heads(self.key(normed), self.kv_heads), position, self.rope_base)
        return key, in_heads(self.value(normed), self.kv_heads)


def attend(query: Tensor, past: KeyValue | None, visible: Tensor | None, own: KeyValue, among: Tensor) -> Tensor:
    """Give the attention [R, S, n, H, d] of `query`, over the past that all branches share and over each one's own.

    The past is stored once and not once per branch, so that 256 starts of 300 tokens cost what one pass does.
    """
    rows, branches, new, heads, size = query.shape
    groups = own[0].shape[-2]
    query = query.view(rows, branches, new, groups, heads // groups, size) * size**-0.5
    scores = _scores(torch.einsum("rsngad,rsmgd->rgsnam", query, own[0]), among[..., None, :])
    if past is None or visible is None:
        return torch.einsum("rgsnam,rsmgd->rsngad", scores.softmax(-1).to(query.dtype), own[1]).flatten(3, 4)
    far = _scores(torch.einsum("rsngad,rmgd->rgsnam", query, past[0]), visible[:, None, :, None, None, :])
    weights = torch.cat([far, scores], -1).softmax(-1).to(query.dtype)
    seen = far.shape[-1]
    mixed = torch.einsum("rgsnam,rmgd->rsngad", weights[..., :seen], past[1])
    return (mixed + torch.einsum("rgsnam,rsmgd->rsngad", weights[..., seen:], own[1])).flatten(3, 4)


def _scores(scores: Tensor, allowed: Tensor) -> Tensor:
    if allowed.ndim == 5:  # per row and branch: the groups come in between
        allowed = allowed[:, None]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.masked_fill(~allowed, torch.finfo(wide.dtype).min)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """Split the last dimension of `x` into `heads`."""
    return x.view(*x.shape[:-1], heads, -1)


def _rotated(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotate `x` [..., n, heads, d] to `position` [..., n] (Su et al., RoFormer; halves are paired, as in Llama)."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    rate = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (position.to(wide)[..., None] * rate)[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].to(wide), x[..., half:].to(wide)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _cat(first: KeyValue, later: KeyValue, dim: int) -> KeyValue:
    return torch.cat([first[0], later[0]], dim), torch.cat([first[1], later[1]], dim)


def running_positions(past: Past | None, real: Tensor) -> Tensor:
    """Give the positions of new pairs `real` [R, n]: padding is not counted."""
    before = 0 if past is None else past.real.sum(1, keepdim=True)
    return (before + real.cumsum(1) - 1).clamp(min=0)
