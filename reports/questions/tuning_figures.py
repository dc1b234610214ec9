"""Figures of tuning: the objective around the best setting, and the best draft length by batch size."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.tuning.findings import BatchLength, SensitivityPoint, TuneFindings
from analysis.tuning.hybrids import MATCH
from reports.page.drawing import INK, Drawing, bars, draw_line, look, need, new_figure, or_nan, to_svg
from reports.page.text import plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SERIES = 6
"""Lines in one panel; more would not be told apart."""


def sensitivity(findings: TuneFindings) -> Drawing:
    """The objective along each dimension of the search, relative to the best."""
    points = findings.sensitivity
    need(points, "tuning-sensitivity", "candidates on an axis")
    dimensions = list(dict.fromkeys(point.dimension for point in points))
    columns = min(2, len(dimensions))
    rows = -(-len(dimensions) // columns)
    figure, axes = new_figure(rows, columns, height=0.3 + 2.2 * rows)
    shown: list[SensitivityPoint] = []
    for dimension, ax in zip(dimensions, axes, strict=False):
        mine = [point for point in points if point.dimension == dimension]
        shown += _panel(ax, dimension, mine)
    for ax in axes[len(dimensions) :]:
        ax.set_axis_off()
    axes[0].set_ylabel("Relative to the best (1 is as good)", rotation_mode="anchor")
    left_out = len({(p.dimension, p.series) for p in points}) - len({(p.dimension, p.series) for p in shown})
    more = f" The {left_out} worst lines are left out." if left_out else ""
    copies = (
        " Copy k, else m: k tokens by lookup after such a match, else m by the model." if MATCH in dimensions else ""
    )
    best = plain(findings.best.name)
    return Drawing(
        "tuning-sensitivity",
        to_svg(figure),
        f"{findings.goal.objective.capitalize()} of single settings relative to the best found, {best}, on the "
        f"same seeds; above the line is better. Bars: 95% intervals of the paired ratio.{copies}{more} "
        f"{_label(findings, findings.plan.rungs[0].replications)}",
        f"Line charts of {findings.goal.objective} relative to the best setting, one panel for each of "
        f"{', '.join(dimensions)}. The best setting is {best}.",
        tuple(_record(point) for point in shown),
    )


def _panel(ax: Axes, dimension: str, points: Sequence[SensitivityPoint]) -> list[SensitivityPoint]:
    """Draw the best lines of one dimension; give their points."""
    series: dict[str, list[SensitivityPoint]] = {}
    for point in points:
        series.setdefault(point.series, []).append(point)
    top = sorted(series, key=lambda name: -max(p.ratio.value or 0.0 for p in series[name]))[:_SERIES]
    shown = []
    for index, name in enumerate(top):
        line = sorted(series[name], key=lambda point: point.at)
        draw_line(ax, [point.at for point in line], [point.ratio for point in line], index, short(name, 22))
        shown += line
    ax.axhline(1, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=1)
    ax.set_xlabel(dimension[0].upper() + dimension[1:])
    ax.legend(fontsize=7, loc="upper center", ncols=2, handlelength=1.8, columnspacing=0.9, handletextpad=0.4)
    ax.set_ylim(0, 1.12 * _room(top) * max(1.0, *(point.ratio.value or 0.0 for point in shown)))
    return shown


def _room(lines: Sequence[str]) -> float:
    """Space above the data for a key of so many lines, in two columns."""
    return 1.0 + 0.13 * -(-len(lines) // 2)


def lengths_by_batch(findings: TuneFindings) -> Drawing:
    """Speed-up over draft length, one line a batch size, for the leading drafter; the best length of each marked."""
    need(findings.batch_lengths, "tuning-batches", "a grid over batch sizes")
    drafter = findings.batch_lengths[0].drafter
    rows = [row for row in findings.batch_lengths if row.drafter == drafter]
    figure, (ax,) = new_figure(1, 1, height=2.7)
    sizes = list(dict.fromkeys(row.batch for row in rows))
    for index, batch in enumerate(sizes):
        line = sorted((row for row in rows if row.batch == batch), key=lambda row: row.draft_tokens)
        _line(ax, line, index)
    ax.axhline(1, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=1)
    ax.set_xlabel("Draft length (tokens, without the bonus token; 0: no speculation)")
    ax.set_ylabel("Speed-up over no speculation", rotation_mode="anchor")
    ax.set_ylim(0, 1.12 * max(row.speedup for row in rows))
    figure.legend(loc="outside lower center", ncols=min(4, len(sizes)), title="Batch size")
    best = ", ".join(f"{row.draft_tokens} at {row.batch}" for row in rows if row.chosen)
    return Drawing(
        "tuning-batches",
        to_svg(figure),
        f"Throughput of {short(drafter)} by draft length with the batch kept full, relative to no speculation at "
        f"that batch, from one run each: no intervals. Ringed: the fastest length of each batch, from which the "
        f"lengths by batch size are taken. {_label(findings, 1, full=True)}",
        f"Line chart of speed-up against draft length for {short(drafter)} at batch sizes {sizes[0]} to {sizes[-1]}; "
        f"the fastest lengths are {best}.",
        tuple(
            {
                "drafter": row.drafter,
                "batch": row.batch,
                "draft_tokens": row.draft_tokens,
                "speedup": row.speedup,
                "fastest": row.chosen,
            }
            for row in rows
        ),
    )


def _line(ax: Axes, line: Sequence[BatchLength], index: int) -> None:
    style = look(index)
    x, y = [row.draft_tokens for row in line], [row.speedup for row in line]
    ax.plot(x, y, label=str(line[0].batch), **style)
    for row in line:
        if row.chosen:
            ax.plot(row.draft_tokens, row.speedup, "o", mfc="none", mec=style["color"], ms=10, mew=1.1)


def contenders(findings: TuneFindings) -> Drawing:
    """The candidates of the final stage with their intervals, the best first, and the oracles above them."""
    rows = [*findings.oracles, *_finalists(findings)]
    figure, (ax,) = new_figure(1, 1, height=0.8 + 0.26 * len(rows))
    records = []
    for place, row in enumerate(reversed(rows)):
        oracle = not hasattr(row, "status")
        best = row.name == findings.best.name
        style = look(0 if best else 2 if oracle else 7)
        value = row.value
        ax.errorbar(
            [or_nan(value.value)],
            [place],
            xerr=bars([value]),
            elinewidth=1.0,
            color=style["color"],
            marker="D" if oracle else "o",
            mfc="white" if oracle else style["color"],
            ls="none",
        )
        records.append(
            {
                "name": row.name,
                "oracle": oracle,
                "value": value.value,
                "low": value.low,
                "high": value.high,
                "unit": findings.goal.unit,
            }
        )
    ax.set_yticks(range(len(rows)), [short(row.name, 46) for row in reversed(rows)])
    ax.set_xlabel(findings.goal.unit[0].upper() + findings.goal.unit[1:])
    better = "right" if findings.goal.larger_is_better else "left"
    return Drawing(
        "tuning-contenders",
        to_svg(figure),
        f"Settings of the final stage, the best first, below the oracles (hollow), which see what no engine knows. "
        f"Further to the {better} is better. Bars: 95% intervals, of each setting by itself; differences are "
        f"paired and much surer. {_label(findings, findings.best.replications)}",
        f"Dot plot of {findings.goal.objective} for {len(rows)} settings and oracles; the best setting is "
        f"{plain(findings.best.name)} with {findings.best.value.text} {findings.goal.unit}.",
        tuple(reversed(records)),
    )


def _finalists(findings: TuneFindings) -> list[Any]:
    return [one for one in findings.candidates if one.status in ("best", "indistinct", "worse", "misses the SLO")]


def _label(findings: TuneFindings, seeds: int, *, full: bool = False) -> str:
    """How the numbers were come by, and their sample size; `full`: batches kept full, a load of their own."""
    plan = findings.plan
    load = "" if full else " as the scenario says" if plan.requests is None else f" of {plan.requests} requests"
    several = "1 seed" if seeds == 1 else f"up to {seeds} seeds{load}"
    return f"[simulated; {several}, n = {plan.recorded} recorded requests]"


def _record(point: SensitivityPoint) -> Mapping[str, Any]:
    return {
        "dimension": point.dimension,
        "series": point.series,
        "at": point.at,
        "relative_to_best": point.ratio.value,
        "low": point.ratio.low,
        "high": point.ratio.high,
        "best": point.is_best,
    }


def drawings(findings: TuneFindings) -> tuple[Drawing, ...]:
    """Give the figures that the findings have data for."""
    found = [contenders(findings)]
    if findings.sensitivity:
        found.append(sensitivity(findings))
    if findings.batch_lengths:
        found.append(lengths_by_batch(findings))
    return tuple(found)


def figure_files(findings: TuneFindings) -> dict[str, str]:
    """Give every figure as SVG and its data as CSV, by file name."""
    from reports.page.drawing import styled

    files = {}
    with styled():
        for drawing in drawings(findings):
            files[f"{drawing.name}.svg"] = drawing.svg
            out = io.StringIO()
            rows = csv.DictWriter(out, list(drawing.data[0]), lineterminator="\n")
            rows.writeheader()
            rows.writerows(drawing.data)
            files[f"{drawing.name}.csv"] = out.getvalue()
    return files
