"""Figures of a cascade: frontier of cost and quality, reliability of the predictor, usage of stages over lambda."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.cascade.findings import CascadeFindings, PolicyCurve, PolicyPoint, StageScores
from analysis.common.bootstrap import Estimate
from reports.page.drawing import INK, REFERENCE, Drawing, bars, look, need, new_figure, or_nan, to_svg
from reports.page.text import estimate, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHORT = {
    "sequential": "sequential",
    "cascade-routing": "cascade-routing",
    "route-once": "route once",
    "score-threshold": "score threshold",
    "confidence-threshold": "confidence threshold",
    "oracle": "oracle, routing",
    "oracle-sequential": "oracle, stopping",
}
"""Names of the policies in keys and tables."""

_SHOWN = ("sequential", "cascade-routing", "route-once", "score-threshold", "confidence-threshold")
_LEARNED = ("sequential", "cascade-routing", "route-once")


def cascade_label(findings: CascadeFindings) -> str:
    """End of a caption: where correctness comes from, how policies were evaluated, and n."""
    source = "correctness as the table gives it" if findings.label == "given" else plain(findings.label)
    many = len(findings.domains)
    return f"[{source}; n = {findings.items:,} items, {many} domain{'s' if many > 1 else ''}]"


def cascade_frontier(findings: CascadeFindings) -> Drawing:
    """Quality against cost over lambda, and what each learned policy gains over the best single stage."""
    curves = [c for key in _SHOWN if (c := findings.policy(key)) is not None]
    need(curves, "cascade-frontier", "policies")
    figure, (left, right) = new_figure(1, 2, height=3.5)
    _draw_single(left, findings)
    oracle = findings.policy("oracle")
    if oracle is not None:
        points = _known(oracle.points)
        x, y = [or_nan(p.cost.value) for p in points], [or_nan(p.quality.value) for p in points]
        left.plot(x, y, color=REFERENCE, ls=":", lw=1.0, label=SHORT["oracle"])
    for index, curve in enumerate(curves):
        _draw_curve(left, curve, index)
        if curve.policy in _LEARNED:
            _draw_gain(right, curve, index)
    left.set_xlabel("Mean cost of an item (units of the table)")
    left.set_ylabel("Mean quality (share correct)", rotation_mode="anchor")
    right.axhline(0, color=INK, lw=0.8, ls=(0, (4, 2)))
    _lambda_axis(right)
    right.set_xlabel("Value of a correct answer, \u03bb (cost units)")
    right.set_ylabel("Gain over the best single stage / \u03bb (quality)", rotation_mode="anchor")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    head = findings.headline
    return Drawing(
        "cascade-frontier",
        to_svg(figure),
        "Left: mean quality against mean cost of each policy as \u03bb grows; squares, each stage alone; dashed, "
        "random mixing of stages; dotted, an oracle that knows every answer and routes. Bars at every fourth point: "
        "95% intervals over items. Right: utility gained over the best single stage of that \u03bb, divided by "
        "\u03bb; bands: bounds that hold for all policies and \u03bb at once (95%). Held-out items, exact "
        f"counterfactual. {cascade_label(findings)}",
        f"Two charts. Quality against cost for {len(curves)} policies and {len(findings.stages)} single stages; gain "
        f"against lambda. {SHORT[head.policy]} gains {estimate(head.gain_together)} cost units at lambda "
        f"{head.lam:g}.",
        _frontier_data(findings),
    )


def cascade_reliability(findings: CascadeFindings) -> Drawing:
    """Observed against predicted quality of each stage, once that stage has run."""
    own = [score for score in findings.scores if score.stage == _last_run(findings, score)]
    need(own, "cascade-reliability", "scores of stages")
    columns = len(own) if len(own) <= 4 else 3
    rows = math.ceil(len(own) / columns)
    figure, axes = new_figure(rows, columns, height=0.4 + rows * (5.6 / columns + 0.3))
    for ax in axes[len(own) :]:
        ax.set_axis_off()
    for ax, score in zip(axes, own, strict=False):
        _draw_reliability(ax, score)
        ax.set_title(short(score.stage, 16))
    for ax in axes[max(0, len(own) - columns) : len(own)]:
        ax.set_xlabel("Predicted quality")
    for ax in axes[: len(own) : columns]:
        ax.set_ylabel("Observed quality", rotation_mode="anchor")
    return Drawing(
        "cascade-reliability",
        to_svg(figure),
        "Observed quality against the predicted chance that the stage's own answer is correct, once it has run: ten "
        "bins of equal count; bars: 95% intervals over items. On the diagonal predictions can be taken at their "
        f"word. Held-out items. {cascade_label(findings)}",
        f"Reliability curves of {len(own)} stages. "
        + " ".join(f"{short(s.stage, 16)}: calibration error {s.ece:.3f}." for s in own),
        tuple(
            {
                "stage": s.stage,
                "predicted": b.predicted,
                **_cells("observed", b.observed),
                "items": b.observed.requests,
            }
            for s in own
            for b in s.reliability
        ),
    )


def cascade_usage(findings: CascadeFindings) -> Drawing:
    """The share of items that each stage answers, over lambda, one panel a learned policy."""
    curves = [c for key in _LEARNED if (c := findings.policy(key)) is not None]
    need(curves, "cascade-usage", "learned policies")
    figure, axes = new_figure(1, len(curves), height=2.7, sharey=True)
    for ax, curve in zip(axes, curves, strict=True):
        lams = [point.lam for point in curve.points]
        for at, stage in enumerate(findings.stages):
            _draw_band(ax, lams, [point.answered[at] for point in curve.points], at, short(stage.name, 16))
        ax.set_title(SHORT[curve.policy])
        _lambda_axis(ax)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("\u03bb (cost units)")
    axes[0].set_ylabel("Share of items answered", rotation_mode="anchor")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))
    return Drawing(
        "cascade-usage",
        to_svg(figure),
        "Share of items that each stage answers as a correct answer gains in value; bands: 95% intervals over items. "
        f"Held-out items. {cascade_label(findings)}",
        f"Line charts of the share of answers of {len(findings.stages)} stages against lambda for "
        f"{len(curves)} policies.",
        tuple(
            {"policy": c.policy, "lambda": p.lam, "stage": stage.name, **_cells("answered", p.answered[at])}
            for c in curves
            for p in c.points
            for at, stage in enumerate(findings.stages)
        ),
    )


def _draw_single(ax: Axes, findings: CascadeFindings) -> None:
    """Every stage alone, and the line of random mixing above them."""
    cost = [or_nan(stage.cost.value) for stage in findings.stages]
    quality = [stage.quality for stage in findings.stages]
    values = [or_nan(q.value) for q in quality]
    path = [(cost[switch.stage], values[switch.stage]) for switch in findings.switches_once]
    ax.plot(*zip(*path, strict=True), color=INK, lw=1.0, ls=(0, (4, 2)), label="random mixing", zorder=2)
    ax.errorbar(
        cost,
        values,
        yerr=bars(quality),
        fmt="s",
        ms=5,
        color=INK,
        mfc="white",
        elinewidth=0.8,
        label="a single stage",
    )
    middle = (min(cost) + max(cost)) / 2
    for stage, x, y in zip(findings.stages, cost, values, strict=True):
        beside, side = ((5, -9), "left") if x <= middle else ((2, -16), "center")
        ax.annotate(
            short(stage.name, 14), (x, y), beside, textcoords="offset points", fontsize=7.5, color=INK, ha=side
        )


def _draw_curve(ax: Axes, curve: PolicyCurve, index: int) -> None:
    points = _known(curve.points)
    style = {**look(index + 1), "markersize": 3}
    x, y = [or_nan(p.cost.value) for p in points], [or_nan(p.quality.value) for p in points]
    ax.plot(x, y, label=SHORT[curve.policy], **style)
    if curve.policy in _LEARNED:
        some = points[2::4]
        at = [or_nan(p.cost.value) for p in some]
        high = [p.quality for p in some]
        ax.errorbar(at, [or_nan(q.value) for q in high], yerr=bars(high), fmt="none", ecolor=style["color"], lw=0.8)


def _draw_gain(ax: Axes, curve: PolicyCurve, index: int) -> None:
    scaled = [_scaled(point.gain_together, point.lam) for point in curve.points]
    _draw_band(ax, [point.lam for point in curve.points], scaled, index + 1, None)


def _lambda_axis(ax: Axes) -> None:
    """A logarithmic axis with plain numbers at the decades."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: "")


