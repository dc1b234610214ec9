"""The three templates of a report: the whole study, the capacity plan, and the brief of two pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from analysis.capacity import CapacityFindings
from calibration.common.errors import ReportError
from reports.page.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Paragraph,
    Part,
    Section,
    evidence_line,
    grade_limits,
    timestamp,
)
from reports.page.text import breakable, count, listing, plain, short
from reports.questions import answer
from reports.questions.answer import study_guidelines
from reports.questions.figures import Drawing
from reports.questions.limits import limits
from reports.questions.speedup import compose, study_sections
from reports.writing.collect import Answers

_LABELS = "[measured] recorded or on an engine   [simulated] served in SimPy   [fitted], [extrapolated], [published]"
BRIEF_PAGES = 2
_BRIEF_SIZES = ((16, 8), (12, 6), (9, 5), (7, 4), (5, 3), (3, 2))
"""Pieces of advice and limits of a brief, tried in turn until it fits."""


def documents(
    template: str, answers: Answers, drawings: Mapping[str, Drawing], names: Sequence[str], created: str
) -> Iterator[tuple[Document, int | None]]:
    """Arrange `answers` by `template`; give documents with the pages that each may have, the fullest first.

    A template without a limit gives one. `drawings` are those of the study, `names` the inputs, `created` a date.
    """
    parts = tuple(one.part for one in answers.answered)
    if answers.study is None and not parts:
        why = "; ".join(f"{one.title}: {one.reason}" for one in answers.unanswered)
        raise ReportError(f"report: nothing can be answered from these inputs ({why})")
    head = _head(answers, names, created)
    if template == "brief":
        for most in _BRIEF_SIZES:
            yield _brief(answers, parts, drawings, head, most), BRIEF_PAGES
    else:
        build = _capacity if template == "capacity" else _study
        yield build(answers, parts, drawings, head), None


def _head(answers: Answers, names: Sequence[str], created: str) -> Document:
    """Give a document without sections: what it is about, and the answers of its parts."""
    moment = timestamp(created, "report")
    parts = [one.part for one in answers.answered]
    base = Document(
        title="What the simulations say",
        kicker="paceline report",
        subtitle=f"From {plain(listing(list(names)))}; recorded or measured until {moment:%Y-%m-%d}.",
        running=short(f"What the simulations say: {listing(list(names))}", 90),
        footer=_LABELS,
        date=f"{moment:%Y-%m-%d}",
        created=(moment.year, moment.month, moment.day),
        question=f"What follows from {plain(listing(list(names)))}?",
        verdict=parts[0].answer.text if parts else "",
        answer=(),
        front=(),
        sections=(),
    )
    graded = [(part.title, part.evidence) for part in parts if part.evidence is not None]
    if answers.study is not None:
        if (own := answers.study.provenance.evidence) is not None:
            graded.insert(0, ("Study", own))
        base = replace(compose(answers.study, {}), footer=_LABELS)
    else:
        parts = parts[1:]
    return replace(base, answers=tuple(part.answer for part in parts), evidence=evidence_line(graded))


def _study(answers: Answers, parts: Sequence[Part], drawings: Mapping[str, Drawing], head: Document) -> Document:
    first: tuple[Section, ...] = ()
    if answers.study is not None:
        blocks = [Paragraph(" ".join(answer.explanation(answers.study))), *_summary(answers, drawings)]
        first = (
            Section("Which drafter pays, and up to where", tuple(blocks)),
            *study_sections(answers.study, drawings),
        )
    sections = [*first, *(Section(part.title, part.blocks) for part in parts), *_closing(answers, parts)]
    return replace(head, answer=(), front=(), sections=tuple(sections))


def _summary(answers: Answers, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    from reports.questions.speedup import summary

    assert answers.study is not None
    return (summary(answers.study), Figure.of(drawings["speedup-by-batch"]))


def _closing(answers: Answers, parts: Sequence[Part]) -> list[Section]:
    """Guidelines, what is not answered, methods and limits."""
    advice = _guidelines(answers, parts)
    sections = [Section("Guidelines in plain words", (Bullets(advice),))] if advice else []
    if answers.unanswered:
        sections.append(Section("Not answered here", (Bullets(_open(answers)),)))
    blocks: list[Block] = []
    if answers.study is not None:
        blocks += [Paragraph(f"Intervals of acceptance and speed-up: {answers.study.method}.", lead="Method.")]
        blocks += [limits(answers.study)]
    for part in parts:
        if told := (*grade_limits(part.evidence), *part.limits):
            blocks += [Paragraph("", lead=f"{part.title}."), Bullets(told)]
    return [*sections, Section("Methods and limits of validity", tuple(blocks))] if blocks else sections


def _guidelines(answers: Answers, parts: Sequence[Part]) -> tuple[Paragraph, ...]:
    own = study_guidelines(answers.study) if answers.study is not None else ()
    return (*own, *(one for part in parts for one in part.guidelines))


def _open(answers: Answers) -> tuple[Paragraph, ...]:
    return tuple(
        Paragraph(f"Because {breakable(one.reason, 40)}.", lead=f"{one.title}.") for one in answers.unanswered
    )


def _capacity(answers: Answers, parts: Sequence[Part], drawings: Mapping[str, Drawing], head: Document) -> Document:
    """The plan first, then the results it stands on."""
    plans = [one for one in answers.answered if isinstance(one.findings, CapacityFindings)]
    if not plans:
        why = next((one.reason for one in answers.unanswered if one.title == "Capacity plan"), "it was not asked for")
        raise ReportError(f"report: the template capacity needs a capacity plan; there is none because {why}")
    lead, found = plans[0].part, plans[0].findings
    blocks = [Figure.of(drawings["speedup-by-batch"])] if answers.study is not None else []
    first = [one.part for one in plans]
    parts = [*first, *(part for part in parts if part not in first)]
    rest = [Section(part.title, part.blocks) for part in parts]
    if answers.study is not None:
        words = Paragraph(f"{answer.verdict(answers.study)} {' '.join(answer.explanation(answers.study))}")
        rest.append(Section("What the study of the traces says", (words, *blocks)))
    return replace(
        head,
        title="How much load does it carry?",
        running=f"How much load does it carry? {short(found.verifier)} on {short(found.device, 40)}",
        question="How many requests per second does a replica carry within its objectives, and how many devices does "
        "a load need?",
        verdict=lead.answer.text,
        answer=(),
        answers=tuple(part.answer for part in parts if part is not lead),
        front=(),
        sections=(*rest, *_closing(answers, parts)),
        subtitle=f"{breakable(found.verifier)}; {breakable(found.arrivals)} arrivals; step costs {found.costs}; "
        f"{found.replications} replications of {count(found.requests_per_run)} requests.",
        compact=True,
    )


def _brief(
    answers: Answers, parts: Sequence[Part], drawings: Mapping[str, Drawing], head: Document, most: tuple[int, int]
) -> Document:
    """The verdict, one figure, the answers, and at most so many pieces of advice and limits."""
    shown = drawings.get("speedup-by-batch") or next((one for part in parts for one in part.drawings), None)
    advice = _few([study_guidelines(answers.study) if answers.study else (), *(p.guidelines for p in parts)], most[0])
    own = limits(answers.study).items if answers.study else ()
    told = _few([own, *((*grade_limits(p.evidence), *p.limits) for p in parts)], most[1])
    sections = []
    for title, items in (("Guidelines", advice), ("Limits", told)):
        if items:
            sections.append(Section(title, (Bullets(items),)))
    if answers.unanswered:
        titles = listing([one.title for one in answers.unanswered])
        sections.append(Section("Not answered here", (Paragraph(f"{titles}; the study says why."),)))
    return replace(
        head,
        kicker="paceline brief",
        answer=(),
        front=() if shown is None else (Figure.of(shown),),
        sections=tuple(sections),
        compact=True,
    )


def _few(groups: Sequence[Sequence[Paragraph]], most: int) -> tuple[Paragraph, ...]:
    """Give at most so many, in order, the first of every group before the second of any; say how many are left."""
    turns = sorted((turn, group) for group, items in enumerate(groups) for turn in range(len(items)))
    chosen = sorted((group, turn) for turn, group in turns[:most])
    left = len(turns) - len(chosen)
    more = (Paragraph(f"{left} more in the study."),) if left else ()
    return (*(groups[group][turn] for group, turn in chosen), *more)
