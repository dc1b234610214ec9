"""Figures of simulated speed-up: against batch size, and as a map over draft length and batch size.

Figures of recorded acceptance: by domain, by depth, and against the constant-rate formula.

Figures of cost: where the time goes, and how well the fits meet the timings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.speedup.costfit import CostFit
from analysis.speedup.findings import Findings
from analysis.speedup.speedup import BestLength, SpeedupCell
from reports.page.drawing import (
    INK,
    REFERENCE,
    Drawing,
    add_key,
    bars,
    draw_line,
    label,
    label_below,
    label_beside,
    look,
    need,
    new_figure,
    or_nan,
    panels,
    record,
    to_svg,
)
from reports.page.text import TIMES, estimate, short, signed, sim_label
from reports.questions.answer import judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def speedup_by_batch(findings: Findings) -> Drawing:
    """Speed-up at the best draft length against batch size, one line a drafter."""
    rows = sorted((row for row in findings.best if row.domain is None), key=lambda row: row.batch)
    need(rows, "speedup-by-batch", "best draft lengths")
    figure, (ax,) = new_figure(1, 1, height=3.3)
    count = len(findings.drafters)
    for index, drafter in enumerate(findings.drafters):
        mine = [row for row in rows if row.drafter == drafter]
        aside = 2 ** (0.05 * (index - (count - 1) / 2))
        x = [row.batch * aside for row in mine]
        draw_line(ax, x, [r.speedup for r in mine], index, short(drafter), hollow=[r.extrapolated for r in mine])
    ax.axhline(1, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=1, label="no speculation")
    head = findings.answer.headline
    leading = [row for row in rows if row.drafter == head.drafter]
    _name_lengths(ax, leading)
    _batch_axis(ax, findings.settings.batches)
    banded = _cost_band(ax, leading)
    ax.set_ylabel(f"Speed-up over no speculation ({TIMES})", rotation_mode="anchor")
    tops = [r.speedup.high or r.speedup.value or 1 for r in rows]
    tops += [r.with_costs.high for r in leading if r.with_costs is not None and r.with_costs.high is not None]
    ax.set_ylim(0, min(max(1.2, 1.12 * max(tops)), 2 * max(1.2, *tops[: len(rows)])))
    handles, names = ax.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: handles[i] in ax.lines or handles[i] in ax.collections)
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside lower center", ncols=4)
    grey = ""
    if banded:
        grey = (
            f" Grey: for {short(head.drafter)}, the 95% interval that holds for every drafter, length and batch size "
            "at once, over requests and fitted costs."
        )
    return Drawing(
        "speedup-by-batch",
        to_svg(figure),
        "Throughput relative to no speculation, each drafter at its fastest draft length there (of those shown to "
        "pay, where some are; written for "
        f"{short(head.drafter)}). Bars: 95% intervals over requests, of a length chosen beforehand.{grey} Hollow "
        f"marks: costs extrapolated. {label(findings, sim_label(findings))}",
        f"Line chart of speed-up against batch size for {count} drafters. At batch {head.batch} the best is "
        f"{short(head.drafter)} with {estimate(judged(head))} times; the line at 1 marks no speculation.",
        data=tuple(
            {"drafter": r.drafter, "batch": r.batch, "draft_tokens": r.speculative_tokens}
            | record("speedup", r.speedup)
            | _bounds(r)
            | {"pays": r.pays, "pays_with_costs": r.pays_with_costs, "extrapolated": r.extrapolated}
            for r in rows
        ),
    )


def speedup_map(findings: Findings) -> Drawing:
    """Speed-up over draft length and batch size, one annotated map a drafter."""
    cells = {(c.drafter, c.draft_tokens, c.batch): c for c in findings.speedup if c.domain is None}
    need(cells, "speedup-map", "speed-up cells")
    lengths, batches = findings.settings.draft_tokens, findings.settings.batches
    high = max(1.0, *(c.speedup.value or 0 for c in cells.values()))
    figure, axes = panels(findings, row_height=0.55 + 0.2 * len(lengths), sharey=True)
    for drafter, ax in zip(findings.drafters, axes, strict=True):
        _map(ax, findings, [[cells.get((drafter, k, b)) for b in batches] for k in lengths], high)
        ax.set_title(short(drafter))
    label_below(axes, "Batch size")
    label_beside(axes, "Draft length")
    return Drawing(
        "speedup-map",
        to_svg(figure),
        "Speed-up over no speculation by draft length and batch size. Lighter is faster. A frame marks cells that "
        "are shown to pay (bounds for all cells at once), dashed where for the requests only; a star, "
        f"costs extrapolated. {label(findings, sim_label(findings))}",
        f"Annotated maps of speed-up, one for each of {len(findings.drafters)} drafters, with draft lengths "
        f"{lengths[0]} to {lengths[-1]} as rows and batch sizes {batches[0]} to {batches[-1]} as columns.",
        data=tuple(
            {"drafter": c.drafter, "draft_tokens": c.draft_tokens, "batch": c.batch}
            | record("speedup", c.speedup)
            | _bounds(c)
            | {"tokens_per_round": c.tokens_per_round, "break_even_tokens": c.break_even_tokens}
            | {"extrapolated": c.extrapolated}
            for c in cells.values()
        ),
    )


def _bounds(row: BestLength | SpeedupCell) -> dict[str, float | None]:
    """The simultaneous bounds of `row` as columns, over requests, and over requests and costs."""
    costs = row.with_costs
    return {
        "simultaneous_low": row.simultaneous.low,
        "simultaneous_high": row.simultaneous.high,
        "with_costs_low": None if costs is None else costs.low,
        "with_costs_high": None if costs is None else costs.high,
    }


def _name_lengths(ax: Axes, rows: Sequence[BestLength]) -> None:
    """Write the draft length above the bar of every row."""
    for row in rows:
        at = (row.batch, row.speedup.high or row.speedup.value or 0.0)
        words = f"draft {row.speculative_tokens}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        ax.annotate(words, at, (0, 5), textcoords="offset points", ha="center", fontsize=7.5, color=INK, bbox=box)


def _batch_axis(ax: Axes, batches: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.set_xlim(batches[0] / 1.22, batches[-1] * 1.22)
    ax.minorticks_off()
    ax.set_xlabel("Batch size (requests decoded together)")


def _cost_band(ax: Axes, rows: Sequence[BestLength]) -> bool:
    """Shade the interval over requests and costs of `rows`; false where it is not known."""
    known = [
        (row.batch, row.with_costs.low, row.with_costs.high)
        for row in rows
        if row.with_costs is not None and row.with_costs.low is not None and row.with_costs.high is not None
    ]
    if not known:
        return False
    left, right = ax.get_xlim()
    band = [(left, *known[0][1:]), *known, (right, *known[-1][1:])]
    x, low, high = zip(*band, strict=True)
    ax.fill_between(x, low, high, color="#e4e4e4", lw=0, zorder=0, label="with the error of costs")
    return True


def _map(ax: Axes, findings: Findings, cells: Sequence[Sequence[SpeedupCell | None]], high: float) -> None:
    """Draw one map; rows are draft lengths, columns batch sizes, `high` the lightest shade."""
    import seaborn as sns

    sns.heatmap(
        [[math.nan if c is None else or_nan(c.speedup.value) for c in row] for row in cells],
        ax=ax,
        annot=[[_words(c) for c in row] for row in cells],
        fmt="",
        annot_kws={"fontsize": 7.5},
        cmap="cividis",
        vmin=0,
        vmax=high,
        cbar=False,
        linewidths=0.5,
        linecolor="white",
        xticklabels=[str(b) for b in findings.settings.batches],
        yticklabels=[str(k) for k in findings.settings.draft_tokens],
    )
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is not None and cell.pays:
                _frame(ax, x, y, sure=not cell.within_costs)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.grid(visible=False)


def _words(cell: SpeedupCell | None) -> str:
    if cell is None or cell.speedup.value is None:
        return ""
    return f"{cell.speedup.value:.2f}{'*' if cell.extrapolated else ''}"


def _frame(ax: Axes, column: int, row: int, *, sure: bool) -> None:
    """Frame a cell that pays, dashed where the gain is smaller than the error of the costs."""
    from matplotlib.patches import Rectangle

    line = "-" if sure else (0, (2, 1.5))
    ax.add_patch(
        Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, fill=False, edgecolor=INK, lw=1.2, ls=line, zorder=5)
    )


def time_breakdown(findings: Findings) -> Drawing:
    """Where the time of an output token goes, without speculation and with each drafter at its best length."""
    smallest = findings.settings.batches[0]
    chosen = {(r.drafter, r.speculative_tokens) for r in findings.best if r.domain is None and r.batch == smallest}
    plain = [r for r in findings.runs if r.batch == smallest and r.draft_tokens == 0]
    runs = plain + [r for r in findings.runs if r.batch == smallest and (r.drafter, r.draft_tokens) in chosen]
    need(runs, "time-breakdown", "runs")
    figure, axes = new_figure(1, 1, height=0.9 + 0.24 * len(runs))
    ax = axes[0]
    parts = (
        ("prefill", "#f0f0f0", "...."),
        ("draft", "#e69f00", ""),
        ("verify", "#56708f", "////"),
        ("overhead", "#1a1a1a", ""),
    )
    left = [0.0] * len(runs)
    widths: dict[str, list[float]] = {}
    for part, colour, hatch in parts:
        width = [
            1000
            / r.tokens_per_second
            * getattr(r, f"{part}_s")
            / (r.prefill_s + r.draft_s + r.verify_s + r.overhead_s)
            for r in runs
        ]
        widths[part] = width
        if max(width) > 0:
            ax.barh(
                range(len(runs)),
                width,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor=INK,
                lw=0.5,
                label=part,
                height=0.66,
            )
        left = [a + b for a, b in zip(left, width, strict=True)]
    names = [f"{short(r.drafter)}, draft {r.draft_tokens}" if r.draft_tokens else "no speculation" for r in runs]
    if len(plain) > 1:  # drafters recorded on different requests have baselines of their own
        names[: len(plain)] = [f"none, requests of {short(r.drafter, 12)}" for r in plain]
    ax.set_yticks(range(len(runs)), names)
    ax.invert_yaxis()
    ax.axvline(left[0], color=INK, lw=0.9, ls=(0, (4, 2)), zorder=5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("Engine time per output token, ms")
    figure.legend(loc="outside lower center", ncols=4)
    return Drawing(
        "time-breakdown",
        to_svg(figure),
        f"Where the time of an output token goes at batch {smallest}: without speculation, and with each drafter at "
        f"its best draft length. Left of the dashed line is faster. {label(findings, sim_label(findings))}",
        "Stacked bars of milliseconds per output token, divided into prefill, draft, verify and overhead, for no "
        f"speculation ({left[0]:.1f} ms) and {len(runs) - 1} drafters.",
        data=tuple(
            {"drafter": r.drafter if r.draft_tokens else "none", "draft_tokens": r.draft_tokens, "batch": r.batch}
            | {"requests_of": r.drafter, "tokens_per_second": r.tokens_per_second}
            | {f"{part}_ms_per_token": round(width[i], 6) for part, width in widths.items()}
            for i, r in enumerate(runs)
        ),
    )


def cost_fit(findings: Findings) -> Drawing:
    """Fitted against measured seconds of every timed configuration, by operation."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    fits = [f for f in findings.cost_fits if f.points]
    need(fits, "cost-fit", "timed configurations")
    groups = _by_scale(findings, fits)
    figure, axes = new_figure(1, len(groups), height=2.4)
    models = list(dict.fromkeys(f.model for f in fits))
    for (title, mine), ax in zip(groups.items(), axes, strict=True):
        values = [1000 * v for f in mine for p in f.points for v in (p.measured_s, p.fitted_s)]
        span = [min(values) / 1.3, max(values) * 1.3]
        ax.plot(span, span, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=0)
        for fit in mine:
            style = look(models.index(fit.model))
            ax.plot(
                [1000 * p.measured_s for p in fit.points],
                [1000 * p.fitted_s for p in fit.points],
                ls="none",
                marker=style["marker"],
                mfc="none",
                mec=style["color"],
                ms=4,
                label=short(fit.model),
            )
        ax.set(xscale="log", yscale="log", xlim=span, ylim=span)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.set_title(title)
        ax.set_xlabel("Measured step, ms")
    axes[0].set_ylabel("Fitted step, ms", rotation_mode="anchor")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    steps = sum(len(f.points) for f in fits)
    return Drawing(
        "cost-fit",
        to_svg(figure),
        f"Fitted against measured time of {steps} timed configurations (median of the repeats); on the dashed line "
        f"both agree. [measured, fitted; {findings.sizes.timed_steps:,} timed steps]",
        f"Scatter plots of fitted against measured step time in milliseconds: {', '.join(groups)}; "
        "the errors are in the table that follows.",
        data=tuple(
            {"model": f.model, "operation": f.operation, "batch": p.batch, "new_tokens": p.new_tokens}
            | {"context_tokens": p.context_tokens, "repeats": p.repeats}
            | {"measured_s": p.measured_s, "fitted_s": p.fitted_s}
            for f in fits
            for p in f.points
        ),
    )


def _by_scale(findings: Findings, fits: Sequence[CostFit]) -> dict[str, list[CostFit]]:
    """Fits by operation; lookups, which take microseconds, apart from drafters that have weights."""
    lookups = {m.name for m in findings.provenance.models if m.parameters == 0}
    groups: dict[str, list[CostFit]] = {"prefill": [], "verify": [], "draft": [], "lookup": []}
    for fit in fits:
        groups["lookup" if fit.model in lookups else fit.operation].append(fit)
    return {title: mine for title, mine in groups.items() if mine}
