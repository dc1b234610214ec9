"""Acceptance of each drafter on each domain, in the four definitions in use, which differ and are kept apart.

- *accepted per drafted*: accepted over drafted tokens of rounds of draft length k (what engines log). Depends on
  k: a rejection wastes the drafts behind it. With independent acceptance a it is (a + a^2 + ... + a^k) / k.
- *mean overlap*: A_t = sum over the vocabulary of min(p, q), averaged over all positions; no round is played.
- *geometric rate*: maximum likelihood of the capped geometric, that is accepted over compared drafts, where a
  round compares its drafts up to the first rejection, the draft length or the end of the text (right-censored).
- *conditional by depth*: alpha_i = P(draft i accepted | drafts 1..i-1 accepted), one number per depth.

Beside them, the *position rate* is the mean over all positions of P(a token drafted there is accepted): what a
teacher-forced evaluation measures, and what is usually put into the constant-rate formula. All are replays of
recorded text, exact for greedy traces and one-hot drafters, exact expectations for sampled model drafters.
Averages are over tokens and rounds, so long outputs weigh more. The bonus token counts only where it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.common.rounds import Recording, RoundSums, replay_rounds
from calibration.common.arrays import Floats


@dataclass(frozen=True)
class AcceptanceRow:
    """Acceptance of one drafter at one draft length on one domain (None: all domains pooled).

    ``rounds`` counts complete rounds. ``tokens_per_round`` includes the bonus token and counts rounds in which
    the drafter proposed nothing. ``formula_tokens`` is the constant-rate formula at the position rate;
    ``formula_error`` = formula / measured - 1, positive where the formula promises too much;
    ``formula_error_drafted`` is the same with the accepted-per-drafted rate put into the formula.
    """

    drafter: str
    domain: str | None
    draft_tokens: int
    rounds: float
    accepted_per_drafted: Estimate
    position_rate: Estimate
    mean_overlap: Estimate
    geometric_rate: Estimate
    tokens_per_round: Estimate
    formula_tokens: Estimate
    formula_error: Estimate
    formula_error_drafted: Estimate


@dataclass(frozen=True)
class DepthPoint:
    """Acceptance at depth i of rounds that draft ``draft_tokens``.

    ``conditional`` is alpha_i, over the ``at_risk`` drafts compared at that depth; the end of the text censors.
    ``unconditional`` is the share of complete rounds with a draft in which draft i was accepted: what vLLM
    reports as acceptance per position.
    """

    drafter: str
    domain: str | None
    draft_tokens: int
    depth: int
    conditional: Estimate
    unconditional: Estimate
    at_risk: float
    rounds: float


def constant_rate_tokens(rate: Floats | float, draft_tokens: int) -> Floats:
    """Tokens per round, bonus included, if every draft were accepted independently with probability `rate`.

    1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a), Leviathan et al. 2023, equation 1.
    """
    powers = np.power(np.asarray(rate, dtype=np.float64)[..., None], np.arange(draft_tokens + 1))
    return np.asarray(powers.sum(axis=-1))


def acceptance_rows(
    recorded: Recording, rounds: RoundSums, bootstrap: ClusterBootstrap, domains: Sequence[str | None]
) -> list[AcceptanceRow]:
    """Estimate the acceptance of one drafter at one draft length, one row a domain."""
    k = rounds.draft_tokens
    startable = recorded.startable
    seen = np.isfinite(recorded.overlap) & startable
    sums = np.stack(
        [
            rounds.rounds,
            rounds.drafted,
            rounds.accepted,
            rounds.at_risk.sum(axis=1),
            rounds.accepted_at.sum(axis=1),
            startable.sum(axis=0),
            (recorded.match * startable).sum(axis=0, dtype=np.float64),
            seen.sum(axis=0),
            np.where(seen, recorded.overlap, 0.0).sum(axis=0, dtype=np.float64),
        ],
        axis=1,
    )

    def statistic(s: Floats) -> Floats:
        played, drafted, accepted, risk, survived, positions, matched, with_overlap, overlap = np.moveaxis(s, -1, 0)
        tokens = 1 + accepted / played
        formula = constant_rate_tokens(matched / positions, k)
        formula_drafted = constant_rate_tokens(accepted / drafted, k)
        return np.stack(
            [
                accepted / drafted,
                matched / positions,
                overlap / with_overlap,
                survived / risk,
                tokens,
                formula,
                formula / tokens - 1,
                formula_drafted / tokens - 1,
            ],
            axis=-1,
        )

    found = []
    for domain in domains:
        mine = _of_domain(recorded, domain)
        estimates = bootstrap.estimates(statistic, sums, domain)
        drafted, placed, overlap, compared = (int(np.count_nonzero(sums[mine, column])) for column in (1, 5, 7, 3))
        rates = zip(estimates[:4], (drafted, placed, overlap, compared), strict=True)
        found.append(
            AcceptanceRow(
                recorded.drafter,
                domain,
                k,
                _count(rounds.rounds[mine]),
                *(estimate.bounded(requests) for estimate, requests in rates),
                *estimates[4:],
            )
        )
    return found


def depth_points(
    recorded: Recording, rounds: RoundSums, bootstrap: ClusterBootstrap, domains: Sequence[str | None]
) -> list[DepthPoint]:
    """Estimate conditional and unconditional acceptance by depth, one point per domain and depth."""
    k = rounds.draft_tokens
    sums = np.concatenate(
        [rounds.at_risk, rounds.accepted_at, rounds.accepted_by_position, rounds.drafting_rounds[:, None]], axis=1
    )

    def statistic(s: Floats) -> Floats:
        risk, accepted, by_position, drafting = np.split(s, [k, 2 * k, 3 * k], axis=-1)
        return np.concatenate([accepted / risk, by_position / drafting], axis=-1)

    points = []
    for domain in domains:
        mine = _of_domain(recorded, domain)
        drafting = int(np.count_nonzero(rounds.drafting_rounds[mine]))
        estimates = bootstrap.estimates(statistic, sums, domain)
        points += [
            DepthPoint(
                drafter=recorded.drafter,
                domain=domain,
                draft_tokens=k,
                depth=depth,
                conditional=estimates[depth - 1].bounded(int(np.count_nonzero(rounds.at_risk[mine, depth - 1]))),
                unconditional=estimates[k + depth - 1].bounded(drafting),
                at_risk=_count(rounds.at_risk[mine, depth - 1]),
                rounds=_count(rounds.drafting_rounds[mine]),
            )
            for depth in range(1, k + 1)
        ]
    return points


def replay_all(recorded: Recording, draft_tokens: Sequence[int]) -> dict[int, RoundSums]:
    """Replay one drafter at every draft length that its recording allows."""
    limit = recorded.max_draft_tokens
    return {k: replay_rounds(recorded, k) for k in draft_tokens if limit is None or k <= limit}


def _of_domain(recorded: Recording, domain: str | None) -> NDArray[np.bool_]:
    """Which sequences belong to `domain`; None: all."""
    labels = np.asarray(recorded.domains, dtype=object)
    return np.full(len(labels), True) if domain is None else np.asarray(labels == domain, dtype=bool)


def _count(values: Floats) -> float:
    """A number of rounds or drafts; expected numbers of sampled traces keep two decimals."""
    return round(float(values.sum()), 2)
