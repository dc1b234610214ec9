"""The share of a gap, as a statistic of sums over requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def gap_statistic(total: Floats) -> Floats:
    """Give speed-ups and shares from sums of rates, last axis (no speculation, best fixed, oracle, policies ..).

    In order: speed-up of the best fixed draft, of the oracle, and for every policy its speed-up, its gain over the
    best fixed draft, and (policy - best) / (oracle - best).
    """
    speed = total / total[..., :1]
    best, oracle = speed[..., 1], speed[..., 2]
    found = [best, oracle]
    for column in range(3, total.shape[-1]):
        own = speed[..., column]
        found += [own, own / best - 1, (own - best) / (oracle - best)]
    return np.stack(found, axis=-1)
