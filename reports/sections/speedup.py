"""The speed-up map, and the best draft lengths that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.findings import Findings
from reports import answer
from reports.document import Block, Figure, Paragraph, table
from reports.figures import Drawing
from reports.text import breakable, listing, sample, short, sim_label


def speedup(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """The map, the best length per batch size, and the same by domain."""
    batches = findings.settings.batches
    rows = []
    for drafter in findings.drafters:
        found = [answer.best_at(findings, drafter, b) for b in batches]
        rows.append(
            (short(drafter), *("\u2014" if r is None else _length(r.draft_tokens, r.indistinct) for r in found))
        )
    blocks: list[Block] = [
        Figure.of(drawings["speedup-map"]),
        table(
            "Best draft length by batch size, all domains; 0 means do not speculate. In brackets the lengths "
            f"that cannot be told apart from it. [{sim_label(findings)}; {sample(findings)}]",
            ("Drafter", *(f"Batch {b}" for b in batches)),
            rows,
            "l" + "c" * len(batches),
            ("1.2", *("1",) * len(batches)),
        ),
    ]
    return (*blocks, *_best_by_domain(findings))


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
                    sure = best.pays and answer.gain_is_sure(findings, best)
                    cells.append(f"{best.draft_tokens}: {best.speedup.value:.2f}{'' if sure else ' ?'}")
            rows.append((short(drafter) if index == 0 else "", breakable(domain, 16), *cells))
    blocks: list[Block] = []
    if rows:
        blocks.append(
            table(
                "Best draft length and its speed-up by domain and batch size; a question mark where the "
                "interval reaches down to 1 or the gain is smaller than the error of the costs. "
                f"[{sim_label(findings)}; {sample(findings)}]",
                ("Drafter", "Domain", *(f"Batch {b}" for b in batches)),
                rows,
                "ll" + "r" * len(batches),
                ("1.2", "1.1", *("1",) * len(batches)),
            )
        )
    if never:
        blocks.append(
            Paragraph(f"On every domain and at every batch size the best draft length is 0 for {listing(never)}.")
        )
    return blocks


def _length(best: int, alike: Sequence[int]) -> str:
    others = [str(k) for k in alike if k != best]
    return f"{best} [{', '.join(others)}]" if others else f"{best}"
