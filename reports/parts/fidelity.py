"""Predicted against measured, as a part of a report."""

from __future__ import annotations

from analysis.fidelity.table import Fidelity, errors_of, missed
from reports.document import Paragraph
from reports.figures.fidelity import draw_fidelity
from reports.parts.part import Part
from reports.sections.fidelity import error_blocks
from reports.text import plain


def fidelity_part(fidelity: Fidelity) -> Part:
    """Give the part: errors over held-out conditions by engine, and predicted against measured."""
    drawings = draw_fidelity(fidelity)
    late = {source for source, *_ in missed(fidelity)}
    explained = [
        Paragraph(" ".join(plain(text) for text in source.explained), lead=f"{plain(source.title)}.")
        for source in fidelity.sources
        if source.name in late and source.explained
    ]
    return Part(
        "fidelity",
        "Predicted against measured",
        Paragraph(fidelity_answer(fidelity), lead="Trust."),
        error_blocks(fidelity, drawings),
        tuple(drawings.values()),
        limits=tuple(explained),
    )


def fidelity_answer(fidelity: Fidelity) -> str:
    """Say how close throughput under speculation came, over held-out conditions."""
    overall = errors_of("output_throughput", fidelity.held_out())
    if overall is None:
        return "No throughput was measured on held-out conditions."
    spread = "" if overall.spread is None else f"; the engines' own repeats spread by {100 * overall.spread:.1f}%"
    return (
        f"Throughput under speculation is predicted within {100 * overall.median:.1f}% (median over "
        f"{overall.conditions} held-out conditions; worst {100 * overall.worst:.1f}%{spread})."
    )
