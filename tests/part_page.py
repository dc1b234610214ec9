"""A report of one part alone."""

from __future__ import annotations

from datetime import UTC, datetime

from reports.document import Bullets, Document, Section
from reports.parts.part import Part
from reports.report import render


def set_part(part: Part) -> bytes:
    """Set `part` as a document of its own; any warning of the compiler is an error."""
    more = (("Advice", part.guidelines), ("Limits", part.limits))
    document = Document(
        title=part.title,
        kicker="part",
        subtitle="",
        running="",
        footer="",
        date="",
        created=(2026, 1, 1),
        question="?",
        verdict="",
        answer=(part.answer.text,),
        front=(part.answer,),
        sections=(
            Section(part.title, part.blocks),
            *(Section(title, (Bullets(items),)) for title, items in more if items),
        ),
    )
    return render(document, datetime(2026, 1, 1, tzinfo=UTC))
