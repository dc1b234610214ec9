"""What every figure is made of: a drawing with its words, panels, estimates with bars, and a key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.common.bootstrap import Estimate
from analysis.speedup.findings import Findings
from calibration.common.errors import ReportError
from reports.page.style import WIDTH_INCHES, look
from reports.page.text import sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _across(count: int) -> int:
    """Panels in a row: two for four panels, three for more."""
    return 2 if count == 4 else min(3, count)


@dataclass(frozen=True)
class Drawing:
    """One figure: its file name without ending, SVG, caption (with n and label) and alt text.

    ``data`` is what it shows, one record a mark, all with the same keys: the rows of the CSV file beside it.
    """

    name: str
    svg: str
    caption: str
    alt: str
    data: tuple[Mapping[str, Any], ...] = ()


def record(name: str, value: Estimate) -> dict[str, float | int | None]:
    """Give an estimate as columns of a figure's data: the value, the ends of its 95% interval, its requests."""
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high, "requests": value.requests}


def need(data: Any, figure: str, what: str) -> None:
    """Refuse to draw `figure` from nothing."""
    if not data:
        raise ReportError(f"figure {figure}: needs {what}, the findings hold none")


def label(findings: Findings, how: str) -> str:
    """End of a caption: how the numbers were come by, and the sample size."""
    return f"[{how}; {sample(findings)}, {len(findings.domains)} domains]"


def new_figure(rows: int, columns: int, *, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the text, `height` inches high, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def panels(findings: Findings, *, row_height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """One panel a drafter, two or three in a row; panels left over stay empty."""
    count = len(findings.drafters)
    columns = _across(count)
    rows = math.ceil(count / columns)
    figure, axes = new_figure(rows, columns, height=0.55 + rows * row_height, **shared)
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def draw_line(
    ax: Axes, x: Sequence[float], y: Sequence[Estimate], index: int, label: str | None, hollow: Sequence[bool] = ()
) -> None:
    """Draw estimates with their intervals in the look of drafter `index`; hollow marks where asked."""
    style = look(index)
    values = [or_nan(e.value) for e in y]
    ax.errorbar(x, values, yerr=bars(y), elinewidth=0.8, label=label, **style)
    for at, value, empty in zip(x, values, hollow, strict=False):
        if empty:
            ax.plot(at, value, marker=style["marker"], mfc="white", mec=style["color"], ls="none", zorder=5)


def bars(values: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the bars below and above each estimate; 0 where there is no interval."""
    low = [(e.value or 0) - e.low if e.low is not None else 0.0 for e in values]
    high = [e.high - (e.value or 0) if e.high is not None else 0.0 for e in values]
    return [[max(0.0, v) for v in low], [max(0.0, v) for v in high]]


def or_nan(value: float | None) -> float:
    """A gap in a line where there is no value."""
    return math.nan if value is None else value


def label_below(axes: Sequence[Axes], label: str) -> None:
    """Label the x axis of the lowest panel of every column."""
    for ax in axes[-_across(len(axes)) :]:
        ax.set_xlabel(label)


def label_beside(axes: Sequence[Axes], label: str) -> None:
    """Label the y axis of the first panel of every row."""
    for ax in axes[:: _across(len(axes))]:
        ax.set_ylabel(label, rotation_mode="anchor")


def add_key(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A legend below the panels, drawn in neutral ink because each panel has its drafter's colour."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=text, **style) for text, style in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(entries))
