"""Question and answer in words: what pays, by how much, and where it stops paying."""

from __future__ import annotations

from analysis.findings import Findings
from analysis.speedup import BestLength, SpeedupCell
from reports.text import acceptance_label, estimate, listing, named

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
        "by how much, with what draft length, and up to which batch size?"
    )


def verdict(findings: Findings) -> str:
    """The answer in one or two sentences."""
    head, name = findings.answer.headline, named(findings.answer.headline.drafter)
    if head.pays:
        return (
            f"{name} pays at batch {head.batch}: drafting {tokens(head.speculative_tokens)} a round gives "
            f"{interval(head)} times the throughput of no speculation. {crossing(findings)}"
        )
    count = len(findings.drafters)
    nothing = "the drafter does not pay" if count == 1 else f"none of the {number(count)} drafters pays"
    where = f"at batch {head.batch}" if findings.answer.paying else "at any batch size simulated"
    return (
        f"No: {nothing} {where}. The least slow at batch {head.batch} is {name} drafting "
        f"{tokens(head.speculative_tokens)}: {interval(head)} times the throughput of no speculation."
    )


def explanation(findings: Findings) -> list[str]:
    """The sentences below the verdict: why, what of the other drafters, what of single domains."""
    parts = (
        _caution(findings),
        _repetition(findings),
        _why(findings),
        _lengths(findings),
        _others(findings),
        _by_domain(findings),
    )
    return [sentence for sentence in parts if sentence]


def crossing(findings: Findings) -> str:
    """Where speculation with the headline's drafter stops paying, as a sentence."""
    crossover = findings.answer.crossover
    if crossover.last_paying is None:
        return "It pays at no batch size simulated."
    if crossover.first_not_paying is None:
        return f"It pays at every batch size simulated, up to {crossover.last_paying}."
    after = best_at(findings, crossover.drafter, crossover.first_not_paying)
    if after is not None and (after.speedup.value or 0) > 1:
        shown = f"batch {crossover.first_not_paying} ({estimate(after.speedup)})"
        return f"It is shown to pay up to batch {crossover.last_paying}, no longer at {shown}."
    near = f"; the speed-up falls through 1 near batch {crossover.batch:.2g}" if crossover.batch else ""
    return f"It stops paying between batch {crossover.last_paying} and batch {crossover.first_not_paying}{near}."


def cell(findings: Findings, row: BestLength) -> SpeedupCell:
    """The speed-up cell at the best speculative length of `row`."""
    wanted = (row.drafter, row.speculative_tokens, row.batch, row.domain)
    return next(c for c in findings.speedup if (c.drafter, c.draft_tokens, c.batch, c.domain) == wanted)


def best_at(findings: Findings, drafter: str, batch: int, domain: str | None = None) -> BestLength | None:
    """The best length of `drafter` at `batch` on `domain`, None where it was not simulated."""
    rows = (r for r in findings.best if (r.drafter, r.batch, r.domain) == (drafter, batch, domain))
    return next(rows, None)


def gain_is_sure(findings: Findings, row: SpeedupCell | BestLength) -> bool:
    """Whether a speed-up differs from 1 by more than the error of the fitted costs (true where that is not known)."""
    draft_tokens = row.draft_tokens if isinstance(row, SpeedupCell) else row.speculative_tokens
    error = findings.run(row.drafter, draft_tokens, row.batch).cost_error
    return error is None or row.speedup.value is None or abs(row.speedup.value - 1) > error


def number(count: int) -> str:
    """Small whole numbers in words."""
    return _NUMBERS[count] if count < len(_NUMBERS) else f"{count}"


def tokens(count: int) -> str:
    """``1 token``, ``3 tokens``."""
    return f"{count} token" + ("" if count == 1 else "s")


def interval(row: BestLength) -> str:
    """The speed-up with its interval in words."""
    value = row.speedup
    if value.value is None or value.low is None or value.high is None:
        return f"{estimate(value)} (no interval)"
    return f"{value.value:.2f} (95% interval {value.low:.2f} to {value.high:.2f})"


def _caution(findings: Findings) -> str:
    """What the error of the fitted costs does to the verdict."""
    head, again = findings.answer.headline, findings.answer.crossover.pays_again
    error = findings.run(head.drafter, head.speculative_tokens, head.batch).cost_error
    parts = []
    if head.pays and error is not None:
        size = "more" if gain_is_sure(findings, head) else "less"
        parts.append(
            f"The gain at batch {head.batch} is {size} than the error of the fitted costs ({100 * error:.0f}%)."
        )
    if again and head.pays:
        rows = [r for b in again if (r := best_at(findings, head.drafter, b)) is not None]
        gains = [f"batch {r.batch} ({r.speedup.value:.2f})" for r in rows]
        unsure = [r for r in rows if not gain_is_sure(findings, r)]
        doubt = ", smaller than that error" if len(unsure) == len(rows) else ""
        parts.append(f"The simulation shows a gain again at {listing(gains)}{doubt}.")
    return " ".join(parts)


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
        f"tokens, bonus included, and costs as much as {got.break_even_tokens:.2f} steps of plain decoding: "
        "that many tokens are what it needs to break even."
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
        who = f"{named(idle[0])} pays" if len(idle) == 1 else f"The other {number(len(idle))} drafters pay"
        needs = ""
        if got.break_even_tokens is not None:
            needs = f": a round commits {got.tokens_per_round:.2f} tokens and would need {got.break_even_tokens:.2f}"
        sentences.append(
            f"{who} at no batch size simulated; the closest at batch {head.batch}, {named(closest.drafter)}, reaches "
            f"{estimate(closest.speedup)}{needs}."
        )
    return " ".join(sentences)


def _also_pays(findings: Findings, drafter: str) -> str:
    """Where another drafter pays, and whether it can be told apart from the headline's."""
    head = findings.answer.headline
    batches = [r.batch for r in findings.best if r.drafter == drafter and r.domain is None and r.pays]
    sentence = f"{named(drafter)} also pays, at batch {listing([str(b) for b in sorted(batches)])}"
    row = best_at(findings, drafter, head.batch)
    if row is None or not row.pays:
        return f"{sentence}."
    overlap = (row.speedup.high or 0) >= (head.speedup.low or 0)
    doubt = "; the intervals overlap" if overlap else ""
    reach = f"{estimate(row.speedup)} drafting {tokens(row.speculative_tokens)}"
    return f"{sentence}; at batch {head.batch} it reaches {reach}{doubt}."


def _by_domain(findings: Findings) -> str:
    head = findings.answer.headline
    rows = [r for d in findings.domains if (r := best_at(findings, head.drafter, head.batch, d)) is not None]
    if len(rows) < 2:
        return ""
    rows.sort(key=lambda row: -(row.speedup.value or 0))
    paying = [f"{named(r.domain or '')} ({r.speedup.value:.2f})" for r in rows if r.pays]
    if len(paying) == len(rows):
        return f"It pays on every domain: {listing(paying)}."
    other = [named(r.domain or "") for r in rows if not r.pays]
    if paying:
        return f"By domain, {named(head.drafter)} pays on {listing(paying)}; not shown to pay on {listing(other)}."
    best = rows[0]
    where = f"{named(best.domain or '')} ({estimate(best.speedup)})"
    return f"It is not shown to pay on any single domain; it does best on {where}."
