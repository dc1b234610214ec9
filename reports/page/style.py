"""How figures look: one font with the text, one look per drafter, readable in grey and to every eye."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
