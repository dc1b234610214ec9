"""The study of one more TraceSet as a part: its verdict, its table and its figures."""

from __future__ import annotations

from analysis.speedup.findings import Findings
from reports.page.document import Figure, Paragraph, Part
from reports.page.drawing import styled
from reports.questions import speedup_figures as speedup
from reports.questions.answer import explanation, question, study_guidelines, verdict
from reports.questions.speedup import summary


def study_part(findings: Findings, name: str) -> Part:
    """Give the part for the TraceSet called `name`."""
    from dataclasses import replace

    with styled():
        drawings = (speedup.speedup_by_batch(findings), speedup.speedup_map(findings))
    named = tuple(replace(one, name=f"{name}-{one.name}") for one in drawings)
    return Part(
        f"study-{name}",
        f"Speed-up: {name}",
        Paragraph(verdict(findings), lead=f"{name}."),
        (
            Paragraph(question(findings)),
            Paragraph(" ".join(explanation(findings))),
            summary(findings),
            *(Figure.of(one) for one in drawings),
        ),
        named,
        guidelines=study_guidelines(findings),
        evidence=findings.provenance.evidence,
    )
