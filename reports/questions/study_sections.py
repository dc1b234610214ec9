"""The report from findings to sections."""

from __future__ import annotations

from collections.abc import Mapping

from analysis.speedup.findings import Findings
from reports.page.document import Bullets, Document, Figure, Section
from reports.page.evidence import evidence_line
from reports.page.text import acceptance_label, breakable, short
from reports.questions import answer
from reports.questions.figures import Drawing
from reports.questions.guidelines import study_guidelines
from reports.questions.study_acceptance import acceptance, depth
from reports.questions.study_costs import costs
from reports.questions.study_front import summary
from reports.questions.study_limits import limits
from reports.questions.study_provenance import provenance
from reports.questions.study_speedup import speedup

__all__ = ["compose", "study_sections"]


def compose(findings: Findings, drawings: Mapping[str, Drawing]) -> Document:
    """Arrange the report of one study; without `drawings` its front alone, for a template to go on with."""
    facts = findings.provenance
    date = facts.created[:10]
    year, month, day = (int(part) for part in date.split("-"))
    verifier = breakable(facts.models[0].name)
    return Document(
        title="Does speculative decoding pay?",
        kicker="paceline report",
        subtitle=f"{verifier} with {answer.number(len(findings.drafters))} drafters on {breakable(facts.device)}; "
        f"{facts.decoding}; {facts.kind} {date}.",
        running=f"Does speculative decoding pay? {short(facts.models[0].name)} on {short(facts.device, 40)}",
        footer=f"[{acceptance_label(findings)}] acceptance, replayed   [simulated] served in SimPy, costs "
        f"{findings.cost_source}",
        date=date,
        created=(year, month, day),
        question=answer.question(findings),
        verdict=answer.verdict(findings),
        answer=tuple(answer.explanation(findings)),
        evidence=evidence_line([("Study", facts.evidence)] if facts.evidence is not None else []),
        front=(summary(findings), Figure.of(drawings["speedup-by-batch"])) if drawings else (),
        sections=(
            *study_sections(findings, drawings),
            Section("Guidelines in plain words", (Bullets(study_guidelines(findings)),)),
            Section("Limits of validity", (limits(findings),)),
        )
        if drawings
        else (),
    )


def study_sections(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Section, ...]:
    """Give the sections of a study: sources, acceptance, speed-up and costs."""
    return (
        Section("Where the numbers come from", provenance(findings)),
        Section("Acceptance by domain and drafter", acceptance(findings, drawings)),
        Section("Acceptance by depth, and the constant-rate formula", depth(findings, drawings)),
        Section("The speed-up map", speedup(findings, drawings)),
        Section("Where the time goes, and how well it is known", costs(findings, drawings)),
    )
