"""The document as data: sections of paragraphs, bullets, tables and figures, handed to the template as JSON; what one
question contributes to it; and, in words, what a report stands on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from calibration.common.errors import ReportError
from calibration.traces.grades import GRADE_LIMITS, PER_ROUND, RECORDED, SYNTHESISED, Grade
from reports.page.drawing import Drawing
from reports.page.text import breakable, plain
from simulator.pricing.grades import STEP_GRADES, STEP_LIMITS
from simulator.results.evidence import Evidence


@dataclass(frozen=True)
class Paragraph:
    """Running text, after a bold lead where there is one."""

    text: str
    lead: str = ""
    kind: str = field(default="paragraph", init=False)


@dataclass(frozen=True)
class Bullets:
    """A list of (lead, text); the lead is bold and may be empty."""

    items: tuple[Paragraph, ...]
    kind: str = field(default="bullets", init=False)


@dataclass(frozen=True)
class Table:
    """A table. ``align`` holds one of l, c, r per column; ``widths`` ``auto`` or a share of what is left."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    widths: tuple[str, ...]
    size: float = 8.8
    kind: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        """Refuse an empty or ragged table: the reader would see a hole."""
        lengths = {len(self.header), len(self.align), len(self.widths), *(len(row) for row in self.rows)}
        if not self.rows or len(lengths) != 1:
            raise ReportError(f"table '{self.caption}': needs rows of equal length, got lengths {sorted(lengths)}")


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption and alt text."""

    svg: str
    caption: str
    alt: str
    kind: str = field(default="figure", init=False)

    @classmethod
    def of(cls, drawing: Drawing) -> Figure:
        """Show `drawing`."""
        return cls(drawing.svg, drawing.caption, drawing.alt)


Block = Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class Section:
    """A numbered section."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report. `created` is (year, month, day), from the traces and not from the clock.

    ``evidence``: the grades of what the verdict stands on, right below it; ``answers`` stand as bullets below that,
    each after its question in bold; `compact` starts the sections
    right behind the front instead of on a page of their own.
    """

    title: str
    kicker: str
    subtitle: str
    running: str
    footer: str
    date: str
    created: tuple[int, int, int]
    question: str
    verdict: str
    answer: tuple[str, ...]
    front: tuple[Block, ...]
    sections: tuple[Section, ...]
    answers: tuple[Paragraph, ...] = ()
    compact: bool = False
    evidence: str = ""

    def as_json(self) -> dict[str, Any]:
        """Give what the template reads."""
        return asdict(self)


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    align: str,
    widths: Sequence[str] = (),
    **kw: Any,
) -> Table:
    """Build a table; the columns are as wide as their content unless `widths` says otherwise."""
    return Table(
        caption, tuple(header), tuple(tuple(r) for r in rows), align, tuple(widths) or ("auto",) * len(header), **kw
    )


def timestamp(created: str, where: str) -> datetime:
    """Read when something was made, in UTC; `ReportError` where that is no date."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        raise ReportError(f"{where}: created must be an ISO 8601 time, got {created!r}") from None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Part:
    """One question answered.

    ``answer`` goes to the front page (its lead is the question in two or three words), ``blocks`` under ``title``;
    ``guidelines`` are advice in plain words, ``limits`` what the numbers do not cover. ``drawings`` are the figures
    that ``blocks`` show, for the files beside the report. ``evidence``: what its numbers stand on, where they are
    simulated.
    """

    key: str
    title: str
    answer: Paragraph
    blocks: tuple[Block, ...]
    drawings: tuple[Drawing, ...]
    guidelines: tuple[Paragraph, ...] = ()
    limits: tuple[Paragraph, ...] = ()
    evidence: Evidence | None = None


CLOSING = "No result is better than the lowest grade that it stands on."


def evidence_line(given: Sequence[tuple[str, Evidence]]) -> str:
    """Give the sentence of page one: the grades of each of `given` (name, evidence), equal ones together."""
    groups: dict[str, list[str]] = {}
    for name, evidence in given:
        groups.setdefault(_told(evidence), []).append(name)
    if not groups:
        return ""
    if len(groups) == 1:
        return f"{next(iter(groups))}. {CLOSING}"
    return " ".join(f"{plain(', '.join(names))}: {told}." for told, names in groups.items()) + f" {CLOSING}"


_MEANING: dict[Grade, str] = {
    RECORDED: "",
    PER_ROUND: " (at the draft lengths of the import; at others an estimate)",
    SYNTHESISED: " (right in mean only, at the draft length counted; intervals do not know how requests differ)",
}


def _told(evidence: Evidence) -> str:
    priced = "" if evidence.costs_of is None else f", priced as {breakable(evidence.costs_of)}"
    return (
        f"acceptance {evidence.acceptance}{_MEANING[evidence.acceptance]}; step times {evidence.steps}{priced}; "
        f"verifier {breakable(evidence.served)}"
    )


def grade_limits(evidence: Evidence | None) -> tuple[Paragraph, ...]:
    """Say what the grades of `evidence` do not allow; nothing where it is not known."""
    if evidence is None:
        return ()
    told = [Paragraph(f"Acceptance is {GRADE_LIMITS[evidence.acceptance]}.", lead="Acceptance.")]
    steps = next((grade for grade in STEP_GRADES if grade == evidence.step_times), None)
    if steps is not None:
        told.append(Paragraph(f"Step times are {STEP_LIMITS[steps]}.", lead="Step times."))
    return tuple(told)
