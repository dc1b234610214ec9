"""Estimates over replications: mean, standard deviation and Student's t interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
COVERS = "over seeds alone: not over which requests were recorded, nor over the error of step times"
"""What intervals over replications cover, for every table that shows them."""
_SETTINGS = frozenset({"seed"})
"""Numbers of a summary that are not results."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` independent replications with the ends of its interval at level `CONFIDENCE`.

    `sd` and the interval are None where n < 2, and the interval also where the replications carry no chance at all.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def without_interval(self) -> Estimate:
        """Give the same without interval."""
        return Estimate(self.n, self.mean, self.sd)

    def to_dict(self) -> dict[str, Any]:
        """Give what is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def estimate(values: Sequence[float]) -> Estimate:
    """Give mean +- t_{n-1} sd / sqrt(n) of independent `values`; exact coverage where they are normal.

    Means and throughputs over many requests are nearly so by the central limit theorem; extreme percentiles of short
    runs are skewed, and their intervals cover a little less.
    """
    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    if n > 1 and bool((array == array[0]).all()):  # the mean of equal numbers is rounded; its sd would not be 0
        return Estimate(n, float(array[0]), 0.0, float(array[0]), float(array[0]))
    if n < 2:
        return Estimate(n, mean)
    sd = float(array.std(ddof=1))
    reach = t_quantile(n - 1) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - reach, mean + reach)


def t_quantile(degrees: int) -> float:
    """Give the two-sided `CONFIDENCE` quantile of Student's t with `degrees` of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def results_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Give every number of a run's summary that is a result; item i of a list becomes ``name[i]``."""
    flat: dict[str, float] = {}
    for name, value in summary.items():
        items = {f"{name}[{i}]": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {
            key: item
            for key, item in items.items()
            if isinstance(item, int | float) and not isinstance(item, bool) and key not in _SETTINGS
        }
    return flat


def metric_names(runs: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Give the names of all results in `runs`, in the order of the first run, later ones after that."""
    return tuple(dict.fromkeys(name for run in runs for name in run))
