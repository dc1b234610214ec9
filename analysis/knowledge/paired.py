"""Paired tests: two drafters on the same prompts, and Holm's correction where many pairs are tested."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from analysis.common.bootstrap import number
from calibration.common.arrays import Floats

_EXACT = 13
"""Prompts up to which all 2^n sign flips are played."""
FLIPS = 20_000
"""Sign flips drawn where there are more prompts."""


def flip_test(first: Floats, second: Floats, rng: Generator) -> tuple[float, bool]:
    """Give (two-sided p-value, whether it is exact) of no difference between two drafters.

    `first` and `second`: (accepted tokens, rounds) of every prompt, shape (prompts, 2). Under the null hypothesis
    that the drafters are exchangeable on every prompt, swapping them there changes nothing; the statistic is the
    difference of accepted tokens per round, ratios of sums over prompts. Fisher's paired permutation test: all 2^n
    flips, or `FLIPS` drawn, where p = (1 + as extreme) / (1 + drawn) (Phipson and Smyth 2010).
    """
    prompts = len(first)
    if prompts == 0:
        return 1.0, True
    exact = prompts <= _EXACT
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=prompts)))
    else:
        signs = rng.choice((1.0, -1.0), size=(FLIPS, prompts))
    total, half = (first + second).sum(axis=0), signs @ (first - second)
    observed = abs(_per_round(first.sum(axis=0)) - _per_round(second.sum(axis=0)))
    flipped = np.abs(_per_round((total + half) / 2) - _per_round((total - half) / 2))
    extreme = float(np.count_nonzero(flipped >= observed - 1e-12))
    p = extreme / len(signs) if exact else (1 + extreme) / (1 + FLIPS)
    return number(p) or 0.0, exact


def holm(p_values: Sequence[float]) -> list[float]:
    """Give p-values adjusted by Holm 1979: all of a family hold together at the stated level."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [number(p) or 0.0 for p in multipletests(list(p_values), method="holm")[1].tolist()]


def _per_round(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])
