"""What the study of drafter size found: frozen records that survive `analysis.common.records.to_json`.

The sweet spot in plain words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.common.records import Record


@dataclass(frozen=True)
class SizePoint:
    """One drafter on a curve.

    ``share``: its parameters over the verifier's, without embedding and head in a measured family, all of them in an
    extrapolation; ``share_in_all``: all of them, where they are known; ``draft_tokens``: its best draft length, bonus
    not included; ``speedup``: over no speculation at that length; ``draft_step_s``: one draft step of the batch;
    ``cost_ratio``: it over a plain verifier step of the same batch. ``acceptance``: P(a drafted token is accepted) at
    a position.
    """

    drafter: str
    parameters: float
    share: float
    layers: int | None
    draft_tokens: int
    speedup: Estimate
    draft_step_s: float
    cost_ratio: float
    acceptance: Estimate
    share_in_all: float | None


@dataclass(frozen=True)
class SweetSpot:
    """Where a curve is highest and how flat it is there; shares of the verifier's parameters. See `find_spots`.

    ``best``: the size that came out best; in a measured family with the range of those that may be (``may_be_best``,
    at their best draft length each: sets that hold the best size of every curve at once with 95%); in an
    extrapolation with the interval of draws, where ``may_be_best`` are those best most often, 95% of draws together.
    ``best_of``: how often each size came out best, over bootstrap replicates (draws); ``flat_of``: how often it came
    within ``within`` of the best. ``gain_end``: where doubling the drafter starts to bring less than ``gain`` (a
    share of speed); ``still_gaining``: how often it still brought more at the largest size, in which case
    ``gain_end`` is that size. ``speedup``: at the maximum, with the interval of that size had it been chosen
    beforehand; ``together``: with bounds that hold for all sizes, draft lengths, batch sizes and devices (and
    domains) at once. ``pays``: whether these lie above 1, ``costs`` whether they lie below, for every size.
    """

    best: Estimate
    low: Estimate
    high: Estimate
    gain_end: Estimate
    within: float
    gain: float
    still_gaining: float
    best_of: dict[str, float]
    flat_of: dict[str, float]
    may_be_best: tuple[str, ...]
    speedup: Estimate
    together: Estimate
    pays: bool
    costs: bool


@dataclass(frozen=True)
class SizeCurve:
    """Speed-up against size on one device at one batch size and domain (None: all).

    ``label``: how the numbers were come by (simulated, extrapolated). ``latency``: what a draft step was taken to
    cost. ``statement``: the sweet spot in plain words.
    """

    verifier: str
    device: str
    label: str
    latency: str
    batch: int
    domain: str | None
    points: tuple[SizePoint, ...]
    spot: SweetSpot
    statement: str


@dataclass(frozen=True)
class LatencyLine:
    """Seconds of a draft step against depth over the family: base_s + layer_s x layers, least squares.

    ``at_no_depth``: base_s over a plain verifier step: what a drafter of no layers would still cost.
    ``proportional_error``: how much dearer the smallest drafter's step is than its share of the verifier's step.
    """

    device: str
    batch: int
    base_s: Estimate
    layer_s: Estimate
    r_squared: float
    at_no_depth: float
    proportional_error: float


@dataclass(frozen=True)
class MeasuredFamily:
    """The family of a TraceSet: curves on the device that it was timed on and on catalogued ones.

    ``law``: which forms of acceptance against size its sizes tell apart. ``proportional`` are the curves of the same
    acceptance if a draft step cost its share of parameters of a verifier step.
    """

    verifier: str
    requests: int
    domains: tuple[str, ...]
    curves: tuple[SizeCurve, ...]
    proportional: tuple[SizeCurve, ...]
    latency: tuple[LatencyLine, ...]
    law: str


@dataclass(frozen=True)
class PairFact:
    """A public pair as it was used; ``role``: family (how acceptance grows) or anchor (what pins the curve)."""

    role: str
    verifier: str
    drafter: str
    task: str
    share: float
    acceptance: float
    source: str
    read: str


@dataclass(frozen=True)
class BandCheck:
    """One measured family predicted from the others: its largest drafter pins the curve, its smallest is predicted.

    ``predicted``: median and 95% of draws from the families of all other verifiers.
    """

    family: str
    anchor_share: float
    share: float
    measured: float
    predicted: Estimate

    @property
    def inside(self) -> bool:
        """Whether the measured acceptance lies within the band."""
        low, high = self.predicted.low, self.predicted.high
        return low is not None and high is not None and low <= self.measured <= high


@dataclass(frozen=True)
class LatencyAssumption:
    """The best size of the same acceptance curve under one view of what a draft step costs; parameters, not shares.

    ``divisor``: the verifier's parameters over the best size; ``shift``: the best size over that in proportion to
    parameters, draw by draw, and ``larger`` how often it is larger. ``draft_tokens``: draft length at the median best
    size.
    """

    name: str
    statement: str
    best: Estimate
    low: Estimate
    high: Estimate
    divisor: Estimate
    shift: Estimate
    larger: float
    draft_tokens: float
    speedup: Estimate


@dataclass(frozen=True)
class DepthPoint:
    """A drafter of the same parameters in another depth, with the same acceptance.

    ``break_even_rate``: acceptance that it needs to be as fast as the shallowest one, None where even 1 does not do;
    ``rate_needed``: by how much that is more.
    """

    layers: int
    hidden: int
    parameters: float
    draft_step_s: float
    cost_ratio: float
    speedup: Estimate
    break_even_rate: float | None
    rate_needed: float | None


@dataclass(frozen=True)
class DepthStudy:
    """Wide and shallow against deep and narrow at equal parameters, on one device and batch size.

    ``rate``: the acceptance at that size, the median of the draws.
    """

    verifier: str
    device: str
    batch: int
    parameters: float
    rate: float
    points: tuple[DepthPoint, ...]


@dataclass(frozen=True)
class Optimum:
    """A published best size, as a share of the verifier's parameters and as 1 / divisor."""

    source: str
    verifier: str
    drafter: str
    share: float
    divisor: float
    among: str
    latency: str
    read: str


