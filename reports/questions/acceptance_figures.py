"""Figures of recorded acceptance: by domain, by depth, and against the constant-rate formula."""

from __future__ import annotations

from typing import Any

from analysis.speedup.findings import Findings
from reports.page.drawing import (
    Drawing,
    add_key,
    bars,
    draw_line,
    label,
    label_below,
    label_beside,
    need,
    or_nan,
    panels,
    record,
)
from reports.page.style import INK, REFERENCE, look, to_svg
from reports.page.text import short, signed

_FEWEST_AT_RISK = 20
"""A conditional rate over fewer drafts than this is not drawn: its interval would say more than it knows."""


def acceptance_by_domain(findings: Findings) -> Drawing:
    """Accepted per drafted by domain, one panel a drafter."""
    k = findings.reference_draft_tokens
    rows = [r for r in findings.acceptance if r.draft_tokens == k]
    need(rows, "acceptance-by-domain", f"acceptance rows of draft length {k}")
    domains: list[str | None] = [*sorted(findings.domains, reverse=True), None]
    figure, axes = panels(findings, row_height=0.45 + 0.16 * len(domains), sharey=True)
    top = 0.0
    for index, (drafter, ax) in enumerate(zip(findings.drafters, axes, strict=False)):
        for y, domain in enumerate(domains):
            (value,) = [r.accepted_per_drafted for r in rows if r.drafter == drafter and r.domain == domain]
            if value.value is None:
                continue
            style: dict[str, Any] = {**look(index), "linestyle": "none"}
            if domain is None:
                style |= {"color": INK, "marker": "d"}
            ax.errorbar(value.value, y, xerr=bars([value]), **style)
            top = max(top, value.high or value.value)
        ax.set_title(short(drafter))
        ax.set_yticks(range(len(domains)), [("all" if d is None else short(d, 14)) for d in domains])
        ax.axhline(len(domains) - 1.5, color="#bbbbbb", lw=0.6)
        ax.set_ylim(-0.6, len(domains) - 0.4)
        ax.grid(axis="y", visible=False)
    for ax in axes:
        ax.set_xlim(0, min(1.0, top * 1.08) or 1)
    label_below(axes, "Accepted per drafted token")
    return Drawing(
        "acceptance-by-domain",
        to_svg(figure),
        f"Accepted per drafted token at draft length {k}, by domain and drafter, the bonus token not counted. "
        f"Bars: 95% intervals over requests. {label(findings, 'measured')}",
        f"Dot plots of accepted per drafted tokens, one panel for each of {len(findings.drafters)} drafters, one row "
        f"for each of {len(findings.domains)} domains and one for all; the numbers are in the table that follows.",
        data=tuple(
            {"drafter": r.drafter, "domain": r.domain or "all", "draft_tokens": k}
            | record("accepted_per_drafted", r.accepted_per_drafted)
            for r in rows
        ),
    )


