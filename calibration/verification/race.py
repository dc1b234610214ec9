"""Exact probabilities of draws without replacement, for any vocabulary, from the race of exponential clocks.

Give token j a clock that rings at an exponential time of rate q_j: the order of the rings is the order of draws
without replacement from q. Hence, with N(t) the number of rings up to t among some tokens, what k draws hold is one
integral over t of the first k coefficients of prod_j (exp(-q_j t) + (1 - exp(-q_j t)) z). The integrals are taken by
the trapezoid rule in x, t = exp(x - exp(-x)), which converges exponentially: results are exact to about 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from calibration.common.arrays import Floats, Ints
from calibration.verification.common import distribution, draft_count

STEP = 0.2
"""Width of the trapezoids in x; half of it changes no result by more than 1e-12."""
FIRST = -3.75
"""Where the integrals start: t = exp(-46)."""
NEGLIGIBLE = 1e-17


def inclusion_probabilities(q: ArrayLike, k: int) -> Floats:
    """Give [V] the probability that each token is among k draws without replacement from the distribution q [V].

    k <= 2 in closed form; otherwise O(V k) at each of about 50 times.
    """
    checked, k = distribution("q", q, "inclusion_probabilities"), draft_count(k, "inclusion_probabilities")
    included = np.zeros_like(checked)
    support = np.flatnonzero(checked)
    if len(support) <= k:
        included[support] = 1.0
        return included
    rates = checked[support]
    if k == 1:
        included[support] = rates
    elif k == 2:
        included[support] = rates + rates * _others(rates / _rest(rates))
    else:
        included[support] = np.minimum(1.0, _inclusion_integral(rates, k))
    return included


def prefix_probabilities(q: Floats, k: int, order: Ints) -> Floats:
    """Give [V + 1] the probability that all k draws without replacement lie among the first n tokens of `order`.

    `order` [V] is a permutation of the tokens; n = 0, 1, ..., V. Where q has fewer than k tokens, all of them are
    drawn. k <= 2 in closed form; otherwise O(V k) at each of about 50 times.
    """
    inside = np.zeros(len(q) + 1)
    places = np.flatnonzero(q[order])
    rates = q[order][places]
    count = min(k, len(rates))
    if count == len(rates):
        inside[places[-1] + 1 :] = 1.0
        return inside
    if count == 1:
        held = np.cumsum(rates)
    elif count == 2:
        odds = rates / _rest(rates)
        held = np.cumsum(rates * _before(odds)) + np.cumsum(odds * _before(rates))
    else:
        held = _prefix_integral(rates, count)
    held[-1] = 1.0
    inside[1:] = np.concatenate([[0.0], np.clip(held, 0.0, 1.0)])[np.cumsum(q[order] > 0)]
    return inside


def _before(values: Floats) -> Floats:
    """Give [n] the sum of the values before each; taking a value off a sum that it is part of would cancel."""
    return np.concatenate([[0.0], np.cumsum(values)[:-1]])


def _rest(rates: Floats) -> Floats:
    """Give [n] the sum of all other rates, without the cancellation of 1 - rate where one rate is nearly 1."""
    largest = int(rates.argmax())
    rest = 1.0 - rates
    rest[largest] = np.delete(rates, largest).sum()
    return np.asarray(rest)


def _others(values: Floats) -> Floats:
    """Give [n] the sum of all other values, without cancellation where one value holds nearly all."""
    largest = int(values.argmax())
    others = values.sum() - values
    others[largest] = np.delete(values, largest).sum()
    return np.asarray(others)


def _times(rates: Floats, k: int) -> Iterator[tuple[float, float]]:
    """Yield times and their weights until fewer than k rings have become all but impossible."""
    # Fewer than k rings by t are at least as likely as none among all but the k - 1 quickest clocks.
    slow = float(np.partition(rates, -(k - 1))[: -(k - 1)].sum())
    x = FIRST
    while True:
        t = float(np.exp(x - np.exp(-x)))
        yield t, STEP * t * (1.0 + float(np.exp(-x)))
        if np.exp(-slow * t) < NEGLIGIBLE and _few(rates * t, k) < NEGLIGIBLE:
            return
        x += STEP


def _few(means: Floats, k: int) -> float:
    """Give the probability that fewer than k clocks have rung; `means` [n] is rate times time."""
    light, heavy = means[means <= 1.0], means[means > 1.0]
    return float((_light(light, k, whole=True)[:, -1] * np.cumsum(_heavy(heavy, k)[-1])[::-1]).sum())


def _heavy(means: Floats, k: int) -> Floats:
    """Give [n + 1, k] the chances of 0 .. k - 1 rings among the first n clocks, one clock after the other."""
    table = np.zeros((len(means) + 1, k))
    table[0, 0] = 1.0
    for n, mean in enumerate(means):
        silent = np.exp(-mean)
        table[n + 1] = silent * table[n]
        table[n + 1, 1:] += (1.0 - silent) * table[n, :-1]
    return table


def _light(means: Floats, k: int, whole: bool = False) -> Floats:
    """Give [k, n + 1] the chances of 0 .. k - 1 rings among the first n clocks (only n = all, [k, 1], if `whole`).

    Elementary symmetric sums of exp(mean) - 1, all terms positive; means <= 1 keep them in range.
    """
    odds = np.expm1(means)
    sums: Floats = np.zeros((k, len(means) + 1))
    sums[0] = 1.0
    for m in range(1, k):
        np.cumsum(odds * sums[m - 1, :-1], out=sums[m, 1:])
    if whole:
        return np.asarray(sums[:, -1:] * np.exp(-means.sum()))
    sums[:, 1:] *= np.exp(-np.cumsum(means))
    return sums


def _prefix_integral(rates: Floats, k: int) -> Floats:
    """Give [n] P(the k-th ring inside the prefix comes before the first outside it).

    One minus the integral of P(fewer than k rings inside by t) times the density of the first ring outside.
    """
    outside = np.concatenate([np.cumsum(rates[::-1])[::-1][1:], [0.0]])
    missed = np.zeros_like(rates)
    for t, weight in _times(rates, k):
        means = rates * t
        heavy = np.flatnonzero(means > 1.0)
        at_most = np.cumsum(_heavy(means[heavy], k), axis=1)[:, ::-1]
        means[heavy] = 0.0
        light = _light(means, k)[:, 1:]
        few = np.empty_like(rates)
        bounds = [0, *heavy.tolist(), len(rates)]
        for n, (start, end) in enumerate(pairwise(bounds)):  # within a stretch the heavy clocks are the same
            few[start:end] = at_most[n] @ light[:, start:end]
        missed += weight * few * outside * np.exp(-outside * t)
    return 1.0 - missed


def _inclusion_integral(rates: Floats, k: int) -> Floats:
    """Give [n] P(fewer than k others ring before this clock), the integral over the time of its ring."""
    included = np.zeros_like(rates)
    for t, weight in _times(rates, k):
        means = rates * t
        heavy = np.flatnonzero(means > 1.0)
        is_light = means <= 1.0
        light = _light(means[is_light], k, whole=True)[:, 0]
        few = np.empty_like(rates)
        few[is_light] = _few_other_light(means[is_light], light, _heavy(means[heavy], k)[-1], k)
        few[heavy] = _few_other_heavy(means[heavy], light, k)
        included += weight * few * rates * np.exp(-means)
    return included


def _few_other_light(means: Floats, light: Floats, heavy: Floats, k: int) -> Floats:
    """Give [n] the chance of fewer than k rings but for each light clock, by dividing it out of all light ones.

    The errors of the division stay relative to the whole sum, since every lower coefficient is in it too.
    """
    silent, rings = np.exp(-means), -np.expm1(-means)
    at_most = np.cumsum(heavy)
    others = light[0] / silent
    few = others * at_most[k - 1]
    for m in range(1, k):
        others = (light[m] - rings * others) / silent
        few = few + others * at_most[k - 1 - m]
    return np.asarray(few)


def _few_other_heavy(means: Floats, light: Floats, k: int) -> Floats:
    """Give [n] the chance of fewer than k rings but for each heavy clock: the clocks before it times those after."""
    before, after = _heavy(means, k), _heavy(means[::-1], k)[::-1]
    few = np.empty(len(means))
    for n in range(len(means)):
        others = np.convolve(before[n], after[n + 1])[:k]
        few[n] = np.convolve(others, light)[:k].sum()
    return few
