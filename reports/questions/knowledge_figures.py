"""Figures of the knowledge question: paired differences, transfer between domains, the worth of a router."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.common.bootstrap import Estimate
from analysis.knowledge.findings import KnowledgeFindings, PairedRow, RouterValue
from analysis.routing.served import cost_words
from reports.page.drawing import INK, REFERENCE, Drawing, add_key, bars, look, need, new_figure, or_nan, to_svg
from reports.page.text import estimate, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS = 4
"""Panels in a row."""


def sample_label(findings: KnowledgeFindings, how: str) -> str:
    """End of a caption: how the numbers were come by, and the sample size."""
    return f"[{how}; n = {sum(findings.requests.values())} requests, {len(findings.requests)} domains]"


def costs_label(findings: KnowledgeFindings) -> str:
    """Say that numbers are simulated, and where the costs of each price list come from."""
    return "simulated; " + ", ".join(cost_words(r.price, r.extrapolated) for r in findings.routers)


def paired_forest(findings: KnowledgeFindings) -> Drawing:
    """Differences to the generalist by domain, one panel a specialist."""
    need(findings.paired, "knowledge-paired", "paired comparisons")
    domains = sorted(findings.requests, reverse=True)
    names = [student.name for student in findings.specialists]
    rows = math.ceil(len(names) / _ACROSS)
    height = 0.75 + rows * (0.45 + 0.19 * len(domains))
    figure, axes = new_figure(rows, min(_ACROSS, len(names)), height=height, sharey=True, sharex=True)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for name, ax in zip(names, axes, strict=False):
        for row in (r for r in findings.paired if r.specialist == name):
            _interval(ax, row, domains.index(row.domain or ""))
        ax.axvline(0, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=1)
        ax.set_yticks(range(len(domains)), [short(d, 14) for d in domains])
        ax.set_ylim(-0.6, len(domains) - 0.4)
        ax.grid(axis="y", visible=False)
        ax.set_title(short(name), fontsize=7.8)
        ax.set_xlabel("Tokens per round")
    add_key(
        figure,
        [
            ("home domain", {"color": look(1)["color"], "marker": "D", "ls": "none"}),
            ("another domain", {"color": INK, "marker": "o", "mfc": "white", "ls": "none"}),
            ("adjusted p < 0.05", {"color": INK, "marker": "*", "ls": "none"}),
        ],
    )
    return Drawing(
        "knowledge-paired",
        to_svg(figure),
        "Tokens per round (bonus included) of each specialist less those of "
        f"{short(findings.generalist.name)} on the same prompts, at draft length "
        f"{findings.draft_tokens}. Right of the dashed line the specialist is ahead. "
        "Bars: 95% intervals over prompts; stars: p below 0.05 after Holm's correction, at home and away from home "
        f"apart. {sample_label(findings, 'measured')}",
        f"Forest plots, one panel for each of {len(names)} specialists, one row a domain; the numbers of the home "
        "domains are in the table that follows.",
        data=tuple(_paired_record(row) for row in findings.paired),
    )


def transfer_map(findings: KnowledgeFindings) -> Drawing:
    """Accepted tokens relative to the generalist's: specialists by domains."""
    import seaborn as sns

    need(findings.transfer, "knowledge-transfer", "transfer cells")
    domains = sorted(findings.requests)
    names = [student.name for student in findings.specialists]
    cells = {(cell.drafter, cell.domain): cell.relative for cell in findings.transfer}
    figure, (ax,) = new_figure(1, 1, height=0.75 + 0.42 * len(names))
    sns.heatmap(
        [[or_nan(cells[name, domain].value) for domain in domains] for name in names],
        ax=ax,
        annot=[[_two_lines(cells[name, domain]) for domain in domains] for name in names],
        fmt="",
        annot_kws={"fontsize": 7.5},
        cmap="PuOr",
        vmin=0,
        vmax=2,
        cbar=False,
        linewidths=0.5,
        linecolor="white",
        xticklabels=[short(domain, 14) for domain in domains],
        yticklabels=[short(name) for name in names],
    )
    for y, student in enumerate(findings.specialists):
        if student.home in domains:
            _frame(ax, domains.index(student.home), y)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.grid(visible=False)
    return Drawing(
        "knowledge-transfer",
        to_svg(figure),
        f"Accepted tokens per round (bonus excluded) over those of {short(findings.generalist.name)}, draft length "
        f"{findings.draft_tokens}; below, the 95% interval over prompts. A frame marks the home domain. "
        f"{sample_label(findings, 'measured')}",
        f"Heat map of {len(names)} specialists by {len(domains)} domains; each holds a ratio and its interval.",
        data=tuple(
            {"drafter": c.drafter, "domain": c.domain, **_numbers("relative_accepted", c.relative)}
            for c in findings.transfer
        ),
    )


