"""Question and answer in words: what pays, by how much, and at which batch sizes.

What a study advises, in plain words; each sentence follows from a number of the findings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from analysis.common.bootstrap import FEW, Estimate
from analysis.speedup.findings import Findings
from analysis.speedup.speedup import BestLength, Crossover, SpeedupCell
from reports.page.document import Paragraph
from reports.page.text import acceptance_label, estimate, listing, named

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_MUCH_REPETITION = 0.1
"""Share of repeated output from which the reader must know at once."""


def question(findings: Findings) -> str:
    """The question that the report answers."""
    facts = findings.provenance
    count = len(findings.drafters)
    how = "imported" if acceptance_label(findings) == "synthesised" else "recorded"
    which = f"does the {how} drafter speed" if count == 1 else f"which of the {number(count)} {how} drafters speeds"
    return (
        f"With the verifier {named(facts.models[0].name)} on {named(facts.device)}, {which} up decoding, "
        "by how much, with what draft length, and at which batch sizes?"
    )


def verdict(findings: Findings) -> str:
    """The answer in two to four sentences."""
    head, name = findings.answer.headline, named(findings.answer.headline.drafter)
    if head.pays:
        return (
            f"{name} {where_it_pays(findings.answer.crossover)}. At batch {head.batch} drafting "
            f"{tokens(head.speculative_tokens)} a round gives {interval(head)} times the throughput of no "
            f"speculation.{_requests_only(findings.answer.crossover)}"
        )
    rank = "fastest" if (head.speedup.value or 0) > 1 else "least slow"
    return (
        f"{_no(findings)} The {rank} at batch {head.batch} is {name} drafting {tokens(head.speculative_tokens)}: "
        f"{interval(head)} times the throughput of no speculation."
    )


def _no(findings: Findings) -> str:
    """That nothing is shown to pay at the smallest batch size, or that everything loses, and who pays at others."""
    head, paying = findings.answer.headline, findings.answer.paying
    rows = [r for r in findings.best if r.domain is None and (not paying or r.batch == head.batch)]
    where = f"at batch {head.batch}" if paying else "at any batch size simulated"
    count = len(findings.drafters)
    lost = all(row.loses for row in rows)
    nothing = "the drafter does not pay" if count == 1 else f"none of the {number(count)} drafters pays"
    unknown = "the drafter is not" if count == 1 else f"none of the {number(count)} drafters is"
    sentences = [f"No: {nothing} {where}." if lost else f"Not shown: {unknown} shown to pay {where}."]
    for crossover in findings.crossovers:
        if crossover.domain is None and crossover.drafter in paying:
            only = _requests_only(crossover)
            sentences.append(f"{named(crossover.drafter)} {where_it_pays(crossover)}.{only}")
    return " ".join(sentences)


def where_it_pays(crossover: Crossover) -> str:
    """``pays at batch 1, 4 and 8; not shown at batch 2``: every simulated batch size is in one list."""
    parts = [("pays", crossover.pays), ("not shown", crossover.not_shown), ("loses", crossover.loses)]
    told = [f"{word} at batch {sizes(batches)}" for word, batches in parts if batches]
    if len(told) == 1 and len(crossover.pays) > 1:
        return f"pays at every batch size simulated ({sizes(crossover.pays)})"
    return "; ".join(told)


def _requests_only(crossover: Crossover) -> str:
    """At which batch sizes the gain is within the error of the fitted costs, as a sentence after a space."""
    if not crossover.within_costs:
        return ""
    return (
        f" At batch {sizes(crossover.within_costs)} that holds for the requests only: the gain is within the error "
        "of the fitted costs."
    )


def pays_at(crossover: Crossover) -> str:
    """Batch sizes that pay as a table cell, those that pay for the requests only in brackets: ``1, (4), (8)``."""
    cells = [f"({b})" if b in crossover.within_costs else f"{b}" for b in crossover.pays]
    return ", ".join(cells) or "none shown"


def sizes(batches: Sequence[int]) -> str:
    """Batch sizes as a list in words."""
    return listing([str(batch) for batch in batches])


def explanation(findings: Findings) -> list[str]:
    """The sentences below the verdict: why, what of the other drafters, what of single domains."""
    parts = (
        _repetition(findings),
        _why(findings),
        _lengths(findings),
        _others(findings),
        _by_domain(findings),
    )
    return [sentence for sentence in parts if sentence]


def cell(findings: Findings, row: BestLength) -> SpeedupCell:
    """The speed-up cell at the best speculative length of `row`."""
    wanted = (row.drafter, row.speculative_tokens, row.batch, row.domain)
    return next(c for c in findings.speedup if (c.drafter, c.draft_tokens, c.batch, c.domain) == wanted)


def best_at(findings: Findings, drafter: str, batch: int, domain: str | None = None) -> BestLength | None:
    """The best length of `drafter` at `batch` on `domain`, None where it was not simulated."""
    rows = (r for r in findings.best if (r.drafter, r.batch, r.domain) == (drafter, batch, domain))
    return next(rows, None)


def judged(row: SpeedupCell | BestLength) -> Estimate:
    """The interval that a sentence on `row` stands on: simultaneous, with the error of the fitted costs where known.

    Where it pays for the requests alone, which is then said, the interval is that over requests.
    """
    return row.simultaneous if row.with_costs is None or row.within_costs else row.with_costs


def number(count: int) -> str:
    """Small whole numbers in words."""
    return _NUMBERS[count] if count < len(_NUMBERS) else f"{count}"


def tokens(count: int) -> str:
    """``1 token``, ``3 tokens``."""
    return f"{count} token" + ("" if count == 1 else "s")


def interval(row: BestLength) -> str:
    """The speed-up with its interval in words."""
    value = judged(row)
    if value.value is None or value.low is None or value.high is None:
        few = f": {row.speedup.requests} requests are too few" if row.speedup.requests < FEW else ""
        return f"{estimate(row.speedup)} (no simultaneous interval{few})"
    over = "requests and fitted costs" if value is row.with_costs else "requests"
    few = f" from {value.requests}, by Student's t" if value.requests < FEW else ""
    return f"{value.value:.2f} (simultaneous 95% interval {value.low:.2f} to {value.high:.2f} over {over}{few})"


def _repetition(findings: Findings) -> str:
    """A warning that the recorded text is easier than most, where it is."""
    share = findings.sizes.repetition
    if share is None or share < _MUCH_REPETITION:
        return ""
    return f"{100 * share:.0f}% of the recorded output repeats itself word for word, which favours every drafter."


def _why(findings: Findings) -> str:
    head = findings.answer.headline
    got = cell(findings, head)
    if got.tokens_per_round is None or got.break_even_tokens is None:
        return ""
    sentence = (
        f"At batch {head.batch} a round of {named(head.drafter)} commits {got.tokens_per_round:.2f} "
        f"tokens, bonus included; its break-even tokens per round are {got.break_even_tokens:.2f}."
    )
    plain = {r.batch: r for r in findings.runs if r.draft_tokens == 0}
    run = findings.run(head.drafter, head.speculative_tokens, head.batch)
    total = run.prefill_s + run.draft_s + run.verify_s + run.overhead_s
    shares = {
        "drafting": run.draft_s,
        "verifying": run.verify_s,
        "prefill": run.prefill_s,
        "overhead": run.overhead_s,
    }
    largest = max(shares, key=lambda name: shares[name])
    return (
        f"{sentence} {largest.capitalize()} takes {100 * shares[largest] / total:.0f}% of its time; without "
        f"speculation the engine gives {plain[head.batch].tokens_per_second:.1f} tokens per second."
    )


def _lengths(findings: Findings) -> str:
    head = findings.answer.headline
    alike = [k for k in head.indistinct if k not in (0, head.draft_tokens)]
    if not head.pays or not alike:
        return ""
    several = (
        f"Draft lengths {listing([str(k) for k in alike])}" if len(alike) > 1 else f"A draft length of {alike[0]}"
    )
    return f"{several} cannot be told apart from {head.draft_tokens} with {head.speedup.requests} requests."


def _others(findings: Findings) -> str:
    head = findings.answer.headline
    others = [name for name in findings.drafters if name != head.drafter]
    idle = [name for name in others if name not in findings.answer.paying]
    sentences = [_also_pays(findings, name) for name in others if name not in idle]
    if idle and head.pays:
        rows = [row for name in idle if (row := best_at(findings, name, head.batch)) is not None]
        closest = max(rows, key=lambda row: row.speedup.value or 0)
        got = cell(findings, closest)
        who = f"{named(idle[0])} is" if len(idle) == 1 else f"The other {number(len(idle))} drafters are"
        needs = ""
        if got.break_even_tokens is not None:
            needs = f": {got.tokens_per_round:.2f} tokens per round, break-even {got.break_even_tokens:.2f}"
        sentences.append(
            f"{who} shown to pay at no batch size simulated; the closest at batch {head.batch}, "
            f"{named(closest.drafter)}, reaches {estimate(judged(closest))}{needs}."
        )
    return " ".join(sentences)


def _also_pays(findings: Findings, drafter: str) -> str:
    """Where another drafter pays, and whether it can be told apart from the headline's."""
    head = findings.answer.headline
    crossover = next(c for c in findings.crossovers if c.drafter == drafter and c.domain is None)
    only = f" (at batch {sizes(crossover.within_costs)} for the requests only)" if crossover.within_costs else ""
    sentence = f"{named(drafter)} also pays, at batch {sizes(crossover.pays)}{only}"
    row = best_at(findings, drafter, head.batch)
    if row is None or not row.pays:
        return f"{sentence}."
    overlap = (judged(row).high or math.inf) >= (judged(head).low or 0)
    doubt = "; the intervals overlap" if overlap else ""
    reach = f"{estimate(judged(row))} drafting {tokens(row.speculative_tokens)}"
    return f"{sentence}; at batch {head.batch} it reaches {reach}{doubt}."