@dataclass(frozen=True)
class SpeedCheck:
    """A published speed-up beside the extrapolated one, and the seconds a draft step would take to explain it.

    ``predicted``: at the measured tokens per round where those are known, else with the band of acceptance.
    ``plain_step_s``: of the verifier alone. ``implied_draft_s``: None where tokens per round are not known.
    """

    source: str
    drafter: str
    published: float
    predicted: Estimate
    plain_step_s: float
    predicted_draft_s: float
    implied_draft_s: float | None
    read: str

    @property
    def log_error(self) -> float:
        """Logarithm of the published speed-up over the predicted one."""
        return math.log(self.published / (self.predicted.value or math.nan))


@dataclass(frozen=True)
class Discrepancy:
    """How far predicted speed-ups lie from measured ones; see `analysis.size.extrapolated`.

    ``log_error``: root mean square of the logarithm of measured over predicted, None without checks; ``factor``: what
    that makes of a prediction, up or down, with 95% (Student's law of ``checks`` degrees of freedom); ``largest``:
    the check that is missed by most.
    """

    checks: int
    log_error: float | None
    factor: float | None
    largest: SpeedCheck | None


@dataclass(frozen=True)
class Excluded:
    """A drafter that does not compete, and why."""

    drafter: str
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """The answer for the large verifier under another assumption: on the first devices, at the smallest batch.

    ``best`` in parameters; ``favourite``: the published shape that is best most often, None without any.
    """

    assumption: str
    best: Estimate
    speedup: Estimate
    favourite: str | None
    share: float | None


