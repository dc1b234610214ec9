"""Write a report: figures as SVG with their data as CSV, findings as JSON, and the PDF that holds everything."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.common.records import to_json
from analysis.speedup.findings import Findings
from calibration.common.errors import ReportError
from calibration.common.files import write_whole
from reports.page.document import Document, timestamp
from reports.questions.figures import Drawing, draw_all
from reports.questions.speedup import compose

if TYPE_CHECKING:
    from reports.writing.collect import Answers


@dataclass(frozen=True)
class Place:
    """Where a report goes: the PDF, its figures with their data, and the findings behind it."""

    pdf: Path
    figures: Path
    records: Path

    @classmethod
    def of(cls, out: str | os.PathLike[str]) -> Place:
        """Give the place that `out` names: a PDF with ``<stem>-figures/`` beside it, or a folder for everything."""
        path = Path(out)
        if path.suffix.lower() == ".pdf":
            beside = path.with_name(f"{path.stem}-figures")
            return cls(path, beside, beside)
        return cls(path / "report.pdf", path / "figures", path)


def write_report(
    findings: object,
    out_pdf: str | os.PathLike[str],
    *,
    created: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of `findings` to `out_pdf`; give its path.

    `findings` are those of any question, a `RunResult`, or a list of several: the study of a TraceSet first, if there
    is one, then a part for each in their order. `created` (ISO 8601): when what they rest on was made; default: the
    youngest date among them, or now where none is dated.

    Beside the PDF go the findings as JSON and ``figures/<name>.svg`` with the data of each as ``figures/<name>.csv``.
    Each file appears whole or not at all. The PDF is tagged (PDF/UA-1) and archival (PDF/A-2a); the same findings of
    the same date give the same bytes. `progress` is called with (steps done, steps in all). Raises `ReportError` for
    what is no findings, and for a figure or document that cannot be made.
    """
    target = Path(out_pdf)
    report = progress or (lambda done, total: None)
    given = list(findings) if isinstance(findings, list | tuple) else [findings]
    if len(given) == 1 and isinstance(given[0], Findings):
        return _write_study(given[0], target, report)
    from reports.writing.collect import answers_of

    answers = answers_of(given, created, lambda done, total: report(done, total + 1))
    place = Place(target, target.parent / "figures", target.parent)
    _write_answers(answers, ["findings given from Python"], answers.created, place, "study")
    report(len(given) + 1, len(given) + 1)
    return target


def _write_study(findings: Findings, target: Path, report: Callable[[int, int], None]) -> Path:
    """Write the report of one study of a TraceSet alone."""
    steps = 2

    def drawn(done: int, total: int) -> None:
        nonlocal steps
        steps = total + 2
        report(done, steps)

    drawings = draw_all(findings, drawn)
    pdf = render(compose(findings, drawings), timestamp(findings.provenance.created, "manifest"))
    report(steps - 1, steps)
    place = Place(target, target.parent / "figures", target.parent)
    write_files(place, pdf, list(drawings.values()), {"findings": findings.to_json()})
    report(steps, steps)
    return target


def write_answers(
    answers: Answers, names: Sequence[str], created: str, out: str | os.PathLike[str], template: str = "study"
) -> Path:
    """Write what was found to `out` (see `Place`) by `template`; give the path of the PDF.

    `names` are the inputs as they were given, `created` when the youngest of them was made. Every drawing of every
    part is written as SVG and its data as CSV, whatever the template shows of them, and the findings of every
    question as JSON.
    """
    return _write_answers(answers, names, created, Place.of(out), template)


def _write_answers(answers: Answers, names: Sequence[str], created: str, place: Place, template: str) -> Path:
    from reports.writing.templates import documents

    drawings = draw_all(answers.study) if answers.study is not None else {}
    moment = timestamp(created, "report")
    for document, most in documents(template, answers, drawings, names, created):
        pdf = render(document, moment)
        if most is None or pages(pdf) <= most:
            break
    every = [*drawings.values(), *(one for found in answers.answered for one in found.part.drawings)]
    records = {} if answers.study is None else {"findings": answers.study.to_json()}
    records |= {one.key: to_json(one.findings) for one in answers.answered if one.findings is not None}
    write_files(place, pdf, every, records)
    return place.pdf


def pages(pdf: bytes) -> int:
    """Count the pages of a PDF that typst made: it writes page objects as they are, uncompressed."""
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def write_files(place: Place, pdf: bytes, drawings: Sequence[Drawing], records: Mapping[str, str]) -> None:
    """Write the PDF, every drawing as SVG with its data as CSV, and `records` (JSON by name).

    Raises `ReportError` for a drawing without data, two of one name, and where nothing can be written.
    """
    tables = {}
    for drawing in drawings:
        if drawing.name in tables:
            raise ReportError(f"figure {drawing.name}: two drawings have this name")
        tables[drawing.name] = data_csv(drawing)
    try:
        for drawing in drawings:
            write_whole(place.figures / f"{drawing.name}.svg", drawing.svg.encode())
            write_whole(place.figures / f"{drawing.name}.csv", tables[drawing.name].encode())
        for name, text in records.items():
            write_whole(place.records / f"{name}.json", text.encode())
        write_whole(place.pdf, pdf)
    except OSError as fault:
        raise ReportError(f"{place.pdf}: cannot be written ({fault.strerror or fault})") from None


def data_csv(drawing: Drawing) -> str:
    """Give the data of a drawing as CSV: numbers to six digits, empty where there is none.

    Raises `ReportError` for a drawing without data, or whose records differ in their keys.
    """
    if not drawing.data:
        raise ReportError(f"figure {drawing.name}: needs data, it holds none")
    keys = tuple(drawing.data[0])
    if any(tuple(row) != keys for row in drawing.data):
        raise ReportError(f"figure {drawing.name}: its records must all have the same keys, in the same order")
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(keys)
    rows.writerows([_cell(row[key]) for key in keys] for row in drawing.data)
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


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
