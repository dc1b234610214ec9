"""Look-ups that several sections share."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.speedup.acceptance import AcceptanceRow, DepthPoint
from analysis.speedup.findings import Findings
from reports.page.text import acceptance_label, sample

_COLUMNS = 6
"""Drafters side by side in one table; more go into the next one."""


def acceptance_row(findings: Findings, drafter: str, domain: str | None, k: int) -> AcceptanceRow:
    """The acceptance of `drafter` on `domain` (None: all) at draft length `k`."""
    return next(r for r in findings.acceptance if (r.drafter, r.domain, r.draft_tokens) == (drafter, domain, k))


def depth_point(findings: Findings, drafter: str, depth: int) -> DepthPoint:
    """The acceptance of `drafter` at `depth`, all domains."""
    return next(p for p in findings.depth if (p.drafter, p.domain, p.depth) == (drafter, None, depth))


def request_count(findings: Findings) -> int:
    """Requests recorded, over all domains."""
    return sum(findings.sizes.requests.values())


def measured_label(findings: Findings) -> str:
    """End of the caption of a table of acceptance: recorded, imported or synthesised numbers."""
    return f"[{acceptance_label(findings)}; {sample(findings)}]"


def chunks(names: Sequence[str]) -> list[Sequence[str]]:
    """Divide names into rows of a table's width."""
    return [names[i : i + _COLUMNS] for i in range(0, len(names), _COLUMNS)]
