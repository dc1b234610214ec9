"""The tables of the part on drafter size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.size.findings import Extrapolation, MeasuredFamily, Optimum, PairFact, SizeCurve
from analysis.size.words import (
    common_region,
    interval_text,
    most_often,
    parameters_interval,
    parameters_text,
    scaled,
    share_text,
)
from reports.page.document import Table, table
from reports.page.text import breakable, estimate, short


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
