"""The sweet spot of a curve of speed-up against size: its maximum, the flat region about it, the end of its gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.common.bootstrap import LEVEL, Bounds, Candidates, ClusterBootstrap, most, number
from calibration.common.arrays import Floats

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
