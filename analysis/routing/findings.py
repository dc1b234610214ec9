"""What routing to drafters is worth: classifiers, bandits, confidence and oracles on recorded traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.common.bootstrap import Estimate
from analysis.common.records import Record
from analysis.routing.served import Price

Verdict = Literal["beats it", "loses to it", "cannot tell apart"]


@dataclass(frozen=True)
class MeanOverOrders:
    """A mean over random orders of the same requests, with its 95% interval: chance of the orders alone."""

    value: float
    low: float
    high: float
    orders: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Prompts whose likeliest domain had a probability in this bin: mean probability and share that was right."""

    confidence: float
    right: Estimate


@dataclass(frozen=True)
class ClassifierQuality:
    """The calibrated classifier of prompts, every prompt judged by a model that never saw it.

    ``accuracy`` of the likeliest domain; ``brier`` sums over classes (0 best, 2 worst); ``log_loss`` in nats, and
    ``log_loss_uncalibrated`` at temperature 1; ``log_loss_shares`` of the shares of domains. ``ece``: expected
    calibration error over the bins. ``temperatures``: one a fold.
    """

    folds: int
    classes: tuple[str, ...]
    accuracy: Estimate
    largest_share: float
    log_loss: Estimate
    log_loss_uncalibrated: Estimate
    log_loss_shares: float
    brier: Estimate
    ece: float
    temperatures: tuple[float, ...]
    reliability: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class PolicyRow:
    """One way to choose drafters on one traffic (domain None: mixed) at batch 1.

    Policies: ``always <drafter>``; a choice by request (label, classifiers, bandits); by round (confidence, and
    merged drafts: TAPS, whose verified tokens are an upper bound). ``speedup`` over no speculation;
    ``against_single``: throughput over that of ``best_single``, the drafter that is best alone on this very traffic,
    in hindsight; ``regret``: seconds over the oracle by request, a share of its. Their intervals are those of one
    policy and traffic chosen beforehand. ``speedup_together``, ``against_together``: the same values with bounds that
    hold for every policy on mixed traffic at once (for every policy and domain at once on the domains), the latter
    against whichever single drafter is best. ``verdict``: where these leave out 1. ``oracle`` where no engine could
    do it.
    """

    policy: str
    domain: str | None
    best_single: str
    speedup: Estimate
    speedup_together: Estimate
    against_single: Estimate
    against_together: Estimate
    regret: Estimate
    verdict: Verdict
    oracle: bool


@dataclass(frozen=True)
class BatchRow:
    """The same on mixed traffic in a larger batch, simulated in full; means over ``replications`` shuffled orders.

    ``against_together``: bounds that hold for every policy and batch size at once.
    """

    policy: str
    batch: int
    replications: int
    speedup: Estimate
    against_single: Estimate
    against_together: Estimate
    verdict: Verdict
    oracle: bool


@dataclass(frozen=True)
class GrowthPoint:
    """Cumulative regret of a bandit after so many requests at batch 1: seconds over the oracle by request."""

    policy: str
    requests: int
    regret_s: MeanOverOrders


@dataclass(frozen=True)
class DriftPoint:
    """Efficiency over ``requests`` requests up to number ``until``: seconds of the oracle by request over its own."""

    policy: str
    until: int
    efficiency: MeanOverOrders


@dataclass(frozen=True)
class Drift:
    """The mix of domains changes after ``switch`` requests at batch 1: domains before and after, and who copes.

    ``window``: of the bandit that forgets. Prompts are drawn with replacement from each phase's domains.
    """

    first: tuple[str, ...]
    later: tuple[str, ...]
    switch: int
    window: int
    before: dict[str, MeanOverOrders]
    after: dict[str, MeanOverOrders]
    settled: dict[str, MeanOverOrders]
    curve: tuple[DriftPoint, ...]


@dataclass(frozen=True)
class OnlineRow:
    """A stopping policy on the later half of drifting traffic: throughput over that of ``tuned_tokens``.

    The fixed length that was best on the first half. ``tuned_ratio`` on the first half, ``later_ratio`` on the later;
    ``tuned_together`` and ``later_together`` have bounds that hold for all lengths and policies on both halves.
    """

    policy: str
    tuned_ratio: Estimate
    later_ratio: Estimate
    tuned_together: Estimate
    later_together: Estimate


@dataclass(frozen=True)
class Online:
    """What adjusting the draft length online is worth when the domains change in mid-run, for one drafter."""

    drafter: str
    batch: int
    first: tuple[str, ...]
    later: tuple[str, ...]
    tuned_tokens: int
    best_later_tokens: int
    rows: tuple[OnlineRow, ...]


@dataclass(frozen=True)
class PricedRouting:
    """Everything under one price list. ``draft_tokens``: the length at which the best single drafter is best.

    ``extrapolated``: the largest share of iterations of a run that were priced outside of what was measured.
    ``alike``: the policies, single drafters among them, that may be the best on mixed traffic at batch 1.
    """

    price: Price
    extrapolated: float
    draft_tokens: int
    best_single: str
    alike: tuple[str, ...]
    rows: tuple[PolicyRow, ...]
    batches: tuple[BatchRow, ...]
    growth: tuple[GrowthPoint, ...]
    drift: Drift | None
    online: Online | None

    def row(self, policy: str, domain: str | None = None) -> PolicyRow:
        """Give the row of one policy on one traffic."""
        return next(row for row in self.rows if (row.policy, row.domain) == (policy, domain))


@dataclass(frozen=True)
class RoutingFindings(Record):
    """Answers to: does it pay to choose the drafter for each request, and who should choose?

    ``classifier`` is None where ``without_classifier`` says why.
    """

    traces: str
    verifier: str
    drafters: tuple[str, ...]
    requests: dict[str, int]
    classifier: ClassifierQuality | None
    without_classifier: str
    prices: tuple[PricedRouting, ...]
    method: str
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return f"recorded choices of {self.traces}, simulated at {', '.join(p.price.text for p in self.prices)}"