@dataclass(frozen=True)
class Extrapolation:
    """A verifier that nobody here can load: everything in it is extrapolated.

    ``families``: verifiers whose families bend its acceptance; ``behind``: what that makes the sample, in words.
    ``published``: curves over drafters that exist and share the verifier's vocabulary, none without any such;
    ``excluded`` are the others. ``scale``: over made-up ones of one depth, finer, taken to have that vocabulary. Both
    carry the ``discrepancy`` that engines show; ``priced`` is ``scale`` without it: prices alone, as are all views,
    anchors and depths. ``sensitivity``: the answer under other assumptions; ``quoted_weight``: weight of a fact that
    is quoted, not at hand. ``by_anchor``: the best size, parameters, for each anchor alone. ``least_rates``: what
    public facts without a draft length bound.
    """

    verifier: str
    verifier_parameters: float
    pairs: tuple[PairFact, ...]
    families: tuple[str, ...]
    behind: str
    band_checks: tuple[BandCheck, ...]
    published: tuple[SizeCurve, ...]
    excluded: tuple[Excluded, ...]
    scale: tuple[SizeCurve, ...]
    priced: tuple[SizeCurve, ...]
    discrepancy: Discrepancy
    sensitivity: tuple[Sensitivity, ...]
    quoted_weight: float
    by_anchor: dict[str, Estimate]
    assumptions: tuple[LatencyAssumption, ...]
    depth: tuple[DepthStudy, ...]
    checks: tuple[SpeedCheck, ...]
    least_rates: dict[str, float]
    context_tokens: int
    cost_error: float
    depth_layers: int


@dataclass(frozen=True)
class SizeFindings(Record):
    """The size question answered: the measured family, the extrapolation to a large verifier, and published optima.

    ``answer``: one or two sentences with the number and its interval.
    """

    measured: MeasuredFamily
    extrapolated: Extrapolation
    published: tuple[Optimum, ...]
    answer: str
    limits: tuple[str, ...]
    draws: int
    seed: int
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return "measured family: recorded; larger verifiers: extrapolated from published shapes and points"


def share_text(value: float | None) -> str:
    """A share of parameters in percent, to two digits: ``6.7%``."""
    return "-" if value is None else f"{100 * value:.2g}%"


def interval_text(value: Estimate) -> str:
    """A share with its interval: ``20% (10% to 20%)``."""
    if value.low is None or value.high is None:
        return share_text(value.value)
    return f"{share_text(value.value)} ({share_text(value.low)} to {share_text(value.high)})"


def speedup_text(value: Estimate) -> str:
    """A speed-up with its interval: ``2.57 (1.92 to 3.21)``."""
    if value.value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def parameters_text(value: float | None) -> str:
    """A number of parameters: to two digits: ``1.2B``, ``740M``."""
    if value is None:
        return "-"
    shown = float(f"{value:.2g}")
    return f"{shown / 1e9:g}B" if shown >= 1e9 else f"{shown / 1e6:g}M"


def parameters_interval(value: Estimate) -> str:
    """A number of parameters with its interval."""
    if value.low is None or value.high is None:
        return parameters_text(value.value)
    return f"{parameters_text(value.value)} ({parameters_text(value.low)} to {parameters_text(value.high)})"


def scaled(value: Estimate, whole: float) -> Estimate:
    """Shares of `whole` as parameters."""
    middle, low, high = (
        None if each is None else number(each * whole) for each in (value.value, value.low, value.high)
    )
    return Estimate(middle, low, high, value.requests)


def common_region(points: Sequence[SizePoint], spot: SweetSpot) -> tuple[float, float]:
    """Give the parameters between which sizes come close to the best in at least half of the draws.

    Close: within ``spot.within``. The stretch of neighbouring sizes that holds the one that does so most often; that
    one alone where none does so in half of the draws.
    """
    often = [spot.flat_of[p.drafter] for p in points]
    first = last = max(range(len(points)), key=often.__getitem__)
    while first > 0 and often[first - 1] >= 0.5:
        first -= 1
    while last + 1 < len(points) and often[last + 1] >= 0.5:
        last += 1
    return points[first].parameters, points[last].parameters


