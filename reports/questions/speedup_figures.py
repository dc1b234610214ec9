"""Figures of simulated speed-up: against batch size, and as a map over draft length and batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.speedup.findings import Findings
from analysis.speedup.speedup import BestLength, SpeedupCell
from reports.page.drawing import (
    Drawing,
    draw_line,
    label,
    label_below,
    label_beside,
    need,
    new_figure,
    or_nan,
    panels,
    record,
)
from reports.page.style import INK, to_svg
from reports.page.text import TIMES, estimate, short, sim_label
from reports.questions.answer import judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
