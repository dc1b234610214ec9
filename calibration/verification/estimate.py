"""An unbiased estimate of recursive rejection without replacement, for where its exact acceptance is out of reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats
from calibration.common.errors import CalibrationError
from calibration.verification.common import draft_count, draw, pair, residual, without
from calibration.verification.recursive import accepted_without_replacement


@dataclass(frozen=True, eq=False)
class AcceptanceEstimate:
    """A mean over random paths of rejected drafts: the acceptance, its standard error, and the mass by token [V]."""

    mean: float
    standard_error: float
    by_token: Floats
    draws: int


def estimate_acceptance(
    p: ArrayLike, q: ArrayLike, k: int, draws: int, rng: np.random.Generator
) -> AcceptanceEstimate:
    """Estimate how often `Recursive("without_replacement")` accepts one of k drafts; unbiased, also for each token.

    Each of `draws` >= 2 paths draws the first k - 2 drafts as they are rejected, weighted by the exact chance of it,
    and ends with the exact acceptance of the last two: the mean varies only with which drafts were rejected first.
    With k <= 2 it is exact. O(V k + V log V) a path.
    """
    p, q = pair(p, q, "estimate_acceptance")
    k = draft_count(k, "estimate_acceptance")
    if draft_count(draws, "estimate_acceptance: draws") < 2:
        raise CalibrationError(f"estimate_acceptance: draws must be >= 2, got {draws}")
    values, by_token = np.empty(draws), np.zeros_like(p)
    for i in range(draws):
        accepted = _one_path(p, q, k, rng)
        values[i] = accepted.sum()
        by_token += accepted / draws
    return AcceptanceEstimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(draws)), by_token, draws)


def _one_path(p: Floats, q: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Give [V] the mass accepted via each token along one random path of rejected drafts."""
    accepted, reached = np.zeros_like(p), 1.0
    while k > 2:
        accepted += reached * np.minimum(p, q)
        excess = np.maximum(q - p, 0.0)
        rejection = float(excess.sum())
        if rejection == 0.0:
            return accepted
        rejected = draw(excess, rng)
        reached *= rejection
        p, q, k = residual(p, q), without(q, np.array([rejected])), k - 1
        if not q.any():
            return accepted
    return accepted + reached * accepted_without_replacement(p, q, k)
