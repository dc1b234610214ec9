"""The sweet spot in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.common.bootstrap import LEVEL, Estimate, number
from analysis.size.findings import Discrepancy, Extrapolation, SizePoint, SpeedCheck, SweetSpot


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
