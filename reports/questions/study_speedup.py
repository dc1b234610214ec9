"""The speed-up map, and the best draft lengths that follow from it."""

from __future__ import annotations

from collections.abc import Mapping

from analysis.common.bootstrap import Estimate
from analysis.speedup.findings import Findings
from analysis.speedup.speedup import BestLength
from reports.page.document import Block, Figure, Paragraph, Table, table
from reports.page.text import DASH, breakable, estimate, listing, sample, short, sim_label
from reports.questions import answer
from reports.questions.figures import Drawing


def speedup(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """The map, the best length per batch size, and the same by domain."""
    batches = findings.settings.batches
    rows = []
    for drafter in findings.drafters:
        found = [answer.best_at(findings, drafter, b) for b in batches]
        rows.append((short(drafter), *("\u2014" if r is None else _length(r) for r in found)))
    cause = "requests and the error of the fitted costs" if _costs_known(findings) else "requests"
    blocks: list[Block] = [
        Figure.of(drawings["speedup-map"]),
        _headline_by_batch(findings),
        table(
            "Fastest draft length by batch size, all domains; 0 means do not speculate. In brackets the lengths "
            f"that may be as fast, given the {cause} (multiple comparisons with the best, 95%). "
            f"[{sim_label(findings)}; {sample(findings)}]",
            ("Drafter", *(f"Batch {b}" for b in batches)),
            rows,
            "l" + "c" * len(batches),
            ("1.2", *("1",) * len(batches)),
        ),
    ]
    return (*blocks, *_best_by_domain(findings))


def _headline_by_batch(findings: Findings) -> Table:
    """The headline's drafter at every batch size: its intervals, what they say, and the recommended length."""
    drafter = findings.answer.headline.drafter
    schedule = next(s for s in findings.schedules if s.drafter == drafter and s.domain is None)
    recommended = dict(zip(schedule.batches, schedule.draft_tokens, strict=True))
    rows = []
    for batch in schedule.batches:
        row = answer.best_at(findings, drafter, batch)
        if row is not None:
            costs = "\u2014" if row.with_costs is None else _range(row.with_costs)
            intervals = (estimate(row.speedup), _range(row.simultaneous), costs)
            length = f"{row.speculative_tokens}"
            rows.append((f"{batch}", length, *intervals, _reading(row), f"{recommended[batch]}"))
    return table(
        f"{short(drafter)} at its fastest length by batch size (of those shown to pay, where some are), all domains: "
        "the speed-up with the 95% interval of a length chosen beforehand; the simultaneous one that holds for every "
        "drafter, length and batch size tried, over requests, and over requests and fitted costs; what is said of "
        "it; and the length to use, which does not grow with the batch where the data cannot tell. "
        f"[{sim_label(findings)}; {sample(findings)}]",
        ("Batch", "Length", "Speed-up", "Simultaneous", "With costs", "Verdict", "Recommended"),
        rows,
        "rrrrrlr",
    )


def _reading(row: BestLength) -> str:
    if row.within_costs:
        return "pays (requests only)"
    return "pays" if row.pays else "loses" if row.loses else "not shown"


def _range(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return "\u2014"
    return f"{value.low:.2f}{DASH}{value.high:.2f}"


def _costs_known(findings: Findings) -> bool:
    return all(row.with_costs is not None for row in findings.best)


def _best_by_domain(findings: Findings) -> list[Block]:
    """Best lengths per domain and batch of the drafters that have one above 0; the others in a sentence."""
    batches = findings.settings.batches
    rows, never = [], []
    for drafter in findings.drafters:
        mine = [r for r in findings.best if r.drafter == drafter and r.domain is not None]
        if not any(r.draft_tokens for r in mine):
            never.append(breakable(drafter))
            continue
        for index, domain in enumerate(findings.domains):
            cells = []
            for b in batches:
                best = answer.best_at(findings, drafter, b, domain)
                if best is None or best.speedup.value is None:
                    cells.append("\u2014")
                elif best.draft_tokens == 0:
                    cells.append("0")
                else:
                    sign = "" if best.pays and not best.within_costs else " c" if best.pays else " ?"
                    cells.append(f"{best.draft_tokens}: {best.speedup.value:.2f}{sign}")
            rows.append((short(drafter) if index == 0 else "", breakable(domain, 16), *cells))
    blocks: list[Block] = []
    if rows:
        blocks.append(
            table(
                "Fastest draft length and its speed-up by domain and batch size; a question mark where it is not "
                "shown to pay by bounds that hold for all domains, drafters, lengths and batch sizes at once, a c "
                "where it pays for the requests only: the gain is within the error of the fitted costs. "
                f"[{sim_label(findings)}; {sample(findings)}]",
                ("Drafter", "Domain", *(f"Batch {b}" for b in batches)),
                rows,
                "ll" + "r" * len(batches),
                ("1.2", "1.1", *("1",) * len(batches)),
            )
        )
    if never:
        blocks.append(
            Paragraph(f"On every domain and at every batch size the fastest draft length is 0 for {listing(never)}.")
        )
    return blocks


def _length(row: BestLength) -> str:
    alike = row.indistinct if row.indistinct_with_costs is None else row.indistinct_with_costs
    others = [str(k) for k in alike if k != row.draft_tokens]
    return f"{row.draft_tokens} [{', '.join(others)}]" if others else f"{row.draft_tokens}"
