"""What every figure is made of: a drawing with its words, panels, estimates with bars, and a key.

How figures look: one font with the text, one look per drafter, readable in grey and to every eye.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.common.bootstrap import Estimate
from analysis.speedup.findings import Findings
from calibration.common.errors import ReportError
from reports.page.text import sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 6.54
"""Width of the text block of the report (16.6 cm): figures are drawn to size, so 8 pt stays 8 pt."""

_MEASURED_WITH = "STIXGeneral"
_SHOWN_WITH = "'Libertinus Serif', 'STIXGeneral', serif"

RC: dict[str, Any] = {
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "errorbar.capsize": 2.0,
    "font.family": _MEASURED_WITH,
    "font.size": 8.5,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text; typst sets it in the font of the page
    "svg.hashsalt": "paceline",  # the same figure is the same bytes
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": "#444444",
    "xtick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.color": "#444444",
    "ytick.labelsize": 8,
    "ytick.major.width": 0.6,
}

INK = "#1a1a1a"
REFERENCE = "#666666"

# Colours of Okabe and Ito, told apart by every common kind of sight, in an order that alternates dark and light;
# marker and line style tell drafters apart where there is no colour.
_LOOKS: tuple[tuple[str, str, Any], ...] = (
    ("#1a1a1a", "o", "-"),
    ("#d55e00", "s", (0, (5, 1.5))),
    ("#0072b2", "^", (0, (3, 1, 1, 1))),
    ("#e69f00", "D", "-"),
    ("#009e73", "v", (0, (1, 1))),
    ("#56b4e9", "X", (0, (5, 1.5))),
    ("#cc79a7", "P", (0, (3, 1, 1, 1, 1, 1))),
    ("#777777", "*", "-"),
)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line style of the drafter at `index`; they repeat after eight."""
    colour, marker, line = _LOOKS[index % len(_LOOKS)]
    return {"color": colour, "marker": marker, "linestyle": line}


def to_svg(figure: Figure) -> str:
    """Give the figure as SVG: vectors only, text as text in the font of the page, no date."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue().replace(f"'{_MEASURED_WITH}'", _SHOWN_WITH)


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the look of the report."""
    import matplotlib as mpl
    import seaborn as sns

    style: dict[str, Any] = {**sns.axes_style("ticks"), **RC}
    with mpl.rc_context(style):  # type: ignore[arg-type]
        yield


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
