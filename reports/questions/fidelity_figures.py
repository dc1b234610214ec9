"""Figures of fidelity: predicted against measured, signed errors beside the engines' spread, and crossovers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from analysis.fidelity.table import QUANTITIES, Compared, Condition, Crossover, Fidelity, errors_of
from reports.page.drawing import INK, REFERENCE, Drawing, look, need, new_figure, styled, to_svg
from reports.page.text import TIMES, listing, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED = ("output_throughput", "p99_tpot_ms", "mean_ttft_ms", "spec_decode_acceptance_length", "speedup", "step_ms")
_BAND = 0.10
"""Relative width of the grey band around agreement."""
_MOST_PANELS = 9


def draw_fidelity(fidelity: Fidelity) -> dict[str, Drawing]:
    """Draw every figure that `fidelity` has data for, by name; `ReportError` where it has no condition at all."""
    need(fidelity.conditions, "fidelity", "conditions")
    painters: list[Callable[[Fidelity], Drawing]] = [predicted_measured, signed_errors]
    if fidelity.crossovers:
        painters.append(crossovers)
    with styled():
        return {drawing.name: drawing for drawing in (painter(fidelity) for painter in painters)}


def predicted_measured(fidelity: Fidelity) -> Drawing:
    """Predicted against measured, one panel a quantity, one colour a source; hollow where a fit has seen it."""
    shown = [name for name in PLOTTED if any(c.of(name) for c in fidelity.conditions)]
    need(shown, "fidelity-predicted-measured", "compared quantities")
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = new_figure(rows, columns, height=0.6 + 2.1 * rows)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    for name, ax in zip(shown, axes, strict=False):
        values = [v for c in fidelity.conditions if (one := c.of(name)) for v in (one.measured, one.predicted)]
        span = (min(values) / 1.15, max(values) * 1.15)
        ax.fill_between(span, [v * (1 - _BAND) for v in span], [v * (1 + _BAND) for v in span], color="#eeeeee", lw=0)
        ax.plot(span, span, color=REFERENCE, lw=0.9, ls=(0, (4, 2)))
        for index, source in enumerate(fidelity.sources):
            for role in ("fit", "held-out"):
                _marks(
                    ax, [c for c in fidelity.conditions if c.source == source.name and c.role == role], name, index
                )
        ax.set(xscale="log", yscale="log", xlim=span, ylim=span)
        _few_ticks(ax, span)
        label, unit = QUANTITIES[name]
        ax.set_title(f"{label.split(',')[0]}, {unit}")
        ax.set_xlabel("Measured")
    for ax in axes[::columns]:
        ax.set_ylabel("Predicted", rotation_mode="anchor")
    _source_key(figure, fidelity)
    held = len(fidelity.held_out())
    worst = errors_of("output_throughput", fidelity.held_out())
    told = "" if worst is None else f" The median error of throughput is {100 * worst.median:.1f}%."
    return Drawing(
        "fidelity-predicted-measured",
        to_svg(figure),
        f"Predicted against measured; filled marks: {held} held-out conditions, hollow ones: conditions that a fit "
        f"has seen. On the dashed line both agree; the grey band is {100 * _BAND:.0f}% to either side. "
        "[measured, simulated]",
        f"Scatter plots of predicted against measured values of {len(shown)} quantities on logarithmic axes.{told}",
        data=tuple(_compared(c, one) for c in fidelity.conditions for name in shown if (one := c.of(name))),
    )


def _compared(condition: Condition, one: Compared) -> dict[str, Any]:
    """One quantity of one condition as a row of data."""
    return {
        "source": condition.source,
        "condition": condition.name,
        "role": condition.role,
        "repeats": condition.repeats,
        "quantity": one.name,
        "unit": QUANTITIES[one.name][1],
        "measured": one.measured,
        "predicted": one.predicted,
        "error": one.error,
        "spread": one.spread,
    }


def _marks(ax: Axes, conditions: Sequence[Condition], name: str, index: int) -> None:
    found = [(c, one) for c in conditions if (one := c.of(name)) is not None]
    style = look(index)
    for condition, one in found:
        filled = style["color"] if condition.role == "held-out" else "none"
        ax.plot(one.measured, one.predicted, ls="none", marker=style["marker"], mfc=filled, mec=style["color"], ms=4)


def _few_ticks(ax: Axes, span: tuple[float, float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    wide = span[1] / span[0] > 12
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)) if wide else MaxNLocator(4))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _source_key(figure: Any, fidelity: Fidelity) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="none", marker=look(i)["marker"], color=look(i)["color"], label=short(source.title, 40))
        for i, source in enumerate(fidelity.sources)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def signed_errors(fidelity: Fidelity) -> Drawing:
    """Signed error of every held-out condition with the engine's own spread as a bar, by source."""
    names = {s.name: _main_quantity(fidelity, s.name) for s in fidelity.sources}
    rows = [
        (i, c, one)
        for i, s in enumerate(fidelity.sources)
        for c in fidelity.held_out(s.name)
        if (one := c.of(names[s.name])) is not None
    ]
    need(rows, "fidelity-errors", "held-out conditions")
    figure, (ax,) = new_figure(1, 1, height=2.9)
    for at, (index, _, one) in enumerate(rows):
        style = look(index)
        spread = 100 * (one.spread or 0.0)
        ax.errorbar(at, 100 * one.error, yerr=spread, marker=style["marker"], color=style["color"], ls="none", ms=4)
    ax.axhline(0, color=INK, lw=0.9)
    for level in (-10, -3, 3, 10):
        ax.axhline(level, color=REFERENCE, lw=0.6, ls=(0, (4, 2)), zorder=0)
    ax.set_xticks([])
    ax.set_xlabel("Held-out condition")
    ax.set_ylabel("Predicted over measured, %", rotation_mode="anchor")
    _source_key(figure, fidelity)
    signed = [one.error for *_, one in rows]
    used = listing(sorted({QUANTITIES[one.name][0] for _, _, one in rows}))
    return Drawing(
        "fidelity-errors",
        to_svg(figure),
        f"Signed error of each held-out condition ({used}); bars: half the range of the engine's repeats, the "
        f"floor of any prediction. Dashed lines: 3 and 10%. [measured, simulated; n = {len(rows)} conditions]",
        f"Signed relative errors of {len(rows)} held-out conditions, between "
        f"{100 * min(signed):.1f} and {100 * max(signed):.1f} per cent.",
        data=tuple(_compared(c, one) for _, c, one in rows),
    )


