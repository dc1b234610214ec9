"""The tokens of all requests of one forward pass, laid end to end, and what each of them may look at.

Matrix products run over all tokens at once, without padding between requests. Attention runs by *groups*: the
sequences of a group are read together, padded to the longest. A padded cache pads the tokens themselves as well, so
that its matrix products are as large as those of a batch of equal rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calibration.engines.own.cache import KvCache, PaddedCache, View


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
        bias = _bias(held, counts, width, view.keys, query_group, dtype, cache.device)
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
