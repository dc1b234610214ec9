"""The figure of a capacity plan: attainment and latency tails against the arrival rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.capacity import CapacityFindings, PolicyCapacity
from analysis.common.bootstrap import Estimate
from reports.page.drawing import (
    INK,
    REFERENCE,
    Drawing,
    bars,
    draw_line,
    look,
    need,
    new_figure,
    or_nan,
    record,
    to_svg,
)
from reports.page.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def capacity_curves(findings: CapacityFindings) -> Drawing:
    """Share of requests that keep the objective, and the tails, against the arrival rate of one replica."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    need(findings.policies, "capacity", "policies")
    limits = findings.objective.limits
    tails = [name for name in ("ttft", "tpot") if name in limits] or ["ttft"]
    figure, axes = new_figure(1, 1 + len(tails), height=2.9)
    for index, policy in enumerate(findings.policies):
        x = [point.rate_rps for point in policy.curve]
        attained = [_percent(point.attainment) for point in policy.curve]
        draw_line(axes[0], x, attained, index, short(policy.policy, 34))
        for name, ax in zip(tails, axes[1:], strict=True):
            draw_line(ax, x, [_tail(policy, i, name) for i in range(len(x))], index, None)
    _sustained(axes[0], findings)
    axes[0].axhline(100 * findings.objective.attainment, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=1)
    axes[0].set_ylim(0, 103)
    axes[0].set_title("Kept their objective, %")
    for name, ax in zip(tails, axes[1:], strict=True):
        ax.set_title(f"99th percentile of {name.upper()}, s")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        if (limit := limits.get(name)) is not None:
            ax.axhline(limit / 1000, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=1)
    for ax in axes:
        ax.set_xlim(left=0)
        ax.set_xlabel("Requests per second and replica", fontsize=8)
    figure.legend(loc="outside lower center", ncols=min(3, len(findings.policies)))
    return Drawing(
        "capacity",
        to_svg(figure),
        "Share of requests that keep the objective, and latency tails, against the arrival rate of one replica. "
        "Dashed: what is promised; upright marks: the rate that is sustained, with its interval. Bars: 95% "
        f"intervals over {findings.replications} replications. [{_label(findings)}]",
        f"Line charts against the arrival rate for {len(findings.policies)} policies: the share of requests that "
        f"keep the objective falls below {100 * findings.objective.attainment:g}% at "
        + "; ".join(f"{p.policy}: {or_nan(p.rate_rps.value):.3g} requests per second" for p in findings.policies)
        + ".",
        data=tuple(
            {"policy": policy.policy, "rate_rps": point.rate_rps, "share_of_saturation": point.share}
            | record("attainment", point.attainment)
            | record("p99_ttft_ms", point.p99_ttft_ms)
            | record("p99_tpot_ms", point.p99_tpot_ms)
            for policy in findings.policies
            for point in policy.curve
        ),
    )


def _label(findings: CapacityFindings) -> str:
    judged = sum(policy.rate_rps.requests for policy in findings.policies)
    return f"simulated, costs {findings.costs}; n = {judged:,} judged requests at the sustained rates"


def _tail(policy: PolicyCapacity, index: int, name: str) -> Estimate:
    """A tail of one rate in seconds; a lower end at or below zero cannot stand on a logarithmic axis."""
    point = policy.curve[index]
    found = point.p99_ttft_ms if name == "ttft" else point.p99_tpot_ms
    value, low, high = (None if v is None else v / 1000 for v in (found.value, found.low, found.high))
    if low is not None and value is not None and low <= 0:
        low = value / 10
    return Estimate(value, low, high, found.requests)


def _percent(value: Estimate) -> Estimate:
    """A share in percent, its interval within 0 and 100."""
    if value.value is None or value.low is None or value.high is None:
        return Estimate(None if value.value is None else 100 * value.value, None, None, value.requests)
    return Estimate(100 * value.value, 100 * max(0.0, value.low), 100 * min(1.0, value.high), value.requests)


def _sustained(ax: Axes, findings: CapacityFindings) -> None:
    """Mark the sustained rates, with their intervals, on the line of what is promised."""
    for index, policy in enumerate(findings.policies):
        ends: Sequence[Sequence[float]] = bars([policy.rate_rps])
        at = 100 * findings.objective.attainment - 6 - 5 * index
        style = look(index)
        ax.errorbar(
            or_nan(policy.rate_rps.value), at, xerr=ends, marker="|", ms=9, color=style["color"], elinewidth=1.4
        )
    ax.axhline(0, color=REFERENCE, lw=0.0)
