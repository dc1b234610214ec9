"""The part on drafter size: the curve, where it is flat, what it depends on, and published optima."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.common.bootstrap import Estimate
from analysis.size import SizeFindings, main_curve
from analysis.size.findings import (
    DepthPoint,
    Extrapolation,
    LatencyLine,
    MeasuredFamily,
    Optimum,
    SpeedCheck,
)
from analysis.size.words import (
    common_region,
    discrepancy_words,
    parameters_interval,
    parameters_text,
    share_text,
    speedup_text,
)
from reports.page.document import Block, Figure, Paragraph
from reports.page.part import Part
from reports.page.style import styled
from reports.page.text import estimate, listing
from reports.questions import size_figures as figures
from reports.questions import size_tables as tables


def size_part(findings: SizeFindings) -> Part:
    """Answer: which share of the verifier's parameters a drafter should have."""
    measured, large = findings.measured, findings.extrapolated
    with styled():
        drawings = (
            figures.size_curves(measured),
            figures.step_costs(measured),
            figures.large_curves(large),
            figures.optima(large, findings.published),
        )
    curves, steps, bands, optima = (Figure.of(d) for d in drawings)
    blocks: tuple[Block, ...] = (
        Paragraph(main_curve(measured).statement, "Measured"),
        curves,
        tables.measured_table(measured),
        tables.domain_table(measured),
        Paragraph(_latency_words(measured), "What a draft step costs"),
        steps,
        Paragraph(f"Acceptance against size: {measured.law}.", "Law"),
        Paragraph(_extrapolated_words(large), "Extrapolated"),
        bands,
        tables.large_table(large),
        tables.sensitivity_table(large),
        Paragraph(_anchor_words(large), "By pair"),
        Paragraph(_views_words(large, findings.published), "What the optimum hangs on"),
        optima,
        tables.views_table(large),
        tables.published_table(findings.published),
        Paragraph(_depth_words(large), "Wide and shallow"),
        tables.depth_table(large),
        *([tables.checks_table(large)] if large.checks else []),
        tables.facts_table(large),
        Paragraph(_band_words(large), "What the bands are worth"),
    )
    return Part(
        "size",
        "How large the drafter should be",
        Paragraph(findings.answer, "Which size"),
        blocks,
        drawings,
        _guidelines(findings),
        tuple(Paragraph(text) for text in findings.limits),
    )


def _extrapolated_words(large: Extrapolation) -> str:
    priced = large.priced[0]
    low, high = (parameters_text(size) for size in common_region(priced.points, priced.spot))
    return (
        f"{large.scale[0].statement} By the prices alone its speed-up would be {speedup_text(priced.spot.speedup)}, "
        f"and in most scenarios anything from {low} to {high} within {priced.spot.within:.0%} of the best. "
        f"{discrepancy_words(large.discrepancy)}"
    )


def _latency_words(family: MeasuredFamily) -> str:
    first = min(family.latency, key=lambda line: line.batch, default=None)
    if first is None:
        return "Too few depths were recorded to tell the cost of a layer from that of a step."
    lines: list[LatencyLine] = [line for line in family.latency if line.batch == first.batch]
    said = [
        f"on {line.device} at batch {line.batch} {_ms(line.base_s)} and {_ms(line.layer_s)} a layer (R\u00b2 "
        f"{line.r_squared:.3f}), so that a drafter without layers would still cost {line.at_no_depth:.0%} of a plain "
        f"verifier step, and the smallest costs {line.proportional_error:.0f} times its share of parameters"
        for line in lines
    ]
    whole = [p.share_in_all for p in family.curves[0].points]
    in_all = (
        f" Counted with embedding and head the sizes are {share_text(whole[0])} to {share_text(whole[-1])} of the "
        "verifier."
        if whole[0] is not None
        else ""
    )
    return f"The step of a drafter is a fixed part and a part for each layer: {'; '.join(said)}.{in_all}"


def _ms(value: Estimate) -> str:
    low, high = value.low or 0.0, value.high or 0.0
    return f"{1e3 * (value.value or 0.0):.2g} ms ({1e3 * low:.2g} to {1e3 * high:.2g})"


def _anchor_words(found: Extrapolation) -> str:
    said = [f"{name}: {parameters_interval(best)}" for name, best in found.by_anchor.items()]
    rates = [f"{name} at least {rate:.2f}" for name, rate in found.least_rates.items()]
    return (
        f"Best size at batch 1, by the prices alone, by the pair whose acceptance pins the curve: {'; '.join(said)}. "
        "Published lengths "
        f"whose draft length is not known bound acceptance from below and were not fitted: {'; '.join(rates)} "
        "(GSM8K)."
    )


