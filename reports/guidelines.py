"""What a study advises, in plain words; each sentence follows from a number of the findings."""

from __future__ import annotations

from analysis.findings import Findings
from analysis.speedup import BestLength
from reports.answer import best_at, gain_is_sure, number, tokens
from reports.document import Paragraph
from reports.text import estimate, listing, named


def study_guidelines(findings: Findings) -> tuple[Paragraph, ...]:
    """Give advice on whether to speculate, with what length, where not, and what to do first."""
    found = (_whether(findings), _lengths(findings), _domains(findings), _idle(findings), _first(findings))
    return tuple(one for one in found if one is not None)


def _whether(findings: Findings) -> Paragraph:
    head, crossover = findings.answer.headline, findings.answer.crossover
    if not head.pays:
        others = [name for name in findings.answer.paying if name != head.drafter]
        where = f" below the batch sizes at which {listing([named(n) for n in others])} pays" if others else ""
        return Paragraph(
            f"Leave speculation off{where}: at batch {head.batch} the best drafter reaches {estimate(head.speedup)} "
            "times the throughput without it.",
            lead="Whether.",
        )
    until = "at every batch size that was simulated"
    if crossover.first_not_paying is not None:
        last = crossover.last_paying
        few = "requests are decoded one at a time" if last == 1 else f"at most {last} requests are decoded together"
        until = f"while {few}, and turn it off above"
    if crossover.pays_again:
        pays = listing([str(row.batch) for row in _by_batch(findings) if row.pays])
        until = f"at batch {pays}, where it is shown to pay, and not at the other sizes that were simulated"
    return Paragraph(f"Speculate with {named(head.drafter)} {until}.", lead="Whether.")


def _by_batch(findings: Findings) -> list[BestLength]:
    """The best length of the headline's drafter at every batch size."""
    drafter = findings.answer.headline.drafter
    return [r for b in findings.settings.batches if (r := best_at(findings, drafter, b)) is not None]


def _lengths(findings: Findings) -> Paragraph | None:
    """The schedule of the headline's drafter over batch size, where it pays at all."""
    rows = _by_batch(findings)
    if not any(row.pays for row in rows):
        return None
    lengths = [row.draft_tokens for row in rows if row.pays]
    advice = "Draft fewer tokens as the batch grows" if lengths == sorted(lengths, reverse=True) else "By batch size"
    schedule = listing([f"{row.draft_tokens if row.pays else 0} at batch {row.batch}" for row in rows])
    return Paragraph(
        f"{advice}: {schedule}, where 0 means do not speculate. Lengths in the brackets "
        "of the table of best lengths do as well.",
        lead="How many tokens.",
    )


def _domains(findings: Findings) -> Paragraph | None:
    head = findings.answer.headline
    rows = [r for d in findings.domains if (r := best_at(findings, head.drafter, head.batch, d)) is not None]
    losing = [row for row in rows if _loses(row)]
    if not head.pays or not losing:
        return None
    names = [f"{named(row.domain or '')} ({estimate(row.speedup)})" for row in losing]
    return Paragraph(
        f"Where requests can be told apart, leave it off for {listing(names)}: there it is shown to cost time.",
        lead="Where not.",
    )


def _loses(row: BestLength) -> bool:
    return row.speedup.high is not None and row.speedup.high < 1


def _idle(findings: Findings) -> Paragraph | None:
    """Drafters that pay nowhere."""
    idle = [name for name in findings.drafters if name not in findings.answer.paying]
    if not idle or len(idle) == len(findings.drafters):
        return None
    if len(idle) > 3:
        return Paragraph(
            f"Of {number(len(findings.drafters))} drafters {number(len(idle))} pay at no batch size here; they need "
            "a cheaper step or more acceptance first.",
            lead="What not to use.",
        )
    pays = "pays" if len(idle) == 1 else "pay"
    return Paragraph(
        f"{listing([named(name) for name in idle])} {pays} at no batch size here.", lead="What not to use."
    )


def _first(findings: Findings) -> Paragraph | None:
    """What to measure before relying on the verdict: costs, where the gain is no larger than their error."""
    head = findings.answer.headline
    if findings.cost_source != "fitted":
        return Paragraph(
            f"Time the steps of this engine before relying on any of it: the costs here are {findings.cost_source}.",
            lead="First.",
        )
    if head.pays and not gain_is_sure(findings, head):
        return Paragraph(
            f"Time the steps again on a quiet machine: the gain of drafting {tokens(head.speculative_tokens)} is "
            "smaller than the error of the fitted costs.",
            lead="First.",
        )
    return None
