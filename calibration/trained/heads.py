"""A decoder layer whose tokens attend to a shared past and to their own branch: every start drafts at once.

Shapes: R rows, S branches of a row, n new tokens of a branch, M pairs in the past of a row, H query heads in G groups
that share keys and values, d values per head.

Heads that draft from the verifier's final-norm states, through the verifier's own embedding and LM head.

Notation: x_i are the tokens of prompt and output, f_i is the verifier's state after x_i, whose logits predict
x_{i+1}. When N tokens are committed, f_0 .. f_{N-2} are known: a head reads the N - 1 *pairs* (f_i, x_{i+1}). It
predicts features g_1, g_2, ...; draft j is read off g_j by the verifier's LM head and stands in place of x_{N-1+j}.

*Medusa* (Cai et al. 2024): parallel residual heads. g_j = f + SiLU(W_j f + b_j) with f = f_{N-2}, the state that
predicted the last committed token; `layers` such blocks in a row. Here the heads share the verifier's LM head instead
of having one each, which keeps them small. W and b begin at 0: untrained, every head repeats the verifier's token.

*EAGLE* (Li et al. 2024): one decoder layer runs over fused pairs and predicts the next feature. Its drafts go on from
its own features: pair (g_j, draft j) follows. The two halves of a pair are normalised before they are fused and the
output is normalised like the verifier's, which EAGLE-1 does not do; so a few thousand steps on little text suffice.

*Block*: as many learned queries as drafts stand behind the last pair and see each other in both directions and all
pairs, whose keys and values are projections of the fused pairs. All drafts come from one pass, whose cost does not
depend on how many are used: the cost shape of diffusion drafters (DEER, DiffuSpec). The architecture is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calibration.common.errors import CalibrationError
from calibration.trained.shapes import HeadKind, HeadShape

__all__ = ["BlockHead", "EagleHead", "Follow", "Head", "MedusaHeads", "empty_head", "fresh_head", "load_head"]

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


Follow = Callable[[int, Tensor], Tensor]
"""Called with the draft's number (from 0) and its features [R, S, hidden size]; gives the embedding of the token that
stands there [R, S, hidden size]: the drafted one, or the text's."""


class Head(Protocol):
    """What drafting, training and checking need of a head."""

    autoregressive: bool
    shape: HeadShape

    def read(self, past: Past | None, features: Tensor, embedded: Tensor, real: Tensor) -> Past:
        """Take in new pairs: `features` and `embedded` tokens [R, n, hidden size], of which `real` [R, n] count."""
        ...

    def unroll(self, past: Past, branches: Branches, depth: int, follow: Follow) -> list[Tensor]:
        """Give the features [R, S, hidden size] of `depth` drafts from every branch; `follow` is asked at each."""
        ...


class MedusaHeads(nn.Module):
    """K parallel stacks of residual blocks on the last known state."""

    autoregressive = False

    def __init__(self, shape: HeadShape, hidden: int) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(shape.layers, shape.tokens, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(shape.layers, shape.tokens, hidden))

    def read(self, past: Past | None, features: Tensor, embedded: Tensor, real: Tensor) -> Past:
        """Keep the states; tokens do not matter to these heads."""
        new = Past((), real, features)
        return new if past is None else past.joined(new)

    def unroll(self, past: Past, branches: Branches, depth: int, follow: Follow) -> list[Tensor]:
        """Give the features of the first `depth` heads."""
        x = branches.state[:, :, None].expand(-1, -1, depth, -1)
        for weight, bias in zip(self.weight[:, :depth], self.bias[:, :depth], strict=True):
            x = x + nn.functional.silu(torch.einsum("rskh,kgh->rskg", x, weight) + bias)
        return _followed(x, depth, follow)


class EagleHead(nn.Module):
    """One decoder layer over fused pairs."""

    autoregressive = True

    def __init__(self, shape: HeadShape, hidden: int) -> None:
        super().__init__()
        self.shape = shape
        self.fuse = Fusion(hidden)
        self.layer = decoder_layer(shape, hidden)
        self.norm = RootMeanSquare(hidden)

    def read(self, past: Past | None, features: Tensor, embedded: Tensor, real: Tensor) -> Past:
        """Run the layer over new pairs, each of which sees the real ones before it."""
        width = real.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
        among = (causal & real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=real.device)
        x = self.fuse(features, embedded)[:, None]
        position = running_positions(past, real)[:, None]
        cache = None if past is None else past.cache[0]
        visible = None if past is None else past.real[:, None]
        x, (key, value) = self.layer(x, position, cache, visible, None, among[:, None])
        new = Past(((key[:, 0], value[:, 0]),), real, x[:, 0])
        return new if past is None else past.joined(new)

    def unroll(self, past: Past, branches: Branches, depth: int, follow: Follow) -> list[Tensor]:
        """Draft on from the head's own features, one pass per draft."""
        state, own, features = branches.state, None, []
        for step in range(depth):
            features.append(self.norm(state))
            embedded = follow(step, features[-1])
            if step + 1 == depth:
                break
            x = self.fuse(features[-1], embedded)[:, :, None]
            among = torch.ones(1, step + 1, dtype=torch.bool, device=x.device)
            position = branches.position[:, :, None] + step
            x, own = self.layer(x, position, past.cache[0], branches.visible, own, among)
            state = x[:, :, 0]
        return features


