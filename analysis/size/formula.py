"""Closed forms of drafting with a constant acceptance rate: tokens of a round, best draft lengths, their inverses.

a: probability that a drafted token is accepted, the same at every depth; k: draft length; c: seconds of a draft step
over those of a plain verifier step. Real acceptance varies with depth and text: see `analysis.speedup.acceptance`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.common.arrays import Floats


def tokens_per_round(rate: ArrayLike, draft_tokens: ArrayLike) -> Floats:
    """Give 1 + a + ... + a^k, bonus token included (Leviathan et al. 2023, equation 1); k may be fractional.

    (1 - a^(k+1)) / (1 - a); k + 1 where a = 1. Exact for independent drafts of one rate.
    """
    a, k = np.asarray(rate, dtype=np.float64), np.asarray(draft_tokens, dtype=np.float64)
    sure = a >= 1
    below = np.where(sure, 0.5, a)
    return np.asarray(np.where(sure, k + 1.0, -np.expm1((k + 1) * np.log(np.maximum(below, 1e-300))) / (1 - below)))


def rate_of_length(tokens: float, draft_tokens: int) -> float:
    """Give the a whose rounds of draft length k commit `tokens`, bonus included: the inverse of the formula.

    1 <= tokens <= k + 1; raises `ValueError` outside.
    """
    from scipy.optimize import brentq

    if not 1 <= tokens <= draft_tokens + 1:
        raise ValueError(f"tokens per round: must lie in [1, {draft_tokens + 1}], got {tokens}")
    return float(brentq(lambda a: float(tokens_per_round(a, draft_tokens)) - tokens, 0.0, 1.0, xtol=1e-12))


def continuous_best_length(rate: ArrayLike, ratio: ArrayLike) -> Floats:
    """Give the k >= 0 that maximises tokens / (k c + 1), k taken as continuous (SDSL, arXiv 2603.11053).

    With L = -ln a, A = L (1 - c) / c + 1 and z = -W_-1(-e^-A), k = (z - A) / L - 1; W_-1 is Lambert's function.
    0 where drafting never pays (a <= c). Verification is free of the draft's length here.
    """
    from scipy.special import lambertw

    a, c = np.broadcast_arrays(np.asarray(rate, dtype=np.float64), np.asarray(ratio, dtype=np.float64))
    decay = -np.log(np.clip(a, 1e-12, 1 - 1e-12))
    reach = decay * (1 - c) / c + 1
    # W_-1(-e^-A) for large A would underflow: z - ln z = A, whose solution there is A + ln A + ln A / A.
    small = np.minimum(reach, 600.0)
    z = np.where(reach < 600, -lambertw(-np.exp(-small), -1).real, reach + np.log(reach) * (1 + 1 / reach))
    return np.asarray(np.where(a > c, np.maximum((z - reach) / decay - 1, 0.0), 0.0))


def best_lengths(rate: Floats, seconds: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Give (speed-up over no speculation, its draft length) at the best k >= 1.

    `rate` (..., n): acceptance of n drafters. `seconds` (n, K + 1): of a round that drafts k = 0 .. K tokens; k = 0
    is a plain step. The speed-up of k is tokens x seconds[:, 0] / seconds[:, k]; below 1 where speculation does not
    pay.
    """
    best = np.zeros(rate.shape)
    length = np.ones(rate.shape, dtype=np.int64)
    for k in range(1, seconds.shape[1]):
        speed = tokens_per_round(rate, k) * (seconds[:, 0] / seconds[:, k])
        better = speed > best
        best, length = np.where(better, speed, best), np.where(better, k, length)
    return best, length


def break_even_rate(target: float, seconds: Floats) -> float | None:
    """Give the acceptance that a drafter with these round `seconds` (K + 1) needs for a speed-up of `target`.

    None where even an acceptance of 1 does not reach it.
    """
    from scipy.optimize import brentq

    def short(rate: Any) -> float:
        return float(best_lengths(np.array([rate]), seconds[None, :])[0][0]) - target

    if short(1.0) < 0:
        return None
    return 0.0 if short(0.0) >= 0 else float(brentq(short, 0.0, 1.0, xtol=1e-10))
