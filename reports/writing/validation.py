"""The document of a validation: predicted against measured as PDF, figures, JSON and a Markdown table."""

from __future__ import annotations

import os
from pathlib import Path

from analysis.fidelity.table import Fidelity, errors_of
from reports.page.document import Document, Figure, timestamp
from reports.page.text import acceptance_sentence, breakable, far_off, listing, plain
from reports.questions.fidelity import fidelity_answer, fidelity_sections
from reports.questions.fidelity_figures import draw_fidelity
from reports.writing.report import Place, render, write_files

_MOST_LINES = 4
"""Conditions whose counts are far off that page one names; the first section has them all."""


def write_validation(fidelity: Fidelity, out_pdf: str | os.PathLike[str]) -> Path:
    """Write the document of `fidelity` to `out_pdf` and its figures as SVG beside it; give its path.

    Dated by the youngest measurement: the same measurements give the same bytes. Raises `ReportError` for a figure or
    document that cannot be made.
    """
    target = Path(out_pdf)
    drawings = draw_fidelity(fidelity)
    moment = timestamp(fidelity.created, "fidelity")
    head = _verdict(fidelity)
    under = " under speculation" if any(one.speculates for one in fidelity.conditions) else ""
    document = Document(
        title="How far can the predictions be trusted?",
        kicker="paceline validation",
        subtitle=f"{len(fidelity.conditions)} conditions, {len(fidelity.held_out())} of them held out.",
        running="Predicted against measured",
        footer="[measured] on an engine   [simulated] predicted by the scenario beside it",
        date=f"{moment:%Y-%m-%d}",
        created=(moment.year, moment.month, moment.day),
        question=f"How close do simulated acceptance, throughput and latency come to what real engines do{under}?",
        verdict=head[0],
        answer=head[1:],
        front=(Figure.of(drawings["fidelity-errors"]),) if "fidelity-errors" in drawings else (),
        sections=fidelity_sections(fidelity, drawings),
    )
    place = Place(target, target.parent / "figures", target.parent)
    write_files(place, render(document, moment), list(drawings.values()), {})
    return target


def _verdict(fidelity: Fidelity) -> tuple[str, ...]:
    """Give the headline, where counts are far off first of all, then acceptance, then a sentence for each source."""
    told = []
    for source in fidelity.sources:
        held = fidelity.held_out(source.name)
        found = [
            f"{label} {100 * errors.median:.1f}% (worst {100 * errors.worst:.1f}%)"
            for name, label in (
                ("output_throughput", "throughput"),
                ("speedup", "speed-up"),
                ("p99_tpot_ms", "p99 TPOT"),
            )
            if (errors := errors_of(name, held)) is not None
        ]
        if found:
            told.append(f"{plain(source.title)}, {len(held)} held-out conditions, median errors: {listing(found)}.")
    late = far_off(fidelity)
    first = f"{breakable(late[0], 40)}. " if late else ""
    more = [f"{breakable(line, 40)}." for line in late[1:_MOST_LINES]]
    return (first + fidelity_answer(fidelity), *more, plain(acceptance_sentence(fidelity)), *told)
