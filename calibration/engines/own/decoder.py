"""A Llama-like forward pass over a flat batch, on the weights of a transformers model.

Nothing is copied: embedding, projections, MLPs and head are the model's own modules. What is ours is where keys and
values live, and that the tokens of all requests go through every matrix end to end. Its logits are those of
transformers (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the name that torch's own documentation gives it
from torch import Tensor

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.engines.own.batch import Batch, Group, Span, lay_out
from calibration.engines.own.cache import CacheShape, KvCache

FAMILIES = ("llama", "mistral", "qwen2")
"""Values of ``model_type`` whose layers are what `Decoder` computes."""


class Decoder:
    """A causal LM of one of the `FAMILIES`, ready for texts of up to `positions` tokens; `name` is for errors."""

    def __init__(self, model: Any, name: str, positions: int) -> None:
        _check(model, name)
        body, config = model.model, model.config
        self.name = name
        self.embed, self.layers = body.embed_tokens, tuple(body.layers)
        self.norm, self.head = body.norm, model.get_output_embeddings()
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.vocabulary: int = self.embed.num_embeddings
        weight: Tensor = self.embed.weight
        self.dtype, self.device = weight.dtype, weight.device
        with torch.inference_mode():
            places = torch.arange(positions, device=self.device)[None]
            cos, sin = body.rotary_emb(torch.zeros(1, dtype=self.dtype, device=self.device), places)
        # transformers rotates (a, b), the halves of a head, to (a cos - b sin, b cos + a sin): here the sign is in
        # the sine, [positions, 1, head size] both.
        half = self.head_dim // 2
        self._cos, self._sin = cos[0, :, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None]

    @property
    def cache_shape(self) -> CacheShape:
        """What its tokens take in a cache."""
        return CacheShape(len(self.layers), self.kv_heads, self.head_dim, self.dtype, self.device)

    def begins(self, other: Decoder) -> bool:
        """Whether its layers are the first ones of `other`: then keys and values are the same for both."""
        pairs = zip(self.layers, other.layers, strict=False)
        same = all(mine.self_attn.k_proj is theirs.self_attn.k_proj for mine, theirs in pairs)
        return same and self.embed is other.embed and len(self.layers) <= len(other.layers)

    def choose(self, groups: Sequence[Sequence[Span]], cache: KvCache) -> list[list[int]]:
        """Feed all spans at once; give, for each of them in order, the likeliest token at each of its picks."""
        logits = self.logits(groups, cache)
        chosen = [] if logits is None else logits.argmax(-1).tolist()
        result, begin = [], 0
        for span in (span for spans in groups for span in spans):
            result.append(chosen[begin : begin + span.picks])
            begin += span.picks
        return result

    @torch.inference_mode()
    def logits(self, groups: Sequence[Sequence[Span]], cache: KvCache) -> Tensor | None:
        """Feed all spans at once; give logits [picks of all spans, vocabulary], None where there are no picks.

        `cache` has at least as many layers as this model; further ones are left alone.
        """
        groups = [spans for spans in groups if spans]
        batch = lay_out(groups, cache, self.dtype, self.heads // self.kv_heads)
        x = self.embed(batch.tokens)
        turn = self._cos.index_select(0, batch.positions), self._sin.index_select(0, batch.positions)
        for layer, store in zip(self.layers, cache.layers, strict=False):
            normed = _normed(x, layer.input_layernorm)
            x = x + layer.self_attn.o_proj(self._mix(layer.self_attn, normed, turn, batch, cache, store))
            x = x + layer.mlp(_normed(x, layer.post_attention_layernorm))
        if batch.picked is None:
            return None
        logits: Tensor = self.head(_normed(x.index_select(0, batch.picked), self.norm))
        return logits

    def _mix(
        self, attention: Any, x: Tensor, turn: tuple[Tensor, Tensor], batch: Batch, cache: KvCache, store: Tensor
    ) -> Tensor:
        """Give what attention gathers [N, heads * head size] for the tokens `x`; `store` takes their keys in."""
        queries = _turned(attention.q_proj(x).view(-1, self.heads, self.head_dim), turn)
        keys = _turned(attention.k_proj(x).view(-1, self.kv_heads, self.head_dim), turn)
        values = attention.v_proj(x).view(-1, self.kv_heads, self.head_dim)
        store.index_copy_(0, batch.slots, torch.stack((keys, values), 1))
        parts = []
        for group in batch.groups:
            mine = slice(group.start, group.stop)
            if group.view is None:
                parts.append(self._among_themselves(group, queries[mine], keys[mine], values[mine]))
            else:
                parts.append(self._over_cache(group, queries[mine], *cache.read(store, group.view)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _among_themselves(self, group: Group, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Give causal attention of new tokens alone."""
        by_head = [
            part.view(group.rows, group.width, -1, self.head_dim).transpose(1, 2) for part in (queries, keys, values)
        ]
        shared = self.heads // self.kv_heads
        keys, values = by_head[1].repeat_interleave(shared, 1), by_head[2].repeat_interleave(shared, 1)
        mixed = F.scaled_dot_product_attention(by_head[0], keys, values, is_causal=True)
        return mixed.transpose(1, 2).reshape(-1, self.heads * self.head_dim)

    def _over_cache(self, group: Group, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Give attention over the cache; the query heads of a KV head are rows of one query, which reads it once."""
        if group.spread is not None:
            queries = queries.index_select(0, group.spread)
        rows, width, shared = group.rows, group.width, self.heads // self.kv_heads
        split = queries.view(rows, width, self.kv_heads, shared, self.head_dim).transpose(1, 2)
        merged = split.reshape(rows, self.kv_heads, width * shared, self.head_dim)
        seen = slice(0, group.keys)
        mixed = F.scaled_dot_product_attention(merged, keys[:, :, seen], values[:, :, seen], attn_mask=group.bias)
        apart = mixed.view(rows, self.kv_heads, width, shared, self.head_dim).transpose(1, 2)
        flat = apart.reshape(rows * width, self.heads * self.head_dim)
        return flat if group.packed is None else flat.index_select(0, group.packed)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [N, heads, head size] to their positions (RoFormer, in Llama's layout)."""
    return torch.addcmul(x * turn[0], x.roll(x.shape[-1] // 2, -1), turn[1])


def _normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _check(model: Any, name: str) -> None:
    """`CalibrationError` where `model` is not what `Decoder` computes."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        hint = did_you_mean(kind, FAMILIES)
        raise CalibrationError(f"model '{name}': model_type must be one that the engine computes, got '{kind}'{hint}")
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise CalibrationError(f"model '{name}': rotary positions must not depend on the length, got '{rope}'")
    layers = {tensor.dtype for tensor in model.model.layers.parameters() if tensor.element_size() > 1}
    if layers - {model.get_input_embeddings().weight.dtype}:
        got = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in layers))
        wanted = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        raise CalibrationError(f"model '{name}': layers must have the embedding's dtype {wanted}, got {got}")