class BlockHead(nn.Module):
    """Learned queries behind the last pair, all answered in one pass."""

    autoregressive = False

    def __init__(self, shape: HeadShape, hidden: int) -> None:
        super().__init__()
        self.shape = shape
        self.fuse = Fusion(hidden)
        self.queries = nn.Parameter(torch.zeros(shape.tokens, hidden))
        self.layers = nn.ModuleList(decoder_layer(shape, hidden) for _ in range(shape.layers))
        self.norm = RootMeanSquare(hidden)

    def read(self, past: Past | None, features: Tensor, embedded: Tensor, real: Tensor) -> Past:
        """Project new pairs to keys and values of every layer; pairs do not attend to one another."""
        x, position = self.fuse(features, embedded), running_positions(past, real)
        new = Past(tuple(layer.remember(x, position) for layer in self._stack()), real, x)
        return new if past is None else past.joined(new)

    def unroll(self, past: Past, branches: Branches, depth: int, follow: Follow) -> list[Tensor]:
        """Answer all queries, each of which begins with the last fused pair, and give the first `depth`."""
        x = branches.state[:, :, None] + self.queries
        count = self.shape.tokens
        position = branches.position[:, :, None] + torch.arange(count, device=x.device)
        among = torch.ones(count, count, dtype=torch.bool, device=x.device)
        for layer, cache in zip(self._stack(), past.cache, strict=True):
            x, _ = layer(x, position, cache, branches.visible, None, among)
        return _followed(self.norm(x), depth, follow)

    def _stack(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


class Fusion(nn.Module):
    """Fuses a state of the verifier with the embedding of the token behind it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.feature_norm = RootMeanSquare(hidden)
        self.token_norm = RootMeanSquare(hidden)
        self.mix = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, features: Tensor, embedded: Tensor) -> Tensor:
        """Give the fused pairs [..., hidden size]."""
        fused: Tensor = self.mix(torch.cat([self.feature_norm(features), self.token_norm(embedded)], -1))
        return fused


def decoder_layer(shape: HeadShape, hidden: int) -> DecoderLayer:
    """Make a decoder layer of a shape whose sizes are filled in."""
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate_size)
    heads, kv_heads, head_dim, intermediate = (size or 0 for size in sizes)
    return DecoderLayer(hidden, heads, kv_heads, head_dim, intermediate, shape.rope_base)


_NETWORKS: dict[HeadKind, Any] = {"medusa": MedusaHeads, "eagle": EagleHead, "block": BlockHead}


def empty_head(kind: HeadKind, shape: HeadShape, hidden: int) -> Any:
    """Make a head without weights (on the meta device); `shape` must be filled in."""
    with torch.device("meta"):
        return _NETWORKS[kind](shape, hidden)


def fresh_head(kind: HeadKind, shape: HeadShape, model: Any, generator: torch.Generator) -> Any:
    """Make an untrained head for the verifier `model`, in float32 on its device; `shape` must be filled in.

    Matrices are normal with the deviation 1 / sqrt(inputs), those that write into the residual stream a tenth of it,
    queries 0.02. The last norm begins as 0.3 times the verifier's own: an untrained head that is as sure of itself as
    the verifier must first unlearn that (SmolLM2-135M, EAGLE head after 15,000 tokens: 1.19 tokens per round, with
    the norm as it is 1.13).
    """
    hidden = model.config.hidden_size
    head = empty_head(kind, shape, hidden).to_empty(device=model.device)
    for name, tensor in head.named_parameters():
        with torch.no_grad():
            if kind == "medusa":
                tensor.zero_()
            elif name == "queries":
                tensor.normal_(std=0.02, generator=generator)
            elif tensor.ndim > 1:
                writes = name.endswith(("out.weight", "down.weight"))
                tensor.normal_(std=tensor.shape[1] ** -0.5 * (0.1 if writes else 1.0), generator=generator)
            else:
                tensor.fill_(1.0)
    if kind != "medusa":
        head.norm.weight.data.copy_(0.3 * model.model.norm.weight)
    return head


def load_head(kind: HeadKind, shape: HeadShape, hidden: int, tensors: dict[str, Tensor]) -> Any:
    """Make a trained head from `tensors`; `CalibrationError` where they are not those of its shape."""
    head = empty_head(kind, shape, hidden)
    wanted = {name: tensor.shape for name, tensor in head.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        want, got = wanted.get(name), tensors[name].shape if name in tensors else None
        if want != got:
            raise CalibrationError(
                f"head '{kind}': tensor '{name}' must have the shape {_shown(want)}, got {_shown(got)}"
            )
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_(False).eval()


def _shown(shape: Any) -> str:
    return "none" if shape is None else " x ".join(str(size) for size in shape)


def _followed(features: Tensor, depth: int, follow: Follow) -> list[Tensor]:
    """Split features [R, S, drafts, hidden size] by draft, asking `follow` at each."""
    found = list(features[:, :, :depth].unbind(2))
    for step, feature in enumerate(found):
        follow(step, feature)
    return found