def depth_curves(findings: Findings) -> Drawing:
    """Conditional acceptance by depth with the constant-rate line, one panel a drafter."""
    points = [p for p in findings.depth if p.domain is None]
    need(points, "acceptance-by-depth", "depth points")
    deepest = max(p.draft_tokens for p in points)
    figure, axes = panels(findings, row_height=1.32, sharey=True)
    for index, (drafter, ax) in enumerate(zip(findings.drafters, axes, strict=False)):
        mine = [p for p in points if p.drafter == drafter and p.at_risk >= _FEWEST_AT_RISK]
        if not mine:
            continue
        depths = [p.depth for p in mine]
        gamma = mine[0].draft_tokens
        draw_line(ax, depths, [p.conditional for p in mine], index, None)
        ax.plot(
            depths,
            [or_nan(p.unconditional.value) for p in mine],
            color="#888888",
            lw=0.9,
            marker=".",
            ms=3,
            zorder=1,
        )
        (row,) = [
            r for r in findings.acceptance if r.drafter == drafter and r.domain is None and r.draft_tokens == gamma
        ]
        if row.geometric_rate.value is not None:
            ax.axhline(row.geometric_rate.value, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=0)
        ax.set_title(short(drafter))
        ax.set_ylim(0, 1)
        ax.set_xticks(range(1, deepest + 1))
        ax.set_xlim(0.5, deepest + 0.5)
    label_below(axes, "Depth in the draft")
    label_beside(axes, "Acceptance")
    add_key(
        figure,
        [
            ("conditional on reaching depth i, 95% interval", {"color": INK, "marker": "o"}),
            ("constant rate (geometric fit)", {"color": REFERENCE, "ls": (0, (4, 2))}),
            ("unconditional, as vLLM reports it", {"color": "#888888", "marker": ".", "ms": 3, "lw": 0.9}),
        ],
    )
    return Drawing(
        "acceptance-by-depth",
        to_svg(figure),
        f"Acceptance by depth in rounds that draft {deepest} tokens. If acceptance were independent with a constant "
        f"rate, the conditional curve would lie on the dashed line. Depths that fewer than {_FEWEST_AT_RISK} drafts "
        f"reached are left out. {label(findings, 'measured')}",
        f"Line charts of acceptance against draft depth, one panel for each of {len(findings.drafters)} drafters: "
        "conditional acceptance with intervals, the constant rate fitted to it, and the falling unconditional rate.",
        data=tuple(
            {"drafter": p.drafter, "draft_tokens": p.draft_tokens, "depth": p.depth, "drafts_at_risk": p.at_risk}
            | record("conditional_acceptance", p.conditional)
            | {"unconditional_acceptance": p.unconditional.value, "shown": p.at_risk >= _FEWEST_AT_RISK}
            for p in points
        ),
    )


def formula_error(findings: Findings) -> Drawing:
    """Tokens per round, replayed and by the constant-rate formula, one panel a drafter."""
    rows = [r for r in findings.acceptance if r.domain is None]
    need(rows, "constant-rate-formula", "acceptance rows")
    figure, axes = panels(findings, row_height=1.3, sharey=True)
    for index, (drafter, ax) in enumerate(zip(findings.drafters, axes, strict=False)):
        mine = sorted((r for r in rows if r.drafter == drafter), key=lambda r: r.draft_tokens)
        lengths = [r.draft_tokens for r in mine]
        draw_line(ax, lengths, [r.tokens_per_round for r in mine], index, None)
        ax.plot(lengths, [or_nan(r.formula_tokens.value) for r in mine], color=REFERENCE, ls=(0, (4, 2)), lw=1.0)
        off = mine[-1].formula_error.value
        note = "" if off is None else f"formula {signed(off)}% at {lengths[-1]}"
        ax.text(0.04, 0.94, note, transform=ax.transAxes, va="top", fontsize=8)
        ax.set_title(short(drafter))
        ax.set_xticks(lengths)
        ax.set_xlim(0.5, lengths[-1] + 0.5)
    label_below(axes, "Draft length")
    label_beside(axes, "Tokens per round")
    add_key(
        figure,
        [
            ("replayed, 95% interval", {"color": INK, "marker": "o"}),
            ("constant-rate formula at the position rate", {"color": REFERENCE, "ls": (0, (4, 2))}),
        ],
    )
    return Drawing(
        "constant-rate-formula",
        to_svg(figure),
        "Tokens per round, bonus included, as replayed and as the constant-rate formula promises from the share of "
        f"positions where the drafter is right. {label(findings, 'measured')}",
        f"Line charts of tokens per round against draft length, one panel for each of {len(findings.drafters)} "
        "drafters, with the constant-rate formula dashed and its relative error at the longest draft.",
        data=tuple(
            {"drafter": r.drafter, "draft_tokens": r.draft_tokens}
            | record("tokens_per_round", r.tokens_per_round)
            | {"formula_tokens_per_round": r.formula_tokens.value, "formula_error": r.formula_error.value}
            for r in rows
        ),
    )
