"""What a report stands on, in words: the grades of acceptance and step times on page one, and what they limit."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.traces.grades import GRADE_LIMITS, PER_ROUND, RECORDED, SYNTHESISED, Grade
from reports.page.document import Paragraph
from reports.page.text import breakable, plain
from simulator.pricing.grades import STEP_GRADES, STEP_LIMITS
from simulator.results.evidence import Evidence

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
