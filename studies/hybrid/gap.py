"""The share of a gap as a statistic of sums over requests, and whether a policy has shown to close what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.common.bootstrap import Candidates, ClusterBootstrap, Estimate, least
from calibration.common.arrays import Floats
from studies.hybrid.findings import TargetResult, Verdict

NEVER_BELOW = "never below best fixed"


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


@dataclass(frozen=True)
class Question:
    """A target put to a policy in one cell: ``margins`` are its speed-up beyond the target, one a fixed draft."""

    target: str
    dataset: str
    batch: int
    pricing: str
    policy: str
    wanted: float
    reached: Estimate
    margins: Candidates


def margins(
    bootstrap: ClusterBootstrap,
    base: Floats,
    policy: Floats,
    oracle: Floats,
    fixed: Sequence[Floats],
    target: str,
    wanted: float,
) -> Candidates:
    """Give by how much the speed-up of a policy exceeds `target`, against every fixed draft; rates by request.

    A share w of the gap: policy - (1 - w) fixed - w oracle; a loss of at most -w (`NEVER_BELOW`): policy -
    (1 + w) fixed. Linear in the means, unlike the share itself, whose denominator may be next to nothing. The
    target is met against the best fixed draft, whichever that truly is, where the least margin is not below 0.
    """
    kept, foreseen = (1 + wanted, 0.0) if target == NEVER_BELOW else (1 - wanted, wanted)
    beyond = [policy - kept * each - foreseen * oracle for each in fixed]
    sums = np.stack([base, *beyond], axis=1)
    return bootstrap.candidates(lambda s: s[..., 1:] / s[..., :1], sums, scale="identity")


def alike(bootstrap: ClusterBootstrap, names: Sequence[str], rates: Sequence[Floats]) -> tuple[str, ...]:
    """Name the drafts that may be the best, from their rates by request (`Candidates.best_set`)."""
    family = bootstrap.candidates(lambda s: np.asarray(s), np.stack(rates, axis=1))
    return tuple(name for name, kept in zip(names, family.best_set(), strict=True) if kept)


def judged(questions: Sequence[Question]) -> tuple[TargetResult, ...]:
    """Judge all targets together: bounds that hold for every margin of every question at once."""
    if not questions:
        return ()
    bounds = Candidates.join([q.margins for q in questions]).simultaneous()
    found, at = [], 0
    for q in questions:
        count = len(q.margins.values)
        low, high = least(bounds[at : at + count])
        at += count
        margin = Estimate(float(f"{q.margins.values.min():.6g}"), low, high, q.reached.requests)
        found.append(
            TargetResult(
                q.target, q.dataset, q.batch, q.pricing, q.policy, q.wanted, q.reached, margin, _verdict(margin)
            )
        )
    return tuple(found)


def _verdict(margin: Estimate) -> Verdict:
    if margin.low is not None and margin.low >= 0:
        return "met"
    return "missed" if margin.high is not None and margin.high < 0 else "open"