def router_curves(findings: KnowledgeFindings) -> Drawing:
    """Speed-up against the accuracy of the router, one panel a price list."""
    need(findings.routers, "knowledge-router", "router values")
    figure, axes = new_figure(1, len(findings.routers), height=3.0)
    for router, ax in zip(findings.routers, axes, strict=True):
        _router_panel(ax, router)
    axes[0].set_ylabel("Speed-up over no speculation", rotation_mode="anchor")
    add_key(
        figure,
        [
            ("misses go anywhere", {**look(0)}),
            ("misses go to the generalist", {**look(1)}),
            ("generalist alone", {"color": REFERENCE, "ls": (0, (4, 2))}),
        ],
    )
    evens = "; ".join(f"{estimate(r.break_even)} ({r.price.name})" for r in findings.routers)
    return Drawing(
        "knowledge-router",
        to_svg(figure),
        "Simulated speed-up at batch 1 of a router that asks the right drafter with the given probability. Grey "
        f"band: accuracy at which it breaks even with the generalist, {evens}. Dotted: the better drafter of each "
        f"request, and of each round, which no engine knows. Bars: 95% intervals over prompts. "
        f"{sample_label(findings, costs_label(findings))}",
        f"Line charts of speed-up against router accuracy, a panel for each of {len(findings.routers)} price lists.",
        data=tuple(_curve_records(findings)),
    )


def _interval(ax: Axes, row: PairedRow, y: int) -> None:
    colour = look(1)["color"] if row.home else INK
    style: dict[str, Any] = {"marker": "D" if row.home else "o", "mfc": colour if row.home else "white", "ms": 4}
    ax.errorbar(or_nan(row.difference.value), y, xerr=bars([row.difference]), color=colour, elinewidth=0.9, **style)
    if row.p_adjusted < 0.05:
        at = (or_nan(row.difference.value), y)
        ax.annotate("*", at, (0, 1), textcoords="offset points", ha="center", fontsize=9, color=colour)


def _router_panel(ax: Axes, router: RouterValue) -> None:
    x = [point.accuracy for point in router.curve]
    for index, values in enumerate(
        ([point.speedup for point in router.curve], [point.speedup_careful for point in router.curve])
    ):
        style = look(index)
        ax.errorbar(x, [or_nan(e.value) for e in values], yerr=bars(values), elinewidth=0.8, **style)
    alone = or_nan(router.level("generalist").speedup.value)
    ax.axhline(alone, color=REFERENCE, ls=(0, (4, 2)), lw=1.0, zorder=0)
    even = router.break_even
    if even.low is not None and even.high is not None and even.low < 1:
        ax.axvspan(even.low, min(even.high, 1.0), color="#e4e4e4", lw=0, zorder=0)
    for choice in ("oracle by request", "oracle by round"):
        value = or_nan(router.level(choice).speedup.value)
        ax.axhline(value, color=INK, ls=(0, (1, 1.5)), lw=1.0, zorder=0)
        ax.annotate(choice, (x[0], value), (0, 2), textcoords="offset points", fontsize=7.5, color=INK)
    ax.set_xlim(min(x) - 0.03, 1.03)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.06 * (high - low))
    ax.set_xlabel("Accuracy of the router")
    ax.set_title(f"{router.price.name} prices, draft {router.draft_tokens}")


def _two_lines(value: Estimate) -> str:
    if value.value is None:
        return ""
    if value.low is None or value.high is None:
        return f"{value.value:.2f}"
    return f"{value.value:.2f}\n{value.low:.2f}\u2013{value.high:.2f}"


def _frame(ax: Axes, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, edgecolor=INK, lw=1.2, zorder=5))


def _paired_record(row: PairedRow) -> dict[str, Any]:
    return {
        "specialist": row.specialist,
        "domain": row.domain,
        "home": row.home,
        **_numbers("difference_tokens_per_round", row.difference),
        "requests": row.difference.requests,
        "p_value": row.p_value,
        "p_adjusted": row.p_adjusted,
    }


def _curve_records(findings: KnowledgeFindings) -> list[dict[str, Any]]:
    records = []
    for router in findings.routers:
        for point in router.curve:
            values = (("misses anywhere", point.speedup), ("misses to the generalist", point.speedup_careful))
            records += [_curve_record(router, kind, point.accuracy, value) for kind, value in values]
        records += [_curve_record(router, level.choice, None, level.speedup) for level in router.levels]
    return records


def _curve_record(router: RouterValue, choice: str, accuracy: float | None, value: Estimate) -> dict[str, Any]:
    return {"prices": router.price.name, "choice": choice, "accuracy": accuracy, **_numbers("speedup", value)}


def _numbers(name: str, value: Estimate) -> dict[str, Any]:
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
