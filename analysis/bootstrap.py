"""Confidence intervals that respect clustering: whole requests are resampled, never rounds or tokens.

The rounds of one request share its text, so they are not independent; an interval that treats them as such is
too narrow. Here a statistic is a function of sums over requests, and a replicate draws requests with
replacement. Where several domains are pooled, requests are drawn within each domain (stratified), so the mix of
domains stays the recorded one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

Floats = NDArray[np.float64]

DRAWS = 2000
"""Bootstrap replicates."""

LEVEL = 0.95
"""Coverage that every interval aims at."""

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
        """Give this rate as one over `requests`; at 0 or 1, where the bootstrap sees no spread, the exact bound.

        A rate of 0 (or 1) in m requests reaches up (down) to what m independent requests cannot rule out:
        1 - 0.025^(1/m), Clopper and Pearson 1934. Conservative: a request holds more than one draft.
        """
        if self.value not in (0.0, 1.0) or requests < 1:
            return dataclasses.replace(self, requests=requests)
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

        `sums` has shape (requests, m). `statistic` maps (..., m) sums over a set of requests to (..., q) values;
        undefined values are NaN. `domain` None pools all domains. Gives q estimates.
        """
        rows, total = self._resample(sums, domain)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = statistic(rows.sum(axis=0))
            replicates = statistic(total)
        requests = int(np.count_nonzero(np.any(rows != 0, axis=1)))
        strata = 1 if domain is not None else len(self.domains)
        bounds = _expanded_percentile(replicates, len(rows), strata)
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
        "each domain"
    )


def _expanded_percentile(replicates: Floats, requests: int, strata: int) -> tuple[Floats, Floats]:
    """Percentile bounds widened for few clusters (Hesterberg 2015, section 5.3).

    The percentile bootstrap behaves like a z interval with the biased standard deviation; its tail level is
    replaced by Phi(-sqrt(n / (n - h)) t), t the 97.5% point of Student's law with n - h degrees of freedom.
    An approximation, exact for means of normal data.
    """
    freedom = requests - strata
    missing = np.full(replicates.shape[1], np.nan)
    if freedom < 1:
        return missing, missing
    quantile = stdtrit(freedom, (1 + LEVEL) / 2)
    tail = float(ndtr(-np.sqrt(requests / freedom) * quantile))
    undefined = ~np.isfinite(replicates)
    usable = undefined.mean(axis=0) <= _MOST_UNDEFINED
    filled = np.where(usable, replicates, 0.0)
    low, high = np.nanquantile(np.where(np.isfinite(filled), filled, np.nan), [tail, 1 - tail], axis=0)
    return np.where(usable, low, np.nan), np.where(usable, high, np.nan)


def number(value: float | None) -> float | None:
    """Six significant digits: more than any interval here supports, and equal on every machine; None if undefined."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
