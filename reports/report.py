"""Write the report: figures as SVG, findings as JSON, and the PDF that holds everything."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from analysis.findings import Findings
from calibration.errors import ReportError
from reports.document import Document
from reports.figures import draw_all
from reports.sections import compose


def write_report(
    findings: Findings,
    out_pdf: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of `findings` to `out_pdf`; give its path.

    Beside it go ``findings.json`` and ``figures/<name>.svg``. Each file appears whole or not at all. The PDF is
    tagged (PDF/UA-1) and archival (PDF/A-2a), and dated by the traces: the same findings give the same bytes.
    `progress` is called with (steps done, steps in all). Raises `ReportError` for a figure or document that cannot
    be made.
    """
    target = Path(out_pdf)
    report = progress or (lambda done, total: None)
    steps = 2

    def drawn(done: int, total: int) -> None:
        nonlocal steps
        steps = total + 2
        report(done, steps)

    drawings = draw_all(findings, drawn)
    pdf = render(compose(findings, drawings), _timestamp(findings))
    report(steps - 1, steps)
    try:
        for drawing in drawings.values():
            write_atomic(target.parent / "figures" / f"{drawing.name}.svg", drawing.svg.encode())
        write_atomic(target.parent / "findings.json", findings.to_json().encode())
        write_atomic(target, pdf)
    except OSError as fault:
        raise ReportError(f"{target}: cannot be written ({fault.strerror or fault})") from None
    report(steps, steps)
    return target


def render(document: Document, timestamp: datetime) -> bytes:
    """Set `document` with typst and give the PDF. Warnings of typst are errors: they tell of a broken page."""
    import typst

    template = resources.files("reports").joinpath("template.typ").read_bytes()
    try:
        pdf, warnings = typst.compile_with_warnings(
            template,
            format="pdf",
            sys_inputs={"data": json.dumps(document.as_json())},
            ignore_system_fonts=True,  # the embedded fonts alone, so that every machine sets the same page
            pdf_standards=["a-2a", "ua-1"],
            timestamp=timestamp,
        )
    except typst.TypstError as fault:
        raise ReportError(f"report: typst refused the document: {fault.diagnostic or fault.message}") from None
    if warnings:
        raise ReportError("report: typst warned: " + "; ".join(str(warning) for warning in warnings))
    return bytes(pdf)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which appears whole or not at all; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(scratch).unlink()
        raise


def _timestamp(findings: Findings) -> datetime:
    """When the traces were made, in UTC."""
    created = findings.provenance.created
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        raise ReportError(f"manifest: created must be an ISO 8601 time, got {created!r}") from None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