def _main_quantity(fidelity: Fidelity, source: str) -> str:
    """Give what the conditions of a source are judged by first: the first quantity that most of them have."""
    held = fidelity.held_out(source)
    return max(
        ("output_throughput", "speedup", "mean_tpot_ms", "step_ms"), key=lambda n: sum(1 for c in held if c.of(n))
    )


def crossovers(fidelity: Fidelity) -> Drawing:
    """Speed-up against batch size, measured and predicted, one panel a drafter and draft length."""
    shown = fidelity.crossovers[:_MOST_PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = new_figure(rows, columns, height=0.7 + 1.75 * rows)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    for crossing, ax in zip(shown, axes, strict=False):
        _crossing(ax, crossing, [s.name for s in fidelity.sources].index(crossing.source))
    for ax in axes[::columns]:
        ax.set_ylabel(f"Speed-up ({TIMES})", rotation_mode="anchor")
    for ax in axes[max(0, len(shown) - columns) : len(shown)]:
        ax.set_xlabel("Batch size")
    _line_key(figure)
    left = len(fidelity.crossovers) - len(shown)
    within = sum(c.steps_apart <= 1 for c in fidelity.crossovers)
    return Drawing(
        "fidelity-crossovers",
        to_svg(figure),
        f"Speed-up over no speculation at the same batch size, measured and predicted; where a line falls below 1, "
        f"speculation stops paying. {within} of {len(fidelity.crossovers)} predicted crossovers lie within one grid "
        f"step of the measured one.{f' {left} more are in the data.' if left else ''} [measured, simulated]",
        f"Line charts of measured and predicted speed-up against batch size for {len(shown)} drafters and lengths.",
        data=tuple(
            {"source": c.source, "drafter": c.drafter, "draft_tokens": c.draft_tokens, "batch": batch}
            | {"measured_speedup": measured, "predicted_speedup": predicted}
            for c in fidelity.crossovers
            for batch, measured, predicted in zip(c.grid, c.measured_speedups, c.predicted_speedups, strict=True)
        ),
    )


def _crossing(ax: Axes, crossing: Crossover, index: int) -> None:
    style = look(index)
    ax.plot(crossing.grid, crossing.measured_speedups, marker=style["marker"], color=style["color"], ls="-")
    ax.plot(
        crossing.grid,
        crossing.predicted_speedups,
        marker=style["marker"],
        mfc="white",
        color=style["color"],
        ls=(0, (4, 2)),
    )
    ax.axhline(1, color=INK, lw=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(crossing.grid, [str(batch) for batch in crossing.grid])
    ax.minorticks_off()
    ax.set_title(plain(f"{short(crossing.drafter, 20)}, draft {crossing.draft_tokens}"), fontsize=8.5)


def _line_key(figure: Any) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[
            Line2D([], [], color=INK, ls="-", marker="o", label="measured"),
            Line2D([], [], color=INK, ls=(0, (4, 2)), marker="o", mfc="white", label="predicted"),
        ],
        loc="outside lower center",
        ncols=2,
    )
