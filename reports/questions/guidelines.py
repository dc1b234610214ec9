"""What a study advises, in plain words; each sentence follows from a number of the findings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from analysis.speedup.findings import Findings
from reports.page.document import Paragraph
from reports.page.text import estimate, listing, named
from reports.questions.answer import best_at, judged, number, sizes, tokens


def study_guidelines(findings: Findings) -> tuple[Paragraph, ...]:
    """Give advice on whether to speculate, with what length, where not, and what to do first."""
    found = (_whether(findings), _lengths(findings), _domains(findings), _idle(findings), _first(findings))
    return tuple(one for one in found if one is not None)


TUNE = (
    "A policy that chooses the length by request or round was not part of this study and may pay there; `paceline "
    "tune` tries such policies."
)


def _whether(findings: Findings) -> Paragraph:
    head, crossover = findings.answer.headline, findings.answer.crossover
    pooled = [c for c in findings.crossovers if c.domain is None]
    if head.pays:
        unsure = crossover.within_costs
        but = f" (at batch {sizes(unsure)} for the requests only)" if unsure else ""
        sentences = [f"Speculate with {named(head.drafter)} at batch {sizes(crossover.pays)}{but}."]
    else:
        found = estimate(judged(head))
        sentences = [
            f"At batch {head.batch} leave fixed draft lengths off: the best drafter reaches {found} times the "
            "throughput without speculation."
        ]
    for one in pooled:
        more = sorted(set(one.pays) - set(crossover.pays))
        if more:
            sentences.append(f"{named(one.drafter)} pays at batch {sizes(more)}.")
    idle = sorted(set(findings.settings.batches) - {batch for one in pooled for batch in one.pays})
    if idle:
        sentences.append(f"No fixed draft length among those tried is shown to pay at batch {sizes(idle)}. {TUNE}")
    return Paragraph(" ".join(sentences), lead="Whether.")


def _lengths(findings: Findings) -> Paragraph | None:
    """The recommended draft lengths of the headline's drafter over batch size, where it pays at all."""
    drafter, crossover = findings.answer.headline.drafter, findings.answer.crossover
    if not crossover.pays:
        return None
    schedule = next(s for s in findings.schedules if s.drafter == drafter and s.domain is None)
    plan = dict(zip(schedule.batches, schedule.draft_tokens, strict=True))
    rows = [row for batch in schedule.batches if (row := best_at(findings, drafter, batch)) is not None]
    sentences = [f"Draft {_by_length(plan)}."]
    open_sizes = [b for b in crossover.not_shown if plan[b]]
    if open_sizes:
        sentences.append(f"At batch {sizes(open_sizes)} no speculation may do as well.")
    if any(plan[row.batch] != row.draft_tokens for row in rows):
        worst = max(range(len(rows)), key=lambda i: schedule.regrets[i])
        told = "requests" if any(row.with_costs is None for row in rows) else "requests and fitted costs"
        sentences.append(
            f"The fastest lengths in the simulation ({listing([str(row.draft_tokens) for row in rows])}) are not "
            f"told apart from these by the {told}, so the schedule is the one that does not grow with the batch; if "
            f"the costs are exactly as taken it gives up at most {100 * schedule.regrets[worst]:.0f}% "
            f"(batch {schedule.batches[worst]})."
        )
    if schedule.breaks:
        sentences.append(
            f"No schedule that falls with the batch fits the data: batch {sizes(schedule.breaks)} breaks it and "
            "keeps its fastest length."
        )
    return Paragraph(" ".join(sentences), lead="How many tokens.")


def _by_length(plan: Mapping[int, int]) -> str:
    """``2 tokens at batch 1 and 2, 0 (no speculation) at batch 4`` from draft tokens by batch size."""
    runs = [(k, [b for b, _ in pairs]) for k, pairs in itertools.groupby(plan.items(), key=lambda pair: pair[1])]
    words = {0: "0 tokens (no speculation)"}
    return listing([f"{words.get(k, tokens(k))} at batch {sizes(batches)}" for k, batches in runs])


def _domains(findings: Findings) -> Paragraph | None:
    head = findings.answer.headline
    rows = [r for d in findings.domains if (r := best_at(findings, head.drafter, head.batch, d)) is not None]
    losing = [row for row in rows if row.loses]
    if not head.pays or not losing:
        return None
    names = [f"{named(row.domain or '')} ({estimate(judged(row))})" for row in losing]
    return Paragraph(
        f"Where requests can be told apart, leave it off for {listing(names)}: there it is shown to cost time.",
        lead="Where not.",
    )


def _idle(findings: Findings) -> Paragraph | None:
    """Drafters that are shown to pay nowhere."""
    idle = [name for name in findings.drafters if name not in findings.answer.paying]
    if not idle or len(idle) == len(findings.drafters):
        return None
    if len(idle) > 3:
        return Paragraph(
            f"Of {number(len(findings.drafters))} drafters {number(len(idle))} are shown to pay at no batch size "
            "here with a fixed draft length; they need a cheaper step or more acceptance first.",
            lead="What not to use.",
        )
    verb = "is" if len(idle) == 1 else "are"
    return Paragraph(
        f"{listing([named(name) for name in idle])} {verb} shown to pay at no batch size here with a fixed draft "
        "length.",
        lead="What not to use.",
    )


def _first(findings: Findings) -> Paragraph | None:
    """What to measure before relying on the verdict: costs, where the gain is no larger than their error."""
    unsure = findings.answer.crossover.within_costs
    if findings.cost_source != "fitted":
        return Paragraph(
            f"Time the steps of this engine before relying on any of it: the costs here are {findings.cost_source}.",
            lead="First.",
        )
    if unsure:
        return Paragraph(
            f"Time the steps again on a quiet machine, or measure the throughput itself: at batch {sizes(unsure)} "
            "the gain is within the error of the fitted costs.",
            lead="First.",
        )
    return None
