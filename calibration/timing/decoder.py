"""A Llama-like decoder step written for timing: static shapes, caches written in place, nothing read back.

The same function runs eagerly and inside a CUDA graph, with plain or fp8 matrices, for chains and for trees. Its
logits are those of transformers' Llama and Qwen2 on the same weights (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the name that torch's own documentation gives it
from torch import Tensor

from calibration.shapes.shapes import Shape

Linear = Callable[[Tensor], Tensor]
"""x [..., in] to [..., out]."""


@dataclass(frozen=True)
class Dense:
    """x W' + b. ``weight`` [out, in], ``bias`` [out]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Give x W' + b."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. ``qkv``: queries, keys, values side by side; ``gate_up``: the gate, then what it gates."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class HeadWeights:
    """What is outside of the layers: embedding [vocabulary, hidden], final norm [hidden], LM head."""

    embedding: Tensor
    norm: Tensor
    head: Linear


@dataclass(frozen=True)
class Place:
    """Where n new tokens stand, and what they see, in a cache of S slots.

    ``slots`` [n]: their cache slots. ``cos``, ``sin`` [n, head_dim]: their rotary factors. ``bias`` [group * n, S]: 0
    where a token may look and -inf elsewhere, once for every query head of a KV head; None leaves the causal order to
    the attention kernel, which then sees ``causal`` (or a square of new tokens alone).
    """

    slots: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor | None = None
    causal: Tensor | None = None


def place_tokens(
    shape: Shape, context: int, parents: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Place:
    """Place new tokens after `context` cached ones; token i follows token ``parents[i]`` (-1: the last cached one).

    A chain has parents -1, 0, 1, ...; anything else is a tree, whose tokens see the context and their ancestors.
    """
    new, total = len(parents), context + len(parents)
    depth = depths(parents)
    positions = torch.tensor(depth, device=device) + context
    cos, sin = rotary(shape, positions, dtype)
    place = Place(torch.arange(context, total, device=device), cos, sin)
    chain = depth == list(range(new))
    if chain and new == 1:
        return place
    if chain and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.bias import causal_lower_right

        causal = causal_lower_right(new, total)
        return Place(place.slots, cos, sin, causal=causal)
    if chain and not context:
        return place
    return Place(place.slots, cos, sin, bias=_bias(shape, context, parents, dtype, device))


def depths(parents: Sequence[int]) -> list[int]:
    """Give the depth of every token, 0 for those that follow the context; a parent stands before its children."""
    depth: list[int] = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return depth


def tree_parents(nodes: int, branching: int = 2) -> list[int]:
    """Give the parents of a committed token with `nodes` drafted ones below it, level by level, `branching` each.

    The time of a masked step does not depend on which tree its mask draws.
    """
    return [-1] + [node // branching for node in range(nodes)]


def ancestors(parents: Sequence[int]) -> Tensor:
    """Give who sees whom among the new tokens: bool [n, n], each its ancestors and itself."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            seen[token] |= seen[parent]
    return seen


def _bias(shape: Shape, context: int, parents: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give the additive mask of `Place`, in rows padded to 8 entries so that no attention call has to copy it."""
    new, total = len(parents), context + len(parents)
    group = shape.heads // shape.kv_heads
    rows = torch.zeros(group * new, -(-total // 8) * 8, dtype=dtype, device=device)[:, :total]
    hidden = ~ancestors(parents).repeat(group, 1).to(device)
    rows[:, context:].masked_fill_(hidden, float("-inf"))
    return rows


def rotary(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give the rotary factors [n, head_dim]: cosines, and sines with the sign of the half they multiply.

    The rotation of (a, b), the halves of a head, is (a cos - b sin, b cos + a sin) (RoFormer, in Llama's layout).
    """
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angles = positions[:, None].float() / shape.rope_theta**half
    sines = angles.sin()
    return angles.cos().repeat(1, 2).to(dtype), torch.cat((-sines, sines), 1).to(dtype)


def run_layer(shape: Shape, weights: LayerWeights, x: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Run one decoder layer over `x` [batch, n, hidden]; `keys`, `values` [batch, KV heads, S, head_dim] are written.

    Both caches are filled up to the first of the new slots.
    """
    batch, new, _ = x.shape
    normed = F.rms_norm(x, (shape.hidden,), weights.attention_norm, shape.norm_eps)
    split = weights.qkv(normed).view(batch, new, shape.heads + 2 * shape.kv_heads, shape.head_dim).transpose(1, 2)
    turning = split[:, : shape.heads + shape.kv_heads]
    turned = torch.addcmul(turning * place.cos, turning.roll(shape.head_dim // 2, -1), place.sin)
    keys.index_copy_(2, place.slots, turned[:, shape.heads :])
    values.index_copy_(2, place.slots, split[:, shape.heads + shape.kv_heads :])
    mixed = attend(turned[:, : shape.heads], keys, values, place)
    x = x + weights.out(mixed.transpose(1, 2).reshape(batch, new, shape.query_width))
    gate, up = weights.gate_up(F.rms_norm(x, (shape.hidden,), weights.mlp_norm, shape.norm_eps)).chunk(2, -1)
    return x + weights.down(F.silu(gate) * up)


def attend(queries: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """Give scaled dot-product attention [batch, heads, n, head_dim] of `queries` over the cache.

    Without a kernel's own causal order, the query heads of a KV head become rows of one query, so that keys and
    values are read once for all of them; one new token needs no mask at all.
    """
    batch, heads, new, width = queries.shape
    group = heads // keys.shape[1]
    if place.causal is not None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=place.causal, enable_gqa=group > 1)
    if place.bias is None and new > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    rows = queries.reshape(batch, keys.shape[1], group * new, width)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=place.bias).reshape(queries.shape)


def run_layers(shape: Shape, layers: Sequence[LayerWeights], x: Tensor, cache: Tensor, place: Place) -> Tensor:
    """Run `layers` over `x` [batch, n, hidden]; `cache` is [layers, 2, batch, KV heads, S, head_dim]."""
    for weights, kept in zip(layers, cache, strict=True):
        x = run_layer(shape, weights, x, kept[0], kept[1], place)
    return x


def run_head(shape: Shape, weights: HeadWeights, x: Tensor) -> Tensor:
    """Give logits [..., vocabulary] of hidden states `x` [..., hidden]: final norm and LM head."""
    return weights.head(F.rms_norm(x, (shape.hidden,), weights.norm, shape.norm_eps))
