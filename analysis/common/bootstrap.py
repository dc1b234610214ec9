"""Confidence intervals that respect clustering: whole requests are resampled, never rounds or tokens.

The rounds of one request share its text, so they are not independent; an interval that treats them as such is
too narrow. Here a statistic is a function of sums over requests, and a replicate draws requests with
replacement. Where several domains are pooled, requests are drawn within each domain (stratified), so the mix of
domains stays the recorded one.

Where a best is picked from several candidates and then judged, the interval of a fixed choice is too narrow: the
choice was made on the same data. `simultaneous` gives bounds that hold for all candidates at once, hence for
whichever was picked, and `best_set` the candidates that may be the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from calibration.common.arrays import Floats

Bounds = tuple[float | None, float | None]
"""Low and high end of an interval; None where there is none."""
Scale = Literal["log", "identity"]

DRAWS = 2000
"""Bootstrap replicates."""

LEVEL = 0.95
"""Coverage that every interval aims at."""

FEW = 8
"""Below this many clusters an interval is Student's t with the bootstrap's standard error, not a percentile interval.

The percentiles of few clusters cannot reach far enough: with 4 they cover .86 of normal data, the t form .95.
"""

_LEAST = 3
"""With fewer clusters than this no interval is given."""

_MOST_UNDEFINED = 0.05
"""A statistic that is undefined in more replicates than this share gets no interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval and the requests behind it.

    ``value`` is None where the statistic is undefined (nothing was drafted, say). ``low`` and ``high`` are None
    where no interval can be given: a single request, or too many undefined replicates. Missing is not zero.
    """

    value: float | None
    low: float | None
    high: float | None
    requests: int

    def bounded(self, requests: int) -> Estimate:
        """Give this rate as one over `requests`, within [0, 1]; at 0 or 1, where no spread is seen, exact bounds.

        A rate of 0 (or 1) in m requests reaches up (down) to what m independent requests cannot rule out:
        1 - 0.025^(1/m), Clopper and Pearson 1934. Conservative: a request holds more than one draft.
        """
        if self.value not in (0.0, 1.0) or requests < 1:
            low, high = self.low, self.high
            return Estimate(
                self.value, None if low is None else max(low, 0.0), None if high is None else min(high, 1.0), requests
            )
        reach = number(1 - ((1 - LEVEL) / 2) ** (1 / requests)) or 0.0
        low, high = (0.0, reach) if self.value == 0.0 else (1 - reach, 1.0)
        return Estimate(self.value, low, high, requests)

    @property
    def text(self) -> str:
        """The estimate to two decimals, with its interval where it has one."""
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class ClusterBootstrap:
    """The same resampled requests for every statistic, so that differences between statistics are paired.

    `domains` names the domain of each request; `rng` is used once, here. Replicates are counts of how often each
    request was drawn, shape (draws, requests of the domain).
    """

    def __init__(self, domains: Sequence[str], rng: Generator, *, draws: int = DRAWS) -> None:
        self.request_domains = tuple(domains)
        self.domains = tuple(sorted(set(domains)))
        labels = np.asarray(domains, dtype=object)
        self._rows = {d: np.flatnonzero(labels == d) for d in self.domains}
        self._counts: dict[str, Floats] = {}
        for domain, rows in self._rows.items():
            counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
            self._counts[domain] = counts.astype(np.float64)

    def estimates(
        self, statistic: Callable[[Floats], Floats], sums: Floats, domain: str | None = None
    ) -> tuple[Estimate, ...]:
        """Estimate one or more statistics from per-request sums, each with its interval.

        `sums` has shape (requests, m); a request whose row is all zero took no part (not recorded, say) and is not
        counted as a cluster. `statistic` maps (..., m) sums over a set of requests to (..., q) values; undefined
        values are NaN. `domain` None pools all domains. Gives q estimates.
        """
        rows, total = self._resample(sums, domain)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = statistic(rows.sum(axis=0))
            replicates = statistic(total)
        requests, strata = self._informed(sums, domain)
        bounds = _bounds(values, replicates, requests, strata)
        return tuple(
            Estimate(
                number(value),
                *((number(low), number(high)) if np.isfinite(value) else (None, None)),
                requests=requests,
            )
            for value, low, high in zip(values, *bounds, strict=True)
        )

    def replicates(self, statistic: Callable[[Floats], Floats], sums: Floats, domain: str | None = None) -> Floats:
        """Give the replicates themselves, shape (draws, q), as `estimates` draws them."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return statistic(self._resample(sums, domain)[1])

    def _informed(self, sums: Floats, domain: str | None) -> tuple[int, int]:
        """Give how many requests took part (their row is not all zero), and in how many domains."""
        names = self.domains if domain is None else (domain,)
        present = [int(np.count_nonzero(np.any(sums[self._rows[name]] != 0, axis=1))) for name in names]
        return sum(present), sum(count > 0 for count in present)

    def candidates(
        self,
        statistic: Callable[[Floats], Floats],
        sums: Floats,
        domain: str | None = None,
        *,
        scale: Scale = "log",
        errors: bool = True,
    ) -> Candidates:
        """Give the values of several candidates with their replicates, to be judged together (`simultaneous`).

        Arguments as those of `estimates`; each of the q values of `statistic` is one candidate. `scale`: see
        `Candidates`. `errors`: whether to find the standard error of every replicate; the `statistic` must then be
        smooth in the sums.
        """
        rows, total = self._resample(sums, domain)
        with np.errstate(divide="ignore", invalid="ignore"):
            values, replicates = statistic(rows.sum(axis=0)), statistic(total)
        requests, strata = self._informed(sums, domain)
        count = values.shape[0]
        found = self._errors(statistic, sums, domain, scale) if errors and requests >= FEW else None
        return Candidates(values, replicates, np.full(count, requests), np.full(count, strata), scale, found)

    def _errors(
        self, statistic: Callable[[Floats], Floats], sums: Floats, domain: str | None, scale: Scale
    ) -> Floats | None:
        """Standard errors of the statistic on its scale, of the data and of every replicate, shape (1 + draws, q).

        By linearisation: the statistic's numerical gradient g in the sums gives each request i the influence g . x_i,
        whose spread within the domains is the variance. None where that is too much work.
        """
        names = self.domains if domain is None else (domain,)
        rows = np.concatenate([sums[self._rows[name]] for name in names])
        counts = np.concatenate([self._counts[name] for name in names], axis=1)
        counts = np.concatenate([np.ones((1, len(rows))), counts])
        total = counts @ rows
        step = 1e-6 * np.maximum(np.abs(total[0]), 1e-12)

        def scaled(at: Floats) -> Floats:
            with np.errstate(divide="ignore", invalid="ignore"):
                found = statistic(at)
                return np.asarray(np.log(found) if scale == "log" else found)

        count = scaled(total[0]).shape[0]
        if total.size * count > _MOST_WORK:
            return None
        gradient = np.empty((count, *total.shape))
        for column in range(total.shape[1]):
            moved = np.zeros(total.shape[1])
            moved[column] = step[column]
            gradient[:, :, column] = ((scaled(total + moved) - scaled(total - moved)) / (2 * step[column])).T
        sizes = np.cumsum([len(self._rows[name]) for name in names])[:-1]
        found = np.zeros((len(total), count))
        for index, slope in enumerate(gradient):
            influence = slope @ rows.T
            for share, part in zip(np.split(counts, sizes, axis=1), np.split(influence, sizes, axis=1), strict=True):
                mean = (share * part).sum(axis=1, keepdims=True) / share.shape[1]
                found[:, index] += (share * (part - mean) ** 2).sum(axis=1)
        return np.asarray(np.sqrt(found))

    def _resample(self, sums: Floats, domain: str | None) -> tuple[Floats, Floats]:
        """Rows of the domain(s) and the resampled sums, shape (draws, m)."""
        names = self.domains if domain is None else (domain,)
        order = np.concatenate([self._rows[name] for name in names])
        counts = np.concatenate([self._counts[name] for name in names], axis=1)
        rows = sums[order]
        return rows, counts @ rows