def _draw_band(ax: Axes, x: Sequence[float], y: Sequence[Estimate], index: int, label: str | None) -> None:
    """A line with its intervals as a band; every other mark is left out of a long line."""
    style = {**look(index), "markersize": 3}
    ax.plot(x, [or_nan(e.value) for e in y], label=label, markevery=max(1, len(x) // 12), **style)
    low, high = [or_nan(e.low) for e in y], [or_nan(e.high) for e in y]
    ax.fill_between(x, low, high, color=style["color"], alpha=0.22, lw=0)


def _draw_reliability(ax: Axes, score: StageScores) -> None:
    ax.plot([0, 1], [0, 1], color=REFERENCE, lw=0.8, ls=(0, (4, 2)))
    x, y = [b.predicted for b in score.reliability], [b.observed for b in score.reliability]
    style = {**look(2), "linestyle": "-"}
    ax.errorbar(x, [or_nan(e.value) for e in y], yerr=bars(y), elinewidth=0.8, **style)
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xticks([0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1])
    ax.set_aspect("equal")


def _last_run(findings: CascadeFindings, score: StageScores) -> str | None:
    """The stage that ran last before this score."""
    return findings.stages[score.after - 1].name if score.after else None


def _known(points: Sequence[PolicyPoint]) -> list[PolicyPoint]:
    """Points with a cost and a quality, in the order of lambda."""
    return [p for p in points if p.cost.value is not None and p.quality.value is not None]


def _scaled(value: Estimate, lam: float) -> Estimate:
    def over(number: float | None) -> float | None:
        return None if number is None else number / lam

    return Estimate(over(value.value), over(value.low), over(value.high), value.requests)


def _frontier_data(findings: CascadeFindings) -> tuple[dict[str, Any], ...]:
    """The marks of the frontier with their intervals."""
    rows: list[dict[str, Any]] = []
    empty = Estimate(None, None, None, 0)
    for stage in findings.stages:
        rows.append(
            {
                "policy": f"always {stage.name}",
                "lambda": None,
                **_cells("cost", stage.cost),
                **_cells("quality", stage.quality),
                **_cells("gain", empty),
                **_cells("gain_together", empty),
            }
        )
    for curve in findings.policies:
        for p in curve.points:
            cells = {**_cells("cost", p.cost), **_cells("quality", p.quality), **_cells("gain", p.gain)}
            cells |= _cells("gain_together", p.gain_together)
            rows.append({"policy": curve.policy, "lambda": p.lam, **cells})
    return tuple(rows)


def _cells(name: str, value: Estimate) -> dict[str, float | None]:
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
