"""The part on drafter size: the curve, where it is flat, what it depends on, and published optima.

The tables of the part on drafter size.
"""

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
    PairFact,
    SizeCurve,
    SpeedCheck,
    common_region,
    discrepancy_words,
    interval_text,
    most_often,
    parameters_interval,
    parameters_text,
    scaled,
    share_text,
    speedup_text,
)
from reports.page.document import Block, Figure, Paragraph, Part, Table, table
from reports.page.drawing import styled
from reports.page.text import breakable, estimate, listing, short
from reports.questions import size_figures as figures


def _whole(family: MeasuredFamily) -> list[SizeCurve]:
    return [c for c in family.curves if c.domain is None]


def measured_table(family: MeasuredFamily) -> Table:
    """Best sizes of the measured family over all domains."""
    rows = [(short(c.device), str(c.batch), *_spot_cells(c), c.label) for c in _whole(family)]
    spot = family.curves[0].spot
    return table(
        f"Best size of a drafter for {short(family.verifier)} as a share of its parameters, in brackets what may be "
        "best; speed-up with bounds; both hold for all sizes, draft lengths and rows at once (95%); "
        f"flat: within {spot.within:.0%} of the best; gains end: from there on doubling gains less than "
        f"{spot.gain:.0%}. [simulated or extrapolated, as said; n = {family.requests} requests]",
        ("Device", "Batch", "Best", "Flat", "Gains end", "Speed-up", "Pays", "Label"),
        rows,
        "lrlllrll",
        size=8.2,
    )


def domain_table(family: MeasuredFamily) -> Table:
    """Best sizes of the measured family by domain, at the smallest batch size."""
    first = min(c.batch for c in family.curves)
    curves = [c for c in family.curves if c.batch == first and c.domain is not None]
    rows = [(breakable(c.domain or "", 16), short(c.device), *_spot_cells(c)) for c in curves]
    return table(
        f"The same by domain at batch {first}, held together over all domains, batch sizes and devices. "
        "[simulated or extrapolated as above; "
        f"n = {_each(family)} requests a domain]",
        ("Domain", "Device", "Best", "Flat", "Gains end", "Speed-up", "Pays"),
        rows,
        "lllllrl",
        size=8.2,
    )


def _each(family: MeasuredFamily) -> str:
    counts = sorted({c.spot.best.requests for c in family.curves if c.domain is not None})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _spot_cells(curve: SizeCurve) -> tuple[str, ...]:
    spot = curve.spot
    end = f"{share_text(spot.gain_end.value)}{' or more' if spot.still_gaining > 0.5 else ''}"
    flat = f"{share_text(spot.low.value)} to {share_text(spot.high.value)}"
    pays = "yes" if spot.pays else "no" if spot.costs else "open"
    return interval_text(spot.best), flat, end, estimate(spot.together), pays


def large_table(found: Extrapolation) -> Table:
    """Best sizes for the large verifier."""
    rows = []
    existing = {(c.device, c.batch): most_often(c.spot) for c in found.published}
    for curve, priced in zip(found.scale, found.priced, strict=True):
        best = existing.get((curve.device, curve.batch))
        low, high = common_region(priced.points, priced.spot)
        rows.append(
            (
                curve.device,
                str(curve.batch),
                parameters_interval(scaled(curve.spot.best, found.verifier_parameters)),
                f"{parameters_text(low)} to {parameters_text(high)}",
                estimate(curve.spot.speedup),
                estimate(priced.spot.speedup),
                "none competes" if best is None else f"{best[0]}, {best[1]:.0%}",
            )
        )
    return table(
        f"Best size for {found.verifier}, made-up drafters of {found.depth_layers} layers: median and 95% of "
        "scenarios, the error of engines that published measurements show included; by the prices alone: what is "
        f"within {found.scale[0].spot.within:.0%} of the best in most scenarios, and the speed-up. Last: the "
        f"published shape with its vocabulary that is best most often, and how often. [extrapolated; "
        f"n = {found.behind}, {found.discrepancy.checks} checks]",
        ("Devices", "Batch", "Best", "Flat by price", "Speed-up", "By price", "Published shape"),
        rows,
        "lrllrrl",
        size=8.2,
    )


def sensitivity_table(found: Extrapolation) -> Table:
    """The answer under other assumptions."""
    rows = [
        (
            breakable(each.assumption, 40),
            parameters_interval(each.best),
            estimate(each.speedup),
            "\u2014" if each.favourite is None else f"{each.favourite}, {each.share or 0.0:.0%}",
        )
        for each in found.sensitivity
    ]
    return table(
        f"What the answer for {found.verifier} hangs on: best size, its speed-up and the published shape best most "
        f"often on {found.scale[0].device} at batch {found.scale[0].batch}, one assumption changed at a time. "
        f"[extrapolated; n = {found.behind}, {found.discrepancy.checks} checks]",
        ("Assumption", "Best", "Speed-up", "Published shape"),
        rows,
        "llrl",
        ("1.6", "1.2", "auto", "1"),
        size=8.2,
    )


