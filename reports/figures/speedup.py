"""Figures of simulated speed-up: against batch size, and as a map over draft length and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.findings import Findings
from analysis.speedup import BestLength, SpeedupCell
from reports.answer import gain_is_sure
from reports.figures.drawing import (
    Drawing,
    draw_line,
    label,
    label_below,
    label_beside,
    need,
    new_figure,
    or_nan,
    panels,
)
from reports.style import INK, to_svg
from reports.text import TIMES, estimate, short, sim_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def speedup_by_batch(findings: Findings) -> Drawing:
    """Speed-up at the best draft length against batch size, one line a drafter."""
    figure, axes = new_figure(1, 1, height=3.3)
    ax = axes[0]
    batches = list(findings.settings.batches)
    rows = [row for row in findings.best if row.domain is None]
    need(rows, "speedup-by-batch", "best draft lengths")
    count = len(findings.drafters)
    for index, drafter in enumerate(findings.drafters):
        mine = sorted((r for r in rows if r.drafter == drafter), key=lambda r: r.batch)
        if not mine:
            continue
        x = [r.batch * 2 ** (0.05 * (index - (count - 1) / 2)) for r in mine]
        draw_line(ax, x, [r.speedup for r in mine], index, short(drafter), hollow=[r.extrapolated for r in mine])
    head = findings.answer.headline.drafter
    band = _cost_band(findings, [r for r in rows if r.drafter == head])
    for row in rows:
        if row.drafter == head and row.speedup.high is not None:
            note = f"draft {row.speculative_tokens}"
            at = (row.batch, row.speedup.high)
            ax.annotate(note, at, (0, 4), textcoords="offset points", ha="center", fontsize=7.5, color=INK)
    ax.axhline(1, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=1, label="no speculation")
    right = batches[-1] * 1.22
    if band:
        low, high = [1 - e for _, e in band], [1 + e for _, e in band]
        edges = (
            [batches[0] / 1.22, *(b for b, _ in band[1:-1]), right] if len(band) > 1 else [batches[0] / 1.22, right]
        )
        low, high = (low, high) if len(band) > 1 else (low * 2, high * 2)
        ax.fill_between(edges, low, high, color="#e8e8e8", lw=0, zorder=0, label="within the error of the costs")
    _batch_axis(ax, batches, right)
    ax.set_ylabel(f"Speed-up over no speculation ({TIMES})", rotation_mode="anchor")
    ax.set_ylim(0, max(1.2, 1.12 * max((r.speedup.high or r.speedup.value or 1) for r in rows)))
    figure.legend(loc="outside lower center", ncols=4)
    best = findings.answer.headline
    return Drawing(
        "speedup-by-batch",
        to_svg(figure),
        f"Throughput relative to no speculation, each drafter at its best draft length for that batch size "
        f"(written for {short(head)}). Bars: 95% intervals over requests. Grey: gains and losses smaller than the "
        "held-out error of the fitted costs. Hollow marks: costs extrapolated. "
        f"{label(findings, sim_label(findings))}",
        f"Line chart of speed-up against batch size for {count} drafters. "
        f"At batch {best.batch} the best is {short(head)} with {estimate(best.speedup)} times; "
        "the line at 1 marks no speculation.",
    )


def speedup_map(findings: Findings) -> Drawing:
    """Speed-up over draft length and batch size, one annotated map a drafter."""
    import numpy as np
    import seaborn as sns

    cells = {(c.drafter, c.draft_tokens, c.batch): c for c in findings.speedup if c.domain is None}
    need(cells, "speedup-map", "speed-up cells")
    lengths, batches = findings.settings.draft_tokens, findings.settings.batches
    high = max(c.speedup.value or 0 for c in cells.values())
    figure, axes = panels(findings, row_height=0.55 + 0.2 * len(lengths), sharey=True)
    for drafter, ax in zip(findings.drafters, axes, strict=False):
        grid = np.array([[_cell(cells.get((drafter, k, b))) for b in batches] for k in lengths])
        sns.heatmap(
            grid,
            ax=ax,
            annot=np.array([[_cell_text(cells.get((drafter, k, b))) for b in batches] for k in lengths]),
            fmt="",
            annot_kws={"fontsize": 7.5},
            cmap="cividis",
            vmin=0,
            vmax=max(1.0, high),
            cbar=False,
            linewidths=0.5,
            linecolor="white",
            xticklabels=[str(b) for b in batches],
            yticklabels=[str(k) for k in lengths],
        )
        for row, k in enumerate(lengths):
            for column, b in enumerate(batches):
                cell = cells.get((drafter, k, b))
                if cell is not None and cell.speedup.low is not None and cell.speedup.low > 1:
                    _frame(ax, column, row, sure=gain_is_sure(findings, cell))
        ax.set_title(short(drafter))
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.tick_params(axis="y", rotation=0)
    label_below(axes, "Batch size")
    label_beside(axes, "Draft length")
    return Drawing(
        "speedup-map",
        to_svg(figure),
        "Speed-up over no speculation by draft length and batch size. Lighter is faster. A frame marks cells whose "
        "95% interval lies above 1, dashed where the gain is smaller than the held-out error of the costs; a star, "
        f"costs extrapolated. {label(findings, sim_label(findings))}",
        f"Annotated maps of speed-up, one for each of {len(findings.drafters)} drafters, with draft lengths "
        f"{lengths[0]} to {lengths[-1]} as rows and batch sizes {batches[0]} to {batches[-1]} as columns.",
    )


def _cost_band(findings: Findings, rows: Sequence[BestLength]) -> list[tuple[int, float]]:
    """(batch, relative error of the costs) of the runs behind `rows`; empty where costs were not fitted."""
    runs = [findings.run(row.drafter, row.speculative_tokens, row.batch) for row in rows]
    return sorted((run.batch, run.cost_error) for run in runs if run.cost_error is not None)


def _batch_axis(ax: Axes, batches: Sequence[int], right: float) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.set_xlim(batches[0] / 1.22, right)
    ax.minorticks_off()
    ax.set_xlabel("Batch size (requests decoded together)")


def _cell(cell: Any) -> float:
    return math.nan if cell is None else or_nan(cell.speedup.value)


def _cell_text(cell: Any) -> str:
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
