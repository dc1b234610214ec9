"""What a study of a cascade finds, as data."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.cascade.published import PublishedFacts, Switch
from analysis.common.bootstrap import Estimate
from analysis.common.records import Record


@dataclass(frozen=True)
class StageSummary:
    """One stage run alone on every item: mean quality, mean cost in the unit of the table."""

    name: str
    quality: Estimate
    cost: Estimate


@dataclass(frozen=True)
class FormLoss:
    """Log loss (nats) of a form of the predictor, cross-fitted within the training items, and the folds it won.

    `after`: how many stages had run.
    """

    after: int
    kind: str
    log_loss: float
    folds: int


@dataclass(frozen=True)
class Bin:
    """Items of neighbouring predictions: mean prediction, and observed quality with its interval."""

    predicted: float
    observed: Estimate


@dataclass(frozen=True)
class StageScores:
    """How good the predictions of one stage's correctness are, after the first `after` stages ran, out of fold.

    `brier` against `brier_base`, that of the rate of the training items; `skill` = 1 - brier / brier_base (paired).
    `ece`: mean |observed - predicted| over ten bins of equal count; chance alone, with predictions exactly right,
    makes it `ece_chance_low` to `ece_chance_high` (95%; a bootstrap would add that bias twice). `auroc`: chance that
    a correct answer is scored above a wrong one of the same fold.
    """

    stage: str
    after: int
    brier: Estimate
    brier_base: Estimate
    skill: Estimate
    ece: float
    ece_chance_low: float
    ece_chance_high: float
    auroc: Estimate
    log_loss: Estimate
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class PolicyPoint:
    """A policy at one lambda: means over items, out of fold.

    `utility` = lambda * quality - cost. `gain`: paired difference from the best single stage in hindsight;
    `gain_together`: the same with bounds that hold for all policies (but the oracles, which have none) and lambdas
    at once, against whichever stage is best; `over_mixing`: quality above random mixing of stages at the same mean
    cost; `gap_closed`: share of the way from the best single stage to the oracle that routes. `answered`: share of
    items that each stage answers; `ran`: share on which it runs.
    """

    lam: float
    quality: Estimate
    cost: Estimate
    utility: Estimate
    gain: Estimate
    gain_together: Estimate
    over_mixing: Estimate
    gap_closed: Estimate
    answered: tuple[Estimate, ...]
    ran: tuple[Estimate, ...]


@dataclass(frozen=True)
class PolicyCurve:
    """One policy over lambda.

    `mean_gain`: gain / lambda, averaged over the lambdas: what the policy is worth against the best single stage of
    each lambda, in units of quality; `mean_gain_together`: with bounds that hold for all policies at once (an oracle
    has none).
    """

    policy: str
    title: str
    points: tuple[PolicyPoint, ...]
    mean_gain: Estimate
    mean_gain_together: Estimate


@dataclass(frozen=True)
class BestAt:
    """The policies that can be run, and the stages alone, that may have the highest utility at a lambda.

    The sets of all lambdas hold the best one together with 95%.
    """

    lam: float
    policies: tuple[str, ...]
    stages: tuple[str, ...]


@dataclass(frozen=True)
class StageRange:
    """The lambdas of the grid at which a stage answers 1% of the items or more; None where at none.

    `edge`: the upper end is the last lambda of the grid, so that the true one lies beyond.
    """

    policy: str
    stage: str
    from_lambda: float | None
    to_lambda: float | None
    edge: bool
    most_share: float
    most_at_lambda: float


@dataclass(frozen=True)
class Headline:
    """The learned policy of largest `mean_gain`, and its point of largest gain / lambda.

    Both are chosen after the fact, so their values are on the high side; the bounds of `mean_gain_together` and
    `gain_together` hold whatever was chosen (see `PolicyCurve`, `PolicyPoint`), and `pays` says that the former lie
    above 0. `saving`: share of cost saved against the single stage of highest quality at the cheapest lambda where
    the policy's quality is as high, None where at none; `saving_quality`: by how much its quality is higher. Their
    bounds hold for all lambdas at once.
    """

    policy: str
    mean_gain: Estimate
    mean_gain_together: Estimate
    pays: bool
    lam: float
    best_stage: str
    gain: Estimate
    gain_together: Estimate
    saving: Estimate | None
    saving_quality: Estimate | None
    saving_lam: float | None


@dataclass(frozen=True)
class CascadeFindings(Record):
    """A study of one table. Lambda is the value of a correct answer in units of cost.

    `continued`: a stage that runs after others pays only what it adds to the dearest of them.
    `switches_once`, `switches_sequential`: where single stages take over from each other at their mean costs and
    qualities, without any signal. `degenerate`: at no lambda does the sequential rule let two stages answer 5% of
    the items each. `best`: what may be best at each lambda. `draws`: bootstrap replicates over items, drawn within
    each domain; the fits stay as they are.
    """

    name: str
    label: str
    items: int
    domains: dict[str, int]
    stages: tuple[StageSummary, ...]
    signals: tuple[str, ...]
    item_features: tuple[str, ...]
    known_domain: bool
    continued: bool
    lambdas: tuple[float, ...]
    seed: int
    draws: int
    folds: int
    forms: tuple[FormLoss, ...]
    scores: tuple[StageScores, ...]
    policies: tuple[PolicyCurve, ...]
    best: tuple[BestAt, ...]
    ranges: tuple[StageRange, ...]
    switches_once: tuple[Switch, ...]
    switches_sequential: tuple[Switch, ...]
    degenerate: bool
    headline: Headline
    published: PublishedFacts
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return f"the table of items of {self.name}: {self.label}"

    def policy(self, key: str) -> PolicyCurve | None:
        """Give a policy by its key, None where it was not evaluated."""
        return next((curve for curve in self.policies if curve.policy == key), None)