def most_often(spot: SweetSpot) -> tuple[str, float]:
    """Give the size that is best most often, and how often."""
    name = max(spot.best_of, key=lambda each: spot.best_of[each])
    return name, spot.best_of[name]


def flat_words(points: Sequence[SizePoint], spot: SweetSpot) -> str:
    """Say between which sizes most scenarios are flat, or that none is near the best in most of them."""
    if max(spot.flat_of.values()) < 0.5:
        return f"no size is within {spot.within:.0%} of the best in most scenarios"
    low, high = (parameters_text(size) for size in common_region(points, spot))
    return f"in most scenarios anything from {low} to {high} is within {spot.within:.0%} of it"


def miss_words(check: SpeedCheck) -> str:
    """A check in a clause: what was measured and what was predicted."""
    quoted = ", quoted" if check.read == "quoted" else ""
    return (
        f"{check.published:.2f} measured against {speedup_text(check.predicted)} predicted "
        f"({check.source.split(':')[0]}{quoted})"
    )


def discrepancy_words(found: Discrepancy) -> str:
    """Say what the interval of an extrapolation takes from checks, and the largest miss."""
    if found.largest is None or found.factor is None:
        return "No published measurement checks it: the error of engines is not in the interval."
    many = f"{found.checks} published measurement{'s' if found.checks > 1 else ''}"
    reach = f"{float(f'{found.factor:.2g}'):g}" if found.factor < 1000 else "more than 1,000"
    return (
        f"The intervals hold by how much engines may depart from prices: with {many} to go by, a factor of {reach} "
        f"either way (95%). The largest miss: {miss_words(found.largest)}."
    )


def existing_words(large: Extrapolation) -> str:
    """Say which published shape is best how often, of those that compete, and how many do not."""
    out = f"{len(large.excluded)} with another vocabulary left out" if large.excluded else ""
    if not large.published:
        return " No published shape has its vocabulary." if large.excluded else ""
    curve = large.published[0]
    name, share = most_often(curve.spot)
    each = sorted(curve.spot.best_of.items(), key=lambda one: -one[1])
    told = ", ".join(f"{one} in {often:.0%}" for one, often in each)
    those = f"the {len(curve.points)} published shapes with its vocabulary" + (f" ({out})" if out else "")
    if len(curve.points) == 1:
        return f" One published shape has its vocabulary, {name}{f' ({out})' if out else ''}."
    if share >= LEVEL:
        return f" Of {those} {name} is best in {share:.0%} of scenarios."
    return f" Which of {those} is best cannot be told: {told} of scenarios."


def spot_statement(
    verifier: str,
    device: str,
    batch: int,
    domain: str | None,
    points: Sequence[SizePoint],
    spot: SweetSpot,
    label: str,
) -> str:
    """Say which size is best, how flat it is there, and whether it pays."""
    on = "" if domain is None else f" on {domain}"
    share = max((p for p in points), key=lambda p: p.speedup.value or 0.0)
    end = (
        f"doubling the drafter still gains {spot.gain:.0%} at the largest size"
        if spot.still_gaining > 0.5
        else f"from {share_text(spot.gain_end.value)} on, doubling it gains less than {spot.gain:.0%}"
    )
    paying = (
        "it pays" if spot.pays else "it costs time all the same" if spot.costs else "whether it pays is not settled"
    )
    return (
        f"For {verifier} on {device} at batch {batch}{on} the best drafter has {interval_text(spot.best)} of the "
        f"verifier's parameters (in brackets, what may be the best); within {spot.within:.0%} of it is anything from "
        f"{share_text(spot.low.value)} to {share_text(spot.high.value)}; {end}. Its speed-up is "
        f"{speedup_text(spot.together)}, at draft length {share.draft_tokens}: {paying} ({label})."
    )