def _views_words(found: Extrapolation, published: Sequence[Optimum]) -> str:
    first, *rest = found.assumptions
    said = "; ".join(
        f"{view.name}, {parameters_interval(view.best)}, larger in {view.larger:.0%} of the scenarios"
        for view in rest
    )
    shares = [found.verifier_parameters / (size or 1.0) for size in (first.best.high, first.best.low)]
    inside = [f"1/{o.divisor:.0f} ({o.source})" for o in published if shares[0] <= o.divisor <= shares[1]]
    held = listing(inside) if inside else "no published optimum"
    points = found.priced[0].points
    usual = min(points, key=lambda p: abs(p.parameters - (rest[-1].best.value or 0.0)))
    floor = (
        " The step of the smallest drafter considered already takes "
        f"{points[0].draft_step_s / usual.draft_step_s:.0%} of that of one of {parameters_text(usual.parameters)}."
    )
    return (
        f"By the prices alone, under the view that {first.statement}, the best size is "
        f"{parameters_interval(first.best)} parameters, one "
        f"in {first.divisor.value or 0:.0f}; the interval holds {held}. With latency from depth and launches the "
        f"same acceptance has another best size: {said}.{floor}"
    )


def _band_words(found: Extrapolation) -> str:
    checks = found.band_checks
    inside = sum(check.inside for check in checks)
    outside = [
        f"{c.family}: {c.measured:.2f} measured, {estimate(c.predicted)} predicted" for c in checks if not c.inside
    ]
    missed = f" Outside: {'; '.join(outside)}." if outside else ""
    return (
        "Each family left out in turn, its largest drafter as the anchor and the families of all other verifiers as "
        f"the law: the acceptance of its smallest drafter lies within the band in {inside} of {len(checks)} cases."
        f"{missed}"
    )


def _factor(check: SpeedCheck) -> float:
    """By how much a check is missed, up or down."""
    return math.exp(abs(check.log_error))


def _shallow_and_usual(found: Extrapolation) -> tuple[DepthPoint, DepthPoint]:
    """The shallowest drafter at batch 1, and the one nearest to the usual depth."""
    points = found.depth[0].points
    return points[0], min(points, key=lambda p: abs(p.layers - found.depth_layers))


def _depth_words(found: Extrapolation) -> str:
    study = found.depth[0]
    shallow, deep = _shallow_and_usual(found)
    needed = (
        "no acceptance would do"
        if deep.rate_needed is None
        else f"it would have to accept {deep.rate_needed:.2f} more of what it drafts"
    )
    return (
        f"At {parameters_text(study.parameters)} parameters, batch {study.batch}, {shallow.layers} layers run "
        f"{speedup_text(shallow.speedup)} times as fast as no speculation and {deep.layers} layers "
        f"{speedup_text(deep.speedup)} times by the prices alone, if both are as good. "
        f"For the deep one to be as fast {needed}."
    )


def _guidelines(findings: SizeFindings) -> tuple[Paragraph, ...]:
    large = findings.extrapolated
    curve = large.priced[0]
    low, high = common_region(curve.points, curve.spot)
    shallow, deep = _shallow_and_usual(large)
    own = main_curve(findings.measured)
    first = (
        f"Any drafter from {share_text(own.spot.low.value)} to {share_text(own.spot.high.value)} of the verifier "
        "does equally well here; take the one that is at hand or needs least memory."
        if own.spot.pays
        else f"On {own.device} no drafter of this family pays at batch {own.batch}: no size changes that."
        if own.spot.costs
        else f"On {own.device} no drafter of this family is shown to pay at batch {own.batch}."
    )
    miss = large.discrepancy.largest
    warned = "" if miss is None else f" The prices behind this were missed by a factor of {_factor(miss):.2g} once."
    return (
        Paragraph(first, "Size at hand"),
        Paragraph(
            f"For a verifier of {parameters_text(large.verifier_parameters)} look between {parameters_text(low)} and "
            f"{parameters_text(high)}, and weigh layers before parameters: at "
            f"{parameters_text(large.depth[0].parameters)}, {shallow.layers} layers instead of {deep.layers} are "
            f"worth as much as {deep.rate_needed or 1:.2f} of acceptance (extrapolated, by the prices "
            f"alone).{warned}",
            "Size for a large verifier",
        ),
        Paragraph(
            "Measure the seconds of one draft step in the engine before choosing a size: where they exceed the "
            "share of drafts accepted, in plain steps, no draft length pays (Leviathan et al. 2023), however good "
            "the drafter.",
            "Overhead first",
        ),
    )
