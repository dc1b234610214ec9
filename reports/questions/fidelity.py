"""Predicted against measured, as a part of a report."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.fidelity.table import Condition, Fidelity, errors_of, missed
from reports.page.counted import far_off
from reports.page.document import Paragraph
from reports.page.part import Part
from reports.page.text import breakable, plain
from reports.questions.fidelity_figures import draw_fidelity
from reports.questions.fidelity_tables import error_blocks


def fidelity_part(fidelity: Fidelity) -> Part:
    """Give the part: errors over held-out conditions by engine, and predicted against measured."""
    drawings = draw_fidelity(fidelity)
    late = {source for source, *_ in missed(fidelity)}
    first = [f"{breakable(line, 40)}." for line in far_off(fidelity)[:1]]
    explained = [
        Paragraph(" ".join(plain(text) for text in source.explained), lead=f"{plain(source.title)}.")
        for source in fidelity.sources
        if source.name in late and source.explained
    ]
    return Part(
        "fidelity",
        "Predicted against measured",
        Paragraph(" ".join((*first, fidelity_answer(fidelity))), lead="Trust."),
        error_blocks(fidelity, drawings),
        tuple(drawings.values()),
        limits=tuple(explained),
    )


def fidelity_answer(fidelity: Fidelity) -> str:
    """Say how close throughput came over held-out conditions: under speculation where any was, and without."""
    held = fidelity.held_out()
    under, plain_ones = ([one for one in held if one.speculates is wanted] for wanted in (True, False))
    told = [_throughput(under, "under speculation"), _throughput(plain_ones, "without speculation")]
    if not any(told):
        return "No throughput was measured on held-out conditions."
    if not any(one.speculates for one in fidelity.conditions):
        told.append("No condition ran under speculation: nothing is said of it.")
    return " ".join(sentence for sentence in told if sentence)


def _throughput(conditions: Sequence[Condition], how: str) -> str:
    overall = errors_of("output_throughput", conditions)
    if overall is None:
        return ""
    spread = "" if overall.spread is None else f"; the engines' own repeats spread by {100 * overall.spread:.1f}%"
    return (
        f"Throughput {how} is predicted within {100 * overall.median:.1f}% (median over "
        f"{overall.conditions} held-out conditions; worst {100 * overall.worst:.1f}%{spread})."
    )