def views_table(found: Extrapolation) -> Table:
    """Best sizes under every view of latency."""
    rows = [
        (
            view.name,
            parameters_interval(view.best),
            f"1/{view.divisor.value or 0:.0f} (1/{view.divisor.high or 0:.0f} to 1/{view.divisor.low or 0:.0f})",
            estimate(view.shift, 1),
            f"{view.draft_tokens:g}",
            estimate(view.speedup),
        )
        for view in found.assumptions
    ]
    return table(
        f"The best size for {found.verifier} at batch 1 under four views of a draft step's cost, the acceptance "
        "being the same and engines as priced; shift: over the size that is best in proportion to parameters, "
        "scenario by scenario. "
        f"Median and 95% of scenarios. [extrapolated; n = {found.behind}]",
        ("A draft step costs", "Best", "Of the verifier", "Shift", "Draft length", "Speed-up"),
        rows,
        "lllrrr",
        ("1.3", *("auto",) * 5),
        size=8.2,
    )


def published_table(found: Sequence[Optimum]) -> Table:
    """Sizes that others found best."""
    rows = [(o.source, o.verifier, o.drafter, f"1/{o.divisor:.0f}", o.among, o.latency) for o in found]
    return table(
        f"Sizes that others found best. [published, quoted; n = {len(found)}]",
        ("Source", "Verifier", "Best", "Share", "Among", "Cost of a draft step"),
        rows,
        "lllrll",
        ("1.5", "1", "1", "auto", "1.2", "1"),
        size=8.0,
    )


def depth_table(found: Extrapolation) -> Table:
    """Equal parameters in different depths."""
    rows = [
        (
            str(study.batch),
            str(p.layers),
            str(p.hidden),
            f"{1e3 * p.draft_step_s:.2f} ms",
            share_text(p.cost_ratio),
            estimate(p.speedup),
            "none" if p.rate_needed is None else f"+{p.rate_needed:.3f}",
        )
        for study in found.depth
        for p in study.points
    ]
    first = found.depth[0]
    return table(
        f"Drafters of {parameters_text(first.parameters)} parameters in different depths for {first.verifier} on "
        f"{first.device}, engines as priced, all with the same acceptance (median {first.rate:.2f}). Last: "
        f"acceptance that depth must "
        f"add to be as fast as the shallowest. [extrapolated; n = {found.behind}]",
        ("Batch", "Layers", "Width", "Draft step", "Of a plain step", "Speed-up", "Acceptance needed"),
        rows,
        "rrrrrrr",
        size=8.2,
    )


def checks_table(found: Extrapolation) -> Table:
    """Published speed-ups beside extrapolated ones."""
    rows = [
        (
            f"{c.source} ({c.read})",
            c.drafter,
            f"{c.published:.2f}",
            estimate(c.predicted),
            f"{math.exp(c.log_error):.2g}",
            f"{1e3 * c.predicted_draft_s:.1f} ms",
            "\u2014" if c.implied_draft_s is None else f"{1e3 * c.implied_draft_s:.1f} ms",
        )
        for c in found.checks
    ]
    return table(
        "Speed-ups that others measured beside those of the same prices; implied: the draft step that would explain "
        f"the measured one. [published and extrapolated; n = {len(found.checks)}]",
        ("Source", "Shape of the drafter", "Published", "Extrapolated", "Ratio", "Draft step", "Implied"),
        rows,
        "llrrrrr",
        ("2", "1", *("auto",) * 5),
        size=8.0,
    )


def facts_table(found: Extrapolation) -> Table:
    """The public facts, a row a family or anchor."""
    groups: dict[tuple[str, str, str], list[PairFact]] = {}
    for pair in found.pairs:
        groups.setdefault((pair.role, pair.verifier, pair.task), []).append(pair)
    rows = [
        (
            role,
            verifier,
            ", ".join(p.drafter for p in each),
            task,
            ", ".join(share_text(p.share) for p in each),
            ", ".join(f"{p.acceptance:.2f}" for p in each),
            f"{each[0].source} ({each[0].read})",
        )
        for (role, verifier, task), each in groups.items()
    ]
    return table(
        "The public facts behind the extrapolation: acceptance per drafted token, published or from published tokens "
        f"per round at a constant rate. [published; n = {len(found.pairs)} pairs]",
        ("Role", "Verifier", "Drafters", "Task", "Shares", "Acceptance", "Source"),
        rows,
        "lllllll",
        ("auto", "auto", "1.1", "1", "auto", "auto", "1.5"),
        size=7.6,
    )


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
        measured_table(measured),
        domain_table(measured),
        Paragraph(_latency_words(measured), "What a draft step costs"),
        steps,
        Paragraph(f"Acceptance against size: {measured.law}.", "Law"),
        Paragraph(_extrapolated_words(large), "Extrapolated"),
        bands,
        large_table(large),
        sensitivity_table(large),
        Paragraph(_anchor_words(large), "By pair"),
        Paragraph(_views_words(large, findings.published), "What the optimum hangs on"),
        optima,
        views_table(large),
        published_table(findings.published),
        Paragraph(_depth_words(large), "Wide and shallow"),
        depth_table(large),
        *([checks_table(large)] if large.checks else []),
        facts_table(large),
        Paragraph(_band_words(large), "What the bands are worth"),
    )
    return Part(
        key="size",
        title="How large the drafter should be",
        answer=Paragraph(findings.answer, "Which size"),
        blocks=blocks,
        drawings=drawings,
        guidelines=_guidelines(findings),
        limits=tuple(Paragraph(text) for text in findings.limits),
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
