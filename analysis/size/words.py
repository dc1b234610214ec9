"""The sweet spot in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.bootstrap import Estimate
from analysis.size.findings import SizePoint, SweetSpot


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
        f"verifier's parameters; within {spot.within:.0%} of it is anything from {share_text(spot.low.value)} to "
        f"{share_text(spot.high.value)}; {end}. Its speed-up is {speedup_text(spot.speedup)}, at draft length "
        f"{share.draft_tokens}: {paying} ({label})."
    )
