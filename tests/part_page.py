"""A report of one part alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from reports.page.document import Bullets, Document, Part, Section
from reports.writing.report import render, write_report


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


def written_from_python(findings: object, folder: Path) -> str:
    """Write the report of `findings` as from Python, and read the PDF back as text without breaks."""
    from pypdf import PdfReader

    path = write_report(findings, folder / "mine.pdf", created="2026-01-02")
    assert list(folder.glob("*.json"))
    assert list((folder / "figures").glob("*.svg"))
    return " ".join("".join(page.extract_text() for page in PdfReader(path).pages).split())
