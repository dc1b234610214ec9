"""A Llama-like forward pass over a flat batch, on the weights of a transformers model.

Nothing is copied: embedding, projections, MLPs and head are the model's own modules. What is ours is where keys and
values live, and that the tokens of all requests go through every matrix end to end. Its logits are those of
transformers (a test compares them).

The tokens of all requests of one forward pass, laid end to end, and what each of them may look at.

Matrix products run over all tokens at once, without padding between requests. Attention runs by *groups*: the
sequences of a group are read together, padded to the longest. A padded cache pads the tokens themselves as well, so
that its matrix products are as large as those of a batch of equal rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from calibration.common.errors import CalibrationError, did_you_mean
from calibration.engines.own.cache import CacheShape, KvCache, PaddedCache, View


class Span(NamedTuple):
    """`tokens` that follow what the cache holds of `sequence`; after the last `picks` of them, logits are wanted."""

    sequence: int
    tokens: Sequence[int]
    picks: int


@dataclass(frozen=True)
class Group:
    """Sequences whose attention runs together: `rows` of `width` new tokens each, of which some may be padding.

    ``start``, ``stop``: its place among all tokens. ``spread`` [rows * width]: the token (from ``start``) at every
    place of that rectangle, None where the tokens are one already; ``packed`` [stop - start]: the way back.
    ``view``: the keys to read, None where nothing came before these tokens: then each looks at those before it among
    the new ones. ``bias`` [rows, 1, width * group, keys]: 0 where a token may look, else -inf, once for every query
    head of a KV head; None where all may look at all ``keys``.
    """

    start: int
    stop: int
    rows: int
    width: int
    spread: Tensor | None = None
    packed: Tensor | None = None
    view: View | None = None
    keys: int = 0
    bias: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """All tokens [N] of a pass, their positions and slots; ``picked``: where logits are wanted, None for nowhere."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    groups: tuple[Group, ...]
    picked: Tensor | None


def lay_out(groups: Sequence[Sequence[Span]], cache: KvCache, dtype: torch.dtype, query_group: int) -> Batch:
    """Lay the spans of `groups` end to end and make room for them in `cache`.

    `query_group`: query heads per KV head.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    picked: list[int] = []
    made = []
    for spans in groups:
        start, held = len(tokens), [cache.length(span.sequence) for span in spans]
        width = max(len(span.tokens) for span in spans)
        for span, before in zip(spans, held, strict=True):
            count = len(span.tokens)
            padding = width - count if isinstance(cache, PaddedCache) else 0
            picked += range(len(tokens) + count - span.picks, len(tokens) + count)
            tokens += [*span.tokens, *[span.tokens[-1]] * padding]
            positions += [*range(before, before + count), *[before + count - 1] * padding]
            slots += cache.extend(span.sequence, count, count + padding)
        made.append(_group(spans, held, (start, len(tokens)), cache, dtype, query_group))
    numbers = torch.tensor([tokens, positions, slots], device=cache.device)  # NOTE: one copy to the device, not three
    where = torch.tensor(picked, device=cache.device) if picked else None
    return Batch(numbers[0], numbers[1], numbers[2], tuple(made), where)


def _group(
    spans: Sequence[Span],
    held: Sequence[int],
    place: tuple[int, int],
    cache: KvCache,
    dtype: torch.dtype,
    query_group: int,
) -> Group:
    """Plan the attention of `spans`, whose sequences held `held` tokens before."""
    counts = [len(span.tokens) for span in spans]
    rows, width = len(spans), max(counts)
    spread = packed = None
    if sum(counts) != rows * width and place[1] - place[0] == sum(counts):
        spread, packed = _rectangle(counts, cache.device)
    if not any(held) and width > 1 and (rows == 1 or spread is None):
        return Group(*place, rows, width)
    ends = [before + count for before, count in zip(held, counts, strict=True)]
    longest = max(ends)
    view = cache.view([span.sequence for span in spans], longest)
    bias = None
    if width > 1 or min(ends) < longest:
        bias = _bias(
            held=held,
            counts=counts,
            width=width,
            keys=view.keys,
            query_group=query_group,
            dtype=dtype,
            device=cache.device,
        )
    return Group(*place, rows, width, spread, packed, view, longest if bias is None else view.keys, bias)


def _rectangle(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Give (spread, packed) of rows of `counts` tokens; the last token of a row stands in for its padding."""
    width, begin = max(counts), 0
    spread, packed = [], []
    for row, count in enumerate(counts):
        spread += [begin + min(column, count - 1) for column in range(width)]
        packed += [row * width + column for column in range(count)]
        begin += count
    return torch.tensor(spread, device=device), torch.tensor(packed, device=device)


def _bias(
    held: Sequence[int],
    counts: Sequence[int],
    width: int,
    keys: int,
    query_group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Give the additive mask of `Group`: a token looks at every key up to its own place."""
    sizes = torch.tensor([held, counts], device=device)[:, :, None]
    column = torch.arange(width, device=device)
    last = sizes[0] + torch.minimum(column, sizes[1] - 1)  # [rows, width]
    hidden = torch.arange(keys, device=device) > last.repeat_interleave(query_group, 1)[:, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None]


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
