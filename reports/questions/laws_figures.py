"""One figure a law: the points and the fitted forms, their residuals, and their errors on left-out levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.laws import FormComparison, Law, Ranking
from reports.page.drawing import INK, REFERENCE, Drawing, bars, look, need, new_figure, to_svg
from reports.page.text import count, listing, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMS = ("log-linear", "power", "saturating", "logit")
_NULL = "constant"
_FAINT = "#b5b5b5"


def law_figure(law: Law) -> Drawing:
    """Draw `law`: its first curve with every form fitted to it, the others faintly; residuals; errors by form."""
    need(law.drawn.points, f"law-{law.key}", "points")
    figure, (fits, residuals, errors) = new_figure(1, 3, height=2.55, width_ratios=[1.3, 1.0, 1.0])
    _draw_fits(fits, law)
    _draw_residuals(residuals, law)
    _draw_errors(errors, law.comparison)
    fits.set_xlabel(law.x_name)
    handles, names = fits.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return Drawing(f"law-{law.key}", to_svg(figure), _caption(law), _alt(law), tuple(_records(law)))


def sample_label(law: Law) -> str:
    """End of a caption: how the points were come by and their sample size."""
    size = law.source if law.requests is None else f"n = {law.requests} requests, {law.source}"
    return f"[{law.kind}; {size}]"


def _caption(law: Law) -> str:
    others = f", the other {len(law.curves) - 1} in grey" if len(law.curves) > 1 else ""
    known = any(p.y.low is not None for p in law.drawn.points)
    interval, band = ("Bars: 95% intervals over requests. ", " (grey: the intervals)") if known else ("", "")
    return (
        f"{law.title}. Left: {law.y_name.lower()}, {short(law.drawn.name)}{others}, with the forms fitted to it"
        f"{_undrawn(law)}. {interval}Middle: residuals{band}. Right: error on left-out levels of the "
        f"{law.compared}, in percent of the mean; dark where the form is the best or cannot be told from it. "
        f"{sample_label(law)}"
    )


def _undrawn(law: Law) -> str:
    """Say which fits are not drawn because they left their form."""
    left = [fitted.form for fitted in law.drawn.fits if not fitted.converged]
    return f" ({listing(left)} left its form and is not drawn)" if left else ""


def _alt(law: Law) -> str:
    low, high = law.drawn.points[0], law.drawn.points[-1]
    return (
        f"Three panels: points and fitted curves of {law.title.lower()}, from {low.y.value or 0:.3g} at "
        f"{low.x:,.0f} to {high.y.value or 0:.3g} at {high.x:,.0f}; residuals by form; out-of-sample errors by form. "
        f"{law.comparison.interpolation.statement}. {law.comparison.extrapolation.statement}."
    )


def _draw_fits(ax: Axes, law: Law) -> None:
    for curve in law.curves[1:]:
        y = [p.y.value for p in curve.points]
        ax.plot([p.x for p in curve.points], y, color=_FAINT, lw=0.7, marker=".", ms=3, zorder=1)  # type: ignore[arg-type]
    points = law.drawn.points
    low, high = points[0].x, points[-1].x
    grid = np.geomspace(low, high, 80)
    for index, form in enumerate(_FORMS):
        fitted = law.drawn.fit(form)
        if fitted is not None and fitted.converged:
            ax.plot(grid, fitted.predict(grid), label=form, **_line(index))
    estimates = [p.y for p in points]
    ax.errorbar(
        [p.x for p in points],
        [p.y.value or 0.0 for p in points],
        yerr=bars(estimates),
        color=INK,
        marker="o",
        ls="none",
        ms=4,
        elinewidth=0.8,
        zorder=4,
    )
    ax.set_title("fits")
    _x_axis(ax, law)


def _draw_residuals(ax: Axes, law: Law) -> None:
    x = [p.x for p in law.drawn.points]
    if all(p.y.low is not None for p in law.drawn.points):
        below, above = bars([p.y for p in law.drawn.points])
        ax.fill_between(x, [-b for b in below], above, color="#e6e6e6", lw=0, zorder=0)
    for index, form in enumerate(_FORMS):
        fitted = law.drawn.fit(form)
        if fitted is not None and fitted.converged:
            ax.plot(x, fitted.residuals, ms=3.5, lw=0.9, **look(index + 1))
    ax.axhline(0, color=REFERENCE, lw=0.8)
    ax.set_title("residuals")
    _x_axis(ax, law)


def _draw_errors(ax: Axes, comparison: FormComparison) -> None:
    forms = [*_FORMS, _NULL]
    shown = {e.form for e in comparison.interpolation.errors} | {e.form for e in comparison.extrapolation.errors}
    rows = [form for form in forms if form in shown][::-1]
    for ranking, marker, aside in ((comparison.interpolation, "o", 0.14), (comparison.extrapolation, "D", -0.14)):
        good = _good(ranking)
        for y, form in enumerate(rows):
            for error in (e for e in ranking.errors if e.form == form):
                colour = INK if form in good else _FAINT
                face = colour if marker == "o" else "white"
                ax.plot(100 * error.relative, y + aside, marker=marker, color=colour, mfc=face, ms=5, ls="none")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlim(left=0)
    ax.grid(axis="y", visible=False)
    ax.set_title("left-out error (%)")
    ax.set_xlabel("filled: inner levels, open: beyond")
    if not rows:
        ax.text(0.5, 0.5, "too few levels", transform=ax.transAxes, ha="center", fontsize=8)


def _good(ranking: Ranking) -> set[str]:
    return {ranking.best or "", *ranking.alike}


def _line(index: int) -> dict[str, Any]:
    style = look(index + 1)
    return {"color": style["color"], "linestyle": style["linestyle"], "lw": 1.3}


def _x_axis(ax: Axes, law: Law) -> None:
    """A logarithmic axis with a few round labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    low, high = law.drawn.points[0].x, law.drawn.points[-1].x
    if high / low > 12:
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1.0,)))
    else:
        ax.set_xticks([low, float(np.sqrt(low * high)), high])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: brief(float(value))))
    ax.xaxis.set_minor_formatter(NullFormatter())


def brief(value: float) -> str:
    """A quantity in at most three digits: ``4.4 M``."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return count(value) if value >= 100 else f"{value:.3g}"


def _records(law: Law) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []

    def add(what: str, name: str, form: str | None, x: float | None, y: float | None, low: Any, high: Any) -> None:
        found.append(
            {"what": what, "of": name, "form": form, "x": x, "y": y, "low": low, "high": high, "kind": law.kind}
        )

    for curve in law.curves:
        for p in curve.points:
            add("point", curve.name, None, p.x, p.y.value, p.y.low, p.y.high)
    for fitted in law.drawn.fits:
        for p, residual in zip(law.drawn.points, fitted.residuals, strict=True):
            add("residual", law.drawn.name, fitted.form, p.x, residual, None, None)
    for ranking in (law.comparison.interpolation, law.comparison.extrapolation):
        for error in ranking.errors:
            add(f"{ranking.task} error", law.compared, error.form, None, error.relative, None, None)
    return found
