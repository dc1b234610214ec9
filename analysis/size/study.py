"""The size question: which share of the verifier's parameters a drafter should have."""

from __future__ import annotations

import numpy as np

from analysis.common.threads import one_thread
from analysis.size.extrapolated import extrapolate, published_optima
from analysis.size.facts import Facts
from analysis.size.findings import (
    Extrapolation,
    MeasuredFamily,
    SizeCurve,
    SizeFindings,
    SweetSpot,
    common_region,
    discrepancy_words,
    existing_words,
    interval_text,
    parameters_text,
    share_text,
    speedup_text,
)
from analysis.size.measured import study_family
from analysis.size.settings import RECORDED, SizeSettings
from calibration.traces import TraceSet


@one_thread
def study_size(traces: TraceSet, settings: SizeSettings | None = None, facts: Facts | None = None) -> SizeFindings:
    """Answer the size question from the family by size in `traces`, and extrapolate it to a large verifier.

    `facts`: what the extrapolation rests on, by default the public ones. Deterministic for one TraceSet and settings.
    Raises `ReplayError` where the TraceSet has no family of three sizes,
    `CostError` where something cannot be priced.
    """
    chosen = settings or SizeSettings()
    measured, law = study_family(traces, chosen, np.random.default_rng([chosen.seed, 1]))
    large = extrapolate(law, chosen, np.random.default_rng([chosen.seed, 2]), facts)
    return SizeFindings(
        measured=measured,
        extrapolated=large,
        published=published_optima(),
        answer=_answer(measured, large),
        limits=_limits(measured, large),
        draws=chosen.draws,
        seed=chosen.seed,
    )


def main_curve(measured: MeasuredFamily) -> SizeCurve:
    """Give the curve that speaks first: all domains, smallest batch, recorded step times where there are any."""
    whole = [c for c in measured.curves if c.domain is None]
    own = [c for c in whole if c.latency == RECORDED]
    return min(own or whole, key=lambda c: c.batch)


def _answer(measured: MeasuredFamily, large: Extrapolation) -> str:
    own, scale, priced = main_curve(measured), large.scale[0], large.priced[0]
    whole = large.verifier_parameters
    low, high = (parameters_text(size) for size in common_region(priced.points, priced.spot))
    return (
        f"For {own.verifier} on {own.device} at batch {own.batch} the best drafter has "
        f"{interval_text(own.spot.best)} of the verifier's parameters, and anything from "
        f"{share_text(own.spot.low.value)} to {share_text(own.spot.high.value)} is within {own.spot.within:.0%} of "
        f"it{_paying(own.spot)}. For {large.verifier} on {scale.device}, extrapolated, the best size lies between "
        f"{parameters_text((scale.spot.best.low or 0.0) * whole)} and "
        f"{parameters_text((scale.spot.best.high or 0.0) * whole)}, with a speed-up of "
        f"{speedup_text(scale.spot.speedup)}; by the prices alone anything from {low} to {high} is within "
        f"{scale.spot.within:.0%} of the best.{existing_words(large)} {discrepancy_words(large.discrepancy)}"
    )


def _paying(spot: SweetSpot) -> str:
    """Whether the best size pays, in brackets; nothing where it does."""
    if spot.pays:
        return ""
    said = "no size pays there" if spot.costs else "that it pays there is not shown"
    return f" ({said}: {speedup_text(spot.together)} times the plain speed)"


def _limits(measured: MeasuredFamily, large: Extrapolation) -> tuple[str, ...]:
    anchors = sum(p.role == "anchor" for p in large.pairs)
    quoted = sum(p.read == "quoted" for p in large.pairs)
    out = "; ".join(f"{each.drafter}: {each.reason}" for each in large.excluded)
    left_out = f" Left out: {out}." if out else ""
    return (
        f"The measured family is one verifier ({measured.verifier}), {measured.requests} requests and one training "
        "recipe; its sizes also differ in depth and in where their layers come from. Intervals hold for other "
        "requests of the same kind, not for other recipes. What is said of the best size and whether it pays holds "
        "for all sizes, draft lengths, batch sizes and devices at once; a point of a curve has an interval of its "
        "own, at a draft length chosen on the same requests.",
        "Step prices are taken as known: the intervals of the measured family leave out the error of the fitted "
        "times, and those on a catalogued device the error of the roofline, which was tested on wider models.",
        f"No public pair has a 70B verifier at several drafter sizes. Its curve is a band of scenarios: {anchors} "
        f"pairs with drafters of 7B to 8B pin it, and families of {len(large.families)} verifiers "
        f"({', '.join(large.families)}) bend it, under forms and ways to carry over that these facts cannot tell "
        f"apart. {quoted} of {len(large.pairs)} facts are quoted from papers about other families and were not "
        f"checked again: a verifier with quoted ones counts {large.quoted_weight:g} where one at hand counts 1. "
        "The smallest size considered is the least share of parameters that any family was measured at; where an "
        "interval ends there, the facts do not bound it.",
        "Acceptance there is one rate for every depth and text, so tokens per round are those of the constant-rate "
        "formula; drafters of one size are taken to be equally good whatever their depth. Made-up drafters are taken "
        "to have the verifier's vocabulary and to be trained as its family; of published shapes only those with its "
        f"vocabulary compete.{left_out}",
        "The error of engines is taken to be normal in the logarithm, about nothing, and to be shared by sizes that "
        "are close; the checks are too few to tell any of that. Draft lengths are chosen by the prices.",
        "Drafting is priced from captured graphs without host time (error of the price ratio "
        f"{large.cost_error:.0%}, one standard deviation).{_overhead(large)}",
    )


def _overhead(large: Extrapolation) -> str:
    """What published measurements tell about engines whose draft steps take longer than their prices."""
    said = ""
    for check in large.checks:
        implied = check.implied_draft_s
        if implied is not None and implied > 2 * check.predicted_draft_s:
            never = ", longer than a plain step, so that no drafter of any size would pay there"
            said += (
                f" One published measurement ({check.source}) implies a draft step "
                f"{implied / check.predicted_draft_s:.0f} times as "
                f"long{never if implied > check.plain_step_s else ''}."
            )
    return said
