"""The sweet spot of a curve of speed-up against size: its maximum, the flat region about it, the end of its gains.

Drafters of one verifier that differ in size alone, as a TraceSet has them, and their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.common.bootstrap import LEVEL, Bounds, Candidates, ClusterBootstrap, most, number
from calibration.common.arrays import Floats
from calibration.common.errors import CostError, ReplayError, did_you_mean
from calibration.shapes.shapes import Shape
from calibration.traces import TraceSet
from calibration.traces.manifest import DrafterInfo, ModelInfo

LEAST_SIZES = 3
"""Sizes below which there is no curve to speak of."""


@dataclass(frozen=True)
class Student:
    """One drafter of the family.

    ``share``: its parameters over the verifier's, both without embedding and head; ``share_in_all``: with them, None
    where unknown.
    """

    name: str
    parameters: int
    share: float
    share_in_all: float | None
    layers: int | None
    info: DrafterInfo


def family_by_size(traces: TraceSet, drafters: Sequence[str] | None = None) -> tuple[Student, ...]:
    """Give the drafters that differ in size alone, smallest first.

    Left out, `drafters` are all that have parameters of their own besides the embedding and, where a recipe names the
    domains that they were trained on, as many of them as any. Raises `ReplayError` for an unknown or sizeless drafter
    and below three sizes.
    """
    manifest = traces.manifest
    whole = manifest.verifier.parameters_non_embedding
    if not whole:
        raise ReplayError(f"manifest.json: verifier '{manifest.verifier.name}': needs parameters_non_embedding")
    for name in drafters or ():
        if name not in manifest.drafter_names:
            raise ReplayError(
                f"drafters: every one must be in the TraceSet, got '{name}'"
                + did_you_mean(name, manifest.drafter_names)
            )
    known = [d for d in manifest.drafters if drafters is None or d.name in drafters]
    sized = [d for d in known if d.parameters_non_embedding]
    if drafters is not None and len(sized) < len(known):
        missing = next(d.name for d in known if not d.parameters_non_embedding)
        raise ReplayError(f"drafters: every one needs parameters_non_embedding, got none for '{missing}'")
    if drafters is None:
        widest = max((_domains(d) for d in sized), default=0)
        sized = [d for d in sized if _domains(d) == widest]
    found = {size: _student(d, size, whole, manifest.verifier.parameters) for d in sized if (size := _own(d))}
    if len(found) < LEAST_SIZES:
        raise ReplayError(f"drafters: a curve by size needs at least {LEAST_SIZES} sizes, got {len(found)}")
    return tuple(found[size] for size in sorted(found))


def _own(info: DrafterInfo) -> int:
    return info.parameters_non_embedding or 0


def _student(info: DrafterInfo, size: int, whole: int, in_all: int | None) -> Student:
    every = info.parameters / in_all if info.parameters and in_all else None
    return Student(info.name, size, size / whole, every, info.layers, info)


def shape_of(info: ModelInfo, head_dim: int | None = None) -> Shape:
    """Give the shape of a Llama-like model from its manifest entry; its MLP follows from its parameters.

    `head_dim`: width of a head where it is not hidden size over heads. The embedding is taken to be the head. Raises
    `CostError` where the entry says too little or is not of such a model.
    """
    facts = (info.layers, info.hidden_size, info.heads, info.kv_heads, info.vocabulary, info.parameters_non_embedding)
    if any(fact is None for fact in facts):
        raise CostError(f"manifest.json: '{info.name}': a roofline price needs its whole shape, got {facts}")
    layers, hidden, heads, kv_heads, vocabulary, parameters = (int(fact or 0) for fact in facts)
    width = head_dim or hidden // heads
    attention = hidden * 2 * (heads + kv_heads) * width
    rest = (parameters - hidden) / layers - attention - 2 * hidden
    intermediate = rest / (3 * hidden)
    if intermediate <= 0 or intermediate != int(intermediate):
        raise CostError(
            f"manifest.json: '{info.name}': its parameters must be those of a Llama-like decoder, got {parameters} "
            f"for {layers} layers of width {hidden}"
        )
    return Shape(
        name=info.name,
        family="llama",
        layers=layers,
        hidden=hidden,
        intermediate=int(intermediate),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=vocabulary,
        source="manifest.json",
        tied=True,
        head_dim=width,
    )


def made_shape(parameters: float, layers: int, vocabulary: int) -> Shape:
    """Give a decoder of about so many `parameters` in `layers` layers; made up, not published.

    Proportions of published small decoders: a quarter as many KV heads as query heads (16), an MLP 3.5 times as wide
    as the model, the embedding tied to the head. With hidden size h: 13 layers h^2 + vocabulary h parameters; h is
    rounded to a multiple of 16. Raises `CostError` where not even the narrowest fits.
    """
    root = (vocabulary**2 + 52 * layers * parameters) ** 0.5
    hidden = 16 * round((root - vocabulary) / (26 * layers) / 16)
    if hidden < 16:
        raise CostError(f"parameters: must suffice for {layers} layers and {vocabulary} tokens, got {parameters:g}")
    return Shape(
        name=f"{parameters:.2g} in {layers} layers",
        family="llama",
        layers=layers,
        hidden=hidden,
        intermediate=hidden * 7 // 2,
        heads=16,
        kv_heads=4,
        vocabulary=vocabulary,
        source="made up",
        tied=True,
        head_dim=hidden // 16,
    )


def _domains(info: DrafterInfo) -> int:
    """Domains that a drafter was trained on; 0 where that is not told."""
    recipe = info.settings.get("recipe")
    domains = recipe.get("domains") if isinstance(recipe, dict) else None
    return len(domains) if isinstance(domains, list | tuple) else 0


WITHIN = 0.02
"""The flat region reaches down to this share below the maximum."""

GAIN = 0.01
"""Speed-up gained by doubling the drafter, as a share, below which more parameters are said to bring little."""


class Spots(NamedTuple):
    """Sizes of shape (...), in the units of the curve's sizes, and (...) whether the gains never end.

    ``best``: where the curve is highest. ``low``, ``high``: ends of the flat region that holds it, on the curve made
    of straight lines over the logarithm of size; an end of the curve where it does not fall far enough. ``gain_end``:
    the smallest size from which on no step to the next gains as much as the threshold per doubling; the largest size,
    with ``gaining`` true, where the last step still does.
    """

    best: Floats
    low: Floats
    high: Floats
    gain_end: Floats
    gaining: NDArray[np.bool_]


class Judged(NamedTuple):
    """The best size of one curve, whichever it is: bounds of its speed-up, and which sizes it may be (sizes)."""

    bounds: Bounds
    may_be_best: NDArray[np.bool_]


def judge_sizes(bootstrap: ClusterBootstrap, contests: Sequence[tuple[Floats, Floats, str | None]]) -> list[Judged]:
    """Judge several curves together: what is said of all of them holds at once.

    A contest: seconds of requests without speculation (requests), by size and draft length (sizes, lengths,
    requests), and the domain whose requests count (None: all). Every size and length is a candidate.
    """
    if not contests:
        return []
    parts = []
    for plain, seconds, domain in contests:
        sums = np.column_stack([plain, seconds.reshape(-1, len(plain)).T])
        parts.append(bootstrap.candidates(lambda s: s[..., :1] / s[..., 1:], sums, domain))
    family = Candidates.join(parts)
    groups = [at for at, part in enumerate(parts) for _ in part.values]
    bounds, inside = family.simultaneous(), family.best_set(groups=groups)
    found, at = [], 0
    for _, seconds, _ in contests:
        sizes, lengths, _ = seconds.shape
        mine = slice(at, at + sizes * lengths)
        found.append(Judged(most(bounds[mine]), np.asarray(inside[mine].reshape(sizes, lengths).any(axis=1))))
        at = mine.stop
    return found


def shares_of(speedups: Floats, names: Sequence[str], within: float) -> tuple[dict[str, float], dict[str, float]]:
    """Give how often each of `names` is best, and how often within `within` of the best, over curves (draws, n)."""
    winners = np.bincount(speedups.argmax(axis=1), minlength=len(names)) / len(speedups)
    near = (speedups >= (1 - within) * speedups.max(axis=1, keepdims=True)).mean(axis=0)

    def named(shares: Floats) -> dict[str, float]:
        return {name: number(float(share)) or 0.0 for name, share in zip(names, shares, strict=True)}

    return named(winners), named(near)


def likely_best(best_of: Mapping[str, float], level: float = LEVEL) -> tuple[str, ...]:
    """Name the sizes that are best most often, as few as make up `level` of the draws, in their own order."""
    kept: set[str] = set()
    held = 0.0
    for name in sorted(best_of, key=lambda one: -best_of[one]):
        if held >= level - 1e-9:
            break
        kept.add(name)
        held += best_of[name]
    return tuple(name for name in best_of if name in kept)


def find_spots(sizes: Floats, speedups: Floats, *, within: float = WITHIN, gain: float = GAIN) -> Spots:
    """Give the sweet spots of curves `speedups` (..., n) over increasing `sizes` (n); exact for the given points."""
    x = np.log2(np.asarray(sizes, dtype=np.float64))
    y = np.asarray(speedups, dtype=np.float64)
    best = y.argmax(axis=-1)
    level = (1 - within) * y.max(axis=-1, keepdims=True)
    left, right = y[..., :-1], y[..., 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = x[:-1] + (level - left) / (right - left) * np.diff(x)
    before = np.arange(len(x) - 1) < best[..., None]
    rises = before & (left < level) & (right >= level)
    falls = ~before & (left >= level) & (right < level)
    low = np.where(rises, crossing, x[0]).max(axis=-1)
    high = np.where(falls, crossing, x[-1]).min(axis=-1)
    slow = np.diff(np.log(y), axis=-1) / np.diff(x) < np.log1p(gain)
    trailing = np.cumprod(slow[..., ::-1], axis=-1).sum(axis=-1)
    end = len(x) - 1 - trailing
    return Spots(np.exp2(x[best]), np.exp2(low), np.exp2(high), np.exp2(x[end]), trailing == 0)
