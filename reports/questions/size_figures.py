"""Figures of the size question: the curves, what a draft step costs, and optima that disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.common.bootstrap import Estimate
from analysis.size.findings import (
    Extrapolation,
    MeasuredFamily,
    Optimum,
    SizeCurve,
    SizePoint,
    common_region,
    parameters_text,
    share_text,
)
from reports.page.drawing import INK, REFERENCE, Drawing, bars, draw_line, look, need, new_figure, or_nan, to_svg
from reports.page.text import TIMES, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLAT = "#ececec"
_BAND = "#c9dcec"
_WIDE = "#eef3f8"


def size_curves(family: MeasuredFamily) -> Drawing:
    """Speed-up against the share of parameters: a row a device, a panel a batch size, the flat region shaded."""
    curves = [c for c in family.curves if c.domain is None]
    need(curves, "size-curves", "curves of a family")
    devices, batches = _order(c.device for c in curves), sorted({c.batch for c in curves})
    height = 0.7 + 1.75 * len(devices)
    figure, axes = new_figure(len(devices), len(batches), height=height, sharex=True, sharey="row")
    for index, device in enumerate(devices):
        for column, batch in enumerate(batches):
            ax = axes[index * len(batches) + column]
            curve = _one(curves, device, batch)
            _shade(ax, curve.spot.low.value, curve.spot.high.value)
            _draw_curve(ax, curve.points, 0, "step times as they are")
            _draw_curve(ax, _one(family.proportional, device, batch).points, 1, "in proportion to parameters")
            ax.axhline(1, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=1, label="no speculation")
            ax.set_title(f"{short(device, 20)}, batch {batch}")
            _share_axis(ax, [p.share for p in curve.points], last=index == len(devices) - 1)
            if column == 0:
                ax.set_ylabel(f"Speed-up ({TIMES})", rotation_mode="anchor")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    main = curves[0]
    label = f"[{_labels(curves)}; n = {family.requests} requests, {len(family.domains)} domains]"
    return Drawing(
        "size-curves",
        to_svg(figure),
        f"Speed-up of drafters for {short(family.verifier)} at the best draft length, against their parameters as a "
        f"share of the verifier's (embedding and head left out of both). Grey: within {main.spot.within:.0%} of the "
        "best size. Orange: the same acceptance if a draft step cost its share of a verifier step. Bars: 95% "
        f"intervals over requests. {label}",
        f"Line charts of speed-up against drafter size, one panel for each of {len(devices)} devices and "
        f"{len(batches)} batch sizes. On {main.device} at batch {main.batch} the best size has "
        f"{share_text(main.spot.best.value)} of the verifier's parameters.",
        tuple(_point_row(c, p) for c in (*curves, *family.proportional) for p in c.points),
    )


def large_curves(found: Extrapolation) -> Drawing:
    """Speed-up against parameters for the large verifier, with bands: a row a place, a panel a batch size."""
    need(found.scale, "size-curves-large", "extrapolated curves")
    devices, batches = _order(c.device for c in found.scale), sorted({c.batch for c in found.scale})
    height = 0.7 + 1.85 * len(devices)
    top = 1.4 * max(p.speedup.high or 0.0 for c in found.priced for p in c.points)
    figure, axes = new_figure(len(devices), len(batches), height=height, sharex=True, sharey=True)
    for index, device in enumerate(devices):
        for column, batch in enumerate(batches):
            ax = axes[index * len(batches) + column]
            _draw_wide(ax, _one(found.scale, device, batch))
            _draw_band(ax, _one(found.priced, device, batch), found.depth_layers)
            if found.published:
                _draw_published(ax, _one(found.published, device, batch).points)
            ax.axhline(1, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=1, label="no speculation")
            ax.set_title(f"{device}, batch {batch}")
            ax.set_ylim(0, top)
            if column == 0:
                ax.set_ylabel(f"Speed-up ({TIMES})", rotation_mode="anchor")
            if index == len(devices) - 1:
                ax.set_xlabel("Parameters of the drafter")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    main = found.priced[0]
    return Drawing(
        "size-curves-large",
        to_svg(figure),
        f"Speed-up of drafters for {found.verifier}, at {found.context_tokens} cached tokens a sequence. Line and "
        f"inner band: median and 95% of scenarios by the prices alone, made-up drafters of {found.depth_layers} "
        "layers; outer band, cut at the frame: with the error of engines that published measurements show. Marks: "
        "published shapes with its vocabulary, their layers beside. Grey: within "
        f"{main.spot.within:.0%} of the best in most scenarios, by the prices alone. "
        f"[extrapolated; n = {found.behind}]",
        "Line charts with bands of extrapolated speed-up against drafter parameters from "
        f"{parameters_text(main.points[0].parameters)} to {parameters_text(main.points[-1].parameters)}, one panel "
        f"for each of {len(devices)} device groups and {len(batches)} batch sizes.",
        tuple(_point_row(c, p) for c in (*found.scale, *found.priced, *found.published) for p in c.points),
    )


def step_costs(family: MeasuredFamily) -> Drawing:
    """What a draft step costs against the share of parameters, beside what proportion would have it."""
    curves = [c for c in family.curves if c.domain is None]
    need(curves, "size-step-costs", "curves of a family")
    devices, batches = _order(c.device for c in curves), sorted({c.batch for c in curves})
    figure, axes = new_figure(1, len(devices), height=2.7, sharey=True)
    for ax, device in zip(axes, devices, strict=True):
        for index, batch in enumerate(batches):
            points = _one(curves, device, batch).points
            ax.plot([p.share for p in points], [p.cost_ratio for p in points], label=f"batch {batch}", **look(index))
        shares = [p.share for p in curves[0].points]
        ax.plot(shares, shares, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), label="in proportion", zorder=1)
        _share_axis(ax, shares, last=True)
        ax.set_yscale("log")
        ticks = [0.01, 0.03, 0.1, 0.3]
        ax.set_yticks(ticks, [f"{100 * t:g}%" for t in ticks])
        ax.minorticks_off()
        ax.set_title(short(device, 30))
    axes[0].set_ylabel("Draft step / plain verifier step", rotation_mode="anchor")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    sizes = len(curves[0].points)
    return Drawing(
        "size-step-costs",
        to_svg(figure),
        "Seconds of a draft step over those of a plain verifier step of the same batch, against the share of "
        "parameters. The LM head, launches and the host set a floor that parameters do not see. "
        f"[{_costs_label(curves)}; n = {sizes} drafters]",
        f"Line charts of the cost of a draft step against drafter size on {len(devices)} devices, with a dashed line "
        "for a cost in proportion to parameters, which lies far below the small drafters.",
        tuple(
            {"device": c.device, "batch": c.batch, "share": p.share, "cost_ratio": p.cost_ratio, "label": c.label}
            for c in curves
            for p in c.points
        ),
    )


def optima(found: Extrapolation, published: Sequence[Optimum]) -> Drawing:
    """The best size under every view of latency, as one part in so many, beside published optima."""
    need(found.assumptions, "size-optima", "views of latency")
    count = len(found.assumptions) + len(published)
    figure, (ax,) = new_figure(1, 1, height=0.75 + 0.27 * count)
    rows: list[Mapping[str, Any]] = []
    names = []
    for row, view in enumerate(found.assumptions):
        style = look(row) | {"linestyle": "none"}
        values = [_as_share(view.best, found.verifier_parameters)]
        ax.errorbar([or_nan(values[0].value)], [-row], xerr=bars(values), elinewidth=1.0, **style)
        names.append(view.name)
        rows.append(_optimum_row(view.name, "extrapolated", values[0]))
    for row, optimum in enumerate(published, start=len(found.assumptions)):
        ax.plot([optimum.share], [-row], marker="D", mfc="white", mec=INK, ls="none")
        names.append(f"{optimum.source.split(' (')[0]}: {optimum.drafter}")
        rows.append(_optimum_row(optimum.source, "published", Estimate(optimum.share, None, None, 0)))
    ax.axhline(0.5 - len(found.assumptions), color=REFERENCE, lw=0.6)
    ax.set_yticks([-i for i in range(count)], [short(name, 46) for name in names])
    ax.set_xscale("log")
    ticks = [1 / 2000, 1 / 1000, 1 / 500, 1 / 200, 1 / 100, 1 / 50, 1 / 20, 1 / 10]
    ax.set_xticks(ticks, [f"1/{round(1 / t)}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("Best drafter as a share of the verifier's parameters")
    first = found.assumptions[0]
    return Drawing(
        "size-optima",
        to_svg(figure),
        f"Best size of a drafter under {len(found.assumptions)} views of what a draft step costs, all with the same "
        f"acceptance, for {found.verifier} on {found.scale[0].device} at batch 1 (median and 95% of scenarios), and "
        f"optima that others published. [extrapolated and published; n = {found.behind}, {len(published)} published "
        "optima]",
        f"Best sizes with intervals under {len(found.assumptions)} views of latency, from "
        f"{parameters_text(first.best.value)} in proportion to parameters upwards, above {len(published)} published "
        "optima.",
        tuple(rows),
    )


def _order(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _one(curves: Sequence[SizeCurve], device: str, batch: int) -> SizeCurve:
    return next(c for c in curves if (c.device, c.batch, c.domain) == (device, batch, None))


def _labels(curves: Sequence[SizeCurve]) -> str:
    found = {c.device: c.label for c in curves}
    return ", ".join(f"{label} on {device}" for device, label in found.items())


def _costs_label(curves: Sequence[SizeCurve]) -> str:
    kinds = {c.device: "extrapolated" if c.label == "extrapolated" else "fitted" for c in curves}
    return ", ".join(f"{kind} on {device}" for device, kind in kinds.items())


def _shade(ax: Axes, low: float | None, high: float | None) -> None:
    if low is not None and high is not None:
        ax.axvspan(low, high, color=_FLAT, lw=0, zorder=0)


def _draw_curve(ax: Axes, points: Sequence[SizePoint], index: int, name: str) -> None:
    draw_line(ax, [p.share for p in points], [p.speedup for p in points], index, name)


def _share_axis(ax: Axes, shares: Sequence[float], *, last: bool) -> None:
    ax.set_xscale("log")
    ax.set_xlim(shares[0] / 1.35, shares[-1] * 1.35)
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if shares[0] / 1.35 <= t <= shares[-1] * 1.35]
    ax.set_xticks(ticks, [f"{100 * t:g}%" for t in ticks])
    ax.minorticks_off()
    if last:
        ax.set_xlabel("Share of the verifier's parameters")


def _draw_wide(ax: Axes, curve: SizeCurve) -> None:
    sizes = [p.parameters for p in curve.points]
    low, high = ([or_nan(getattr(p.speedup, end)) for p in curve.points] for end in ("low", "high"))
    ax.fill_between(sizes, low, high, color=_WIDE, lw=0, zorder=0, label="with engines' error")


def _draw_band(ax: Axes, curve: SizeCurve, layers: int) -> None:
    sizes = [p.parameters for p in curve.points]
    _shade(ax, *common_region(curve.points, curve.spot))
    low, high = ([or_nan(getattr(p.speedup, end)) for p in curve.points] for end in ("low", "high"))
    ax.fill_between(sizes, low, high, color=_BAND, lw=0, zorder=1, label="95%, prices alone")
    middle = [or_nan(p.speedup.value) for p in curve.points]
    ax.plot(sizes, middle, color=look(2)["color"], label=f"{layers} layers", zorder=3)
    ax.set_xscale("log")
    ticks = [1e8, 3e8, 1e9, 3e9, 1e10]
    ax.set_xticks(ticks, [parameters_text(t) for t in ticks])
    ax.minorticks_off()


def _draw_published(ax: Axes, points: Sequence[SizePoint]) -> None:
    x, y = [p.parameters for p in points], [or_nan(p.speedup.value) for p in points]
    ax.plot(x, y, color=look(1)["color"], marker="s", ls="none", label="published shapes", zorder=4)
    for i, (point, at, value) in enumerate(zip(points, x, y, strict=True)):
        # The last of two neighbours has its number below, where the other's would hide it.
        place, side = ((0, 4), "bottom") if i + 1 < len(points) else ((0, -4), "top")
        ax.annotate(
            f"{point.layers}", (at, value), place, textcoords="offset points", ha="center", va=side, fontsize=7
        )


def _point_row(curve: SizeCurve, point: SizePoint) -> Mapping[str, Any]:
    return {
        "device": curve.device,
        "batch": curve.batch,
        "latency": curve.latency,
        "label": curve.label,
        "drafter": point.drafter,
        "parameters": point.parameters,
        "share": point.share,
        "draft_tokens": point.draft_tokens,
        "speedup": point.speedup.value,
        "low": point.speedup.low,
        "high": point.speedup.high,
    }


def _as_share(value: Estimate, whole: float) -> Estimate:
    def share(each: float | None) -> float | None:
        return None if each is None else each / whole

    return Estimate(share(value.value), share(value.low), share(value.high), value.requests)


def _optimum_row(name: str, label: str, value: Estimate) -> Mapping[str, Any]:
    return {"what": name, "label": label, "share": value.value, "low": value.low, "high": value.high}