def describe(draws: int) -> str:
    """Say how the intervals are made."""
    return (
        f"95% expanded percentile intervals from {draws:,} bootstrap replicates over whole requests, drawn within "
        f"each domain (Student's t below {FEW} requests)"
    )


@dataclass(frozen=True)
class Candidates:
    """Values of q candidates and their bootstrap replicates, drawn together: what a choice is made among.

    ``values`` (q,) and ``replicates`` (draws, q) are NaN where undefined. ``scale``: positive ones (ratios,
    throughputs) are compared as logarithms, differences as they are. ``clusters`` and ``strata`` (q,) count the
    requests drawn and the domains they were drawn in. ``errors`` (1 + draws, q): standard errors of the values and of
    every replicate on their scale; None where they are not known.
    """

    values: Floats
    replicates: Floats
    clusters: NDArray[np.int64]
    strata: NDArray[np.int64]
    scale: Scale = "log"
    errors: Floats | None = None

    @classmethod
    def join(cls, parts: Sequence[Candidates]) -> Candidates:
        """One family of several, for choices made across them; their replicates must be of the same draws."""
        return cls(
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.replicates for p in parts], axis=1),
            np.concatenate([p.clusters for p in parts]),
            np.concatenate([p.strata for p in parts]),
            parts[0].scale,
            None
            if any(p.errors is None for p in parts)
            else np.concatenate([p.errors for p in parts if p.errors is not None], axis=1),
        )

    def spread_more_than(self, inner: Candidates) -> Candidates:
        """Give these candidates with errors: those of `inner`, the same ones with less chance, and what is beyond.

        `inner` holds the requests' chance alone, these also another source of it, independent of the requests.
        """
        if inner.errors is None:
            return self
        with np.errstate(invalid="ignore"):
            wide, narrow = (np.nanvar(one._scaled(one.replicates), axis=0) for one in (self, inner))
        return replace(self, errors=np.sqrt(inner.errors**2 + np.maximum(wide - narrow, 0.0)))

    def part(self, columns: slice) -> Candidates:
        """Give some of the candidates."""
        clusters, strata = self.clusters[columns], self.strata[columns]
        errors = None if self.errors is None else self.errors[:, columns]
        return Candidates(self.values[columns], self.replicates[:, columns], clusters, strata, self.scale, errors)

    def simultaneous(self, level: float = LEVEL) -> list[Bounds]:
        """Bounds (low, high) of each candidate that hold for all of them together with probability `level`.

        Max-t (Westfall and Young 1993, Romano and Wolf 2005): the critical value is the `level` quantile over
        replicates of max_j |log r_j - log v_j| / s_j (of |r_j - v_j| / s_j on the identity scale), s_j the standard
        error of the candidate's own replicates. Few clusters widen it as they widen Student's t: the critical value
        is carried over to n - h degrees of freedom at the same tail, and s by sqrt(n / (n - h)). One candidate alone
        gets Student's interval. (None, None) where a candidate has no interval. Approximate in the same sense as
        every bootstrap.

        Where the standard error of every replicate is known, each deviation is divided by its own (bootstrap-t; Hall
        1988), and the two ends have critical values of their own at half the tail each: times of requests are skewed,
        so that a speed-up that came out high has a small error, and one critical value for both ends would say "pays"
        two to three times too often.
        """
        usable, errors, deviations = self._studentised()
        none: list[Bounds] = [(None, None)] * len(self.values)
        if not usable.any():
            return none
        if self.errors is not None:
            return self._bootstrap_t(self.errors, usable, level)
        critical = np.quantile(np.abs(deviations[:, usable]).max(axis=1), level)
        reach = self._reach(float(critical), self.clusters, self.strata) * errors
        if self.scale == "log":
            low, high = self.values * np.exp(-reach), self.values * np.exp(reach)
        else:
            low, high = self.values - reach, self.values + reach
        return [
            (number(float(a)), number(float(b))) if ok else (None, None)
            for a, b, ok in zip(low, high, usable, strict=True)
        ]

    def _bootstrap_t(self, errors: Floats, usable: NDArray[np.bool_], level: float) -> list[Bounds]:
        """Bounds by deviations of replicates over their own errors, with a critical value for each end."""
        values = self._scaled(self.values)
        with np.errstate(invalid="ignore"):
            centred = _filled(self._scaled(self.replicates) - values)
            # A replicate of little more than one request has next to no spread; it must not decide.
            own = np.maximum(errors[1:], _LEAST_ERROR * errors[0])
            own = np.where(own > 0, own, np.inf)
        studentised = np.where(usable, centred / own, 0.0)[:, usable]
        ends = [float(np.quantile(side.max(axis=1), (1 + level) / 2)) for side in (studentised, -studentised)]
        low, high = values - ends[0] * errors[0], values + ends[1] * errors[0]
        if self.scale == "log":
            low, high = np.exp(np.clip(low, -700, 700)), np.exp(np.clip(high, -700, 700))
        return [
            (number(float(a)), number(float(b))) if ok else (None, None)
            for a, b, ok in zip(low, high, usable, strict=True)
        ]

    def best_set(
        self, *, largest: bool = True, level: float = LEVEL, groups: Sequence[object] | None = None
    ) -> NDArray[np.bool_]:
        """Which candidates may be the best: a set that holds the best one with probability `level`, shape (q,).

        A candidate is left out if another one is better by the simultaneous lower bound of their paired difference,
        over all ordered pairs (multiple comparisons with the best, Hsu 1996). Candidates without an interval stay,
        undefined ones do not. `groups` (q,) labels several choices, of a best within each group: all the sets hold
        their best ones together with probability `level`.
        """
        values, replicates = self._scaled(self.values), self._scaled(self.replicates)
        labels = np.unique([str(g) for g in groups], return_inverse=True)[1] if groups is not None else None
        sign = 1.0 if largest else -1.0
        usable = self._usable()
        inside = np.isfinite(values)
        rows = np.flatnonzero(usable)
        if len(rows) < 2:
            return np.asarray(inside)
        difference = sign * (values[rows][:, None] - values[rows][None, :])  # how much the first is better
        centred = sign * _filled(replicates[:, rows] - values[rows])
        worst = np.zeros(len(centred))
        errors = np.zeros_like(difference)
        for j in range(len(rows)):  # one row of pairs at a time: q^2 columns of replicates are much memory
            mine = np.full(len(rows), True) if labels is None else labels[rows] == labels[rows[j]]
            difference[j, ~mine] = -np.inf  # no contest between two groups
            pairs = centred[:, j, None] - centred[:, mine]
            errors[j, mine] = pairs.std(axis=0)
            safe = np.where(errors[j, mine] > 0, errors[j, mine], np.inf)
            worst = np.maximum(worst, (pairs / safe).max(axis=1))
        clusters, strata = int(self.clusters[rows].min()), int(self.strata[rows].max())
        reach = float(self._reach(float(np.quantile(worst, level)), np.array([clusters]), np.array([strata]))[0])
        beaten = (difference - reach * errors > _EQUAL).any(axis=0)
        inside[rows[beaten]] = False
        return np.asarray(inside)

    def _usable(self) -> NDArray[np.bool_]:
        """Candidates with a value, enough clusters and enough defined replicates."""
        undefined = ~np.isfinite(self._scaled(self.replicates))
        enough = (self.clusters >= _LEAST) & (self.clusters > self.strata)
        return np.asarray(
            np.isfinite(self._scaled(self.values)) & enough & (undefined.mean(axis=0) <= _MOST_UNDEFINED)
        )

    def _scaled(self, values: Floats) -> Floats:
        """Values on the scale of comparison; not finite where undefined there."""
        if self.scale == "identity":
            return values
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log(values))

    def _studentised(self) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Usable candidates, standard errors on their scale (q,), and studentised deviations (draws, q)."""
        usable = self._usable()
        with np.errstate(invalid="ignore"):
            centred = _filled(self._scaled(self.replicates) - self._scaled(self.values))
        centred = np.where(usable, centred, 0.0)
        errors = centred.std(axis=0)
        return usable, errors, centred / np.where(errors > 0, errors, np.inf)

    @staticmethod
    def _reach(critical: float, clusters: NDArray[np.int64], strata: NDArray[np.int64]) -> Floats:
        """The normal critical value as one of Student's law at the same tail, in units of the bootstrap's error."""
        freedom = np.maximum(clusters - strata, 1)
        # Beyond 8 sigma the tail underflows; no quantile of 2,000 replicates comes near.
        student = -stdtrit(freedom, ndtr(-min(critical, 8.0)))
        return np.asarray(student * np.sqrt(clusters / freedom))


def least(bounds: Sequence[Bounds]) -> Bounds:
    """Bounds of the least of several quantities, from bounds that hold for all of them together; so `most`.

    How something compares with the best of several references, whichever that is: it is its least difference (or
    ratio) from any of them.
    """
    return _extreme(bounds, min)


def most(bounds: Sequence[Bounds]) -> Bounds:
    """Bounds of the largest of several quantities, from bounds that hold for all of them together."""
    return _extreme(bounds, max)


def _extreme(bounds: Sequence[Bounds], pick: Callable[[list[float]], float]) -> Bounds:
    """The extreme low and high end; none where one is missing: that one might be the extreme."""
    lows, highs = ([one for one in ends if one is not None] for ends in zip(*bounds, strict=True))
    if len(lows) < len(bounds) or len(highs) < len(bounds):
        return None, None
    return pick(lows), pick(highs)


_MOST_WORK = 60_000_000
"""Numbers in the gradients of a statistic over all replicates, from which on they are too much to hold."""

_LEAST_ERROR = 0.1
"""Standard error of a replicate is taken to be at least this share of that of the data."""

_EQUAL = 1e-12
"""Differences of logarithms below this are rounding."""


def _filled(deviations: Floats) -> Floats:
    """Undefined replicates count as no deviation (they are few, see `_MOST_UNDEFINED`)."""
    return np.where(np.isfinite(deviations), deviations, 0.0)


def _bounds(values: Floats, replicates: Floats, requests: int, strata: int) -> tuple[Floats, Floats]:
    """Bounds of one statistic each: expanded percentiles, Student's t below `FEW` clusters, none below `_LEAST`.

    Expanded percentiles (Hesterberg 2015, section 5.3): the percentile bootstrap behaves like a z interval with the
    biased standard deviation; its tail level is replaced by Phi(-sqrt(n / (n - h)) t), t the 97.5% point of Student's
    law with n - h degrees of freedom. Both forms are approximations, exact for means of normal data.
    """
    freedom = requests - strata
    missing = np.full(replicates.shape[1], np.nan)
    if freedom < 1 or requests < _LEAST:
        return missing, missing
    quantile = stdtrit(freedom, (1 + LEVEL) / 2)
    undefined = ~np.isfinite(replicates)
    usable = undefined.mean(axis=0) <= _MOST_UNDEFINED
    defined = np.where(undefined | ~usable, np.nan, replicates)
    defined[:, ~usable] = 0.0
    if requests < FEW:
        reach = quantile * np.sqrt(requests / freedom) * np.nanstd(defined, axis=0)
        low, high = values - reach, values + reach
    else:
        tail = float(ndtr(-np.sqrt(requests / freedom) * quantile))
        low, high = np.nanquantile(defined, [tail, 1 - tail], axis=0)
    return np.where(usable, low, np.nan), np.where(usable, high, np.nan)


def number(value: float | None) -> float | None:
    """Six significant digits: more than any interval here supports, and equal on every machine; None if undefined."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