def _by_domain(findings: Findings) -> str:
    head = findings.answer.headline
    rows = [r for d in findings.domains if (r := best_at(findings, head.drafter, head.batch, d)) is not None]
    if len(rows) < 2:
        return ""
    rows.sort(key=lambda row: -(row.speedup.value or 0))
    paying = [f"{named(r.domain or '')} ({r.speedup.value:.2f})" for r in rows if r.pays]
    unsure = [named(r.domain or "") for r in rows if r.within_costs]
    only = ""
    if unsure:
        which = "" if len(unsure) == len(paying) else f" on {listing(unsure)}"
        only = f" That holds for the requests only{which}: the gain is within the error of the fitted costs."
    if len(paying) == len(rows):
        return f"It pays on every domain: {listing(paying)}.{only}"
    other = [named(r.domain or "") for r in rows if not r.pays]
    if paying:
        where = f"{named(head.drafter)} pays on {listing(paying)}"
        return f"By domain, at batch {head.batch}, {where}; not shown to pay on {listing(other)}.{only}"
    best = rows[0]
    at = f"{named(best.domain or '')} ({estimate(judged(best))})"
    return f"It is not shown to pay on any single domain; it does best on {at}."


def study_guidelines(findings: Findings) -> tuple[Paragraph, ...]:
    """Give advice on whether to speculate, with what length, where not, and what to do first."""
    found = (_whether(findings), _length_guideline(findings), _domains(findings), _idle(findings), _first(findings))
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


def _length_guideline(findings: Findings) -> Paragraph | None:
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
