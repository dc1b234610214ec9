"""Figures of routing: regret, reliability of the classifier, growth of regret, drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.common.bootstrap import Estimate
from analysis.routing.findings import ClassifierQuality, MeanOverOrders, PolicyRow, PricedRouting, RoutingFindings
from analysis.routing.served import cost_words
from reports.page.drawing import (
    INK,
    REFERENCE,
    Drawing,
    add_key,
    bars,
    draw_line,
    look,
    need,
    new_figure,
    or_nan,
    to_svg,
)
from reports.page.text import estimate, listing, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = ("domain label", "calibrated classifier", "classifier of the first phase", "thompson")
"""Policies of the drift figure, beside the fixed drafter and the two bandits that differ by their window."""


def sample_label(findings: RoutingFindings, how: str) -> str:
    """End of a caption: how the numbers were come by, and the sample size."""
    return f"[{how}; n = {sum(findings.requests.values())} requests, {len(findings.requests)} domains]"


def costs_label(findings: RoutingFindings) -> str:
    """Say that numbers are simulated, and where the costs of each price list come from."""
    return "simulated; " + ", ".join(cost_words(p.price, p.extrapolated) for p in findings.prices)


def regret_dots(findings: RoutingFindings) -> Drawing:
    """Regret against the oracle by request on mixed traffic, one panel a price list."""
    need(findings.prices, "routing-regret", "price lists")
    policies = [row.policy for row in findings.prices[0].rows if row.domain is None][::-1]
    figure, axes = new_figure(1, len(findings.prices), height=0.8 + 0.19 * len(policies), sharey=True)
    for routing, ax in zip(findings.prices, axes, strict=True):
        for row in routing.rows:
            if row.domain is None and row.policy in policies:
                _regret(ax, row, policies.index(row.policy))
        ax.axvline(0, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=1)
        ax.set_yticks(range(len(policies)), [short(name, 26) for name in policies])
        ax.set_ylim(-0.6, len(policies) - 0.4)
        ax.grid(axis="y", visible=False)
        ax.set_title(f"{routing.price.name} prices, draft {routing.draft_tokens}")
        ax.set_xlabel("Regret (%)")
    add_key(
        figure,
        [
            ("policy", {"color": INK, "marker": "o", "ls": "none"}),
            ("best single drafter", {"color": look(1)["color"], "marker": "D", "ls": "none"}),
            ("oracle", {"color": INK, "marker": "o", "mfc": "white", "ls": "none"}),
        ],
    )
    return Drawing(
        "routing-regret",
        to_svg(figure),
        "Time over that of the oracle by request, in percent of its, on mixed traffic at batch 1; bandits learn in "
        "one pass over the prompts, a mean over shuffled orders. Left of the dashed line only a choice by round "
        f"can be. Bars: 95% intervals over prompts. {sample_label(findings, costs_label(findings))}",
        f"Dot plots of regret, one panel for each of {len(findings.prices)} price lists and one row for each of "
        f"{len(policies)} policies.",
        data=tuple(_row_record(routing, row) for routing in findings.prices for row in routing.rows),
    )


def reliability_plot(findings: RoutingFindings, quality: ClassifierQuality) -> Drawing:
    """Share of prompts that the classifier got right against how sure it was."""
    figure, (ax,) = new_figure(1, 1, height=2.9)
    x = [b.confidence for b in quality.reliability]
    draw_line(ax, x, [b.right for b in quality.reliability], 0, None)
    ax.plot([0, 1], [0, 1], color=REFERENCE, ls=(0, (4, 2)), lw=1.0, zorder=0)
    fewest, most = (pick(b.right.requests for b in quality.reliability) for pick in (min, max))
    ax.set_aspect("equal")
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("Probability of the likeliest domain")
    ax.set_ylabel("Share that was right", rotation_mode="anchor")
    return Drawing(
        "routing-reliability",
        to_svg(figure),
        f"Reliability of the calibrated classifier of prompts, each judged by a model that never saw it "
        f"({quality.folds} folds), {fewest if fewest == most else f'{fewest} to {most}'} prompts a point. Accuracy "
        f"{estimate(quality.accuracy)}, Brier score {estimate(quality.brier)}, calibration error {quality.ece:.2f}. "
        f"Bars: exact 95% intervals. "
        f"{sample_label(findings, 'measured')}",
        f"Reliability diagram with {len(quality.reliability)} bins and the diagonal of perfect calibration.",
        data=tuple(
            {
                "confidence": b.confidence,
                "right": b.right.value,
                "low": b.right.low,
                "high": b.right.high,
                "prompts": b.right.requests,
            }
            for b in quality.reliability
        ),
    )


def regret_curves(findings: RoutingFindings) -> Drawing:
    """Cumulative regret of bandits against the requests they served."""
    need([p for p in findings.prices if p.growth], "routing-growth", "growth of regret")
    figure, axes = new_figure(1, len(findings.prices), height=2.8)
    orders = 0
    names: list[str] = []
    for routing, ax in zip(findings.prices, axes, strict=True):
        for index, name in enumerate(dict.fromkeys(point.policy for point in routing.growth)):
            mine = [point for point in routing.growth if point.policy == name]
            orders = mine[0].regret_s.orders
            draw_line(ax, [p.requests for p in mine], [_as_estimate(p.regret_s) for p in mine], index, None)
            if name not in names:
                names.append(name)
        ax.set_title(f"{routing.price.name} prices")
        ax.set_xlabel("Requests served")
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("Cumulative regret (s)", rotation_mode="anchor")
    bandit = [name for name in names if not name.startswith("always ")]
    entries: list[tuple[str, dict[str, Any]]] = [(name, {**look(i)}) for i, name in enumerate(bandit)]
    entries.append(("best single drafter", {**look(len(bandit))}))
    add_key(figure, entries)
    return Drawing(
        "routing-growth",
        to_svg(figure),
        "Cumulative regret against the oracle by request at batch 1. A line that bends has learned something; one "
        "that stays straight pays for every request. PAK-UCB sees the domain label. Bars: 95% intervals of the "
        f"mean over {orders} orders. {sample_label(findings, costs_label(findings))}",
        f"Line charts of cumulative regret, one panel for each of {len(findings.prices)} price lists.",
        data=tuple(
            {"prices": routing.price.name, "policy": p.policy, "requests": p.requests, **_mean_record(p.regret_s)}
            for routing in findings.prices
            for p in routing.growth
        ),
    )


def drift_curves(findings: RoutingFindings, routing: PricedRouting) -> Drawing:
    """Efficiency of routers while the mix of domains changes."""
    drift = routing.drift
    need(drift, "routing-drift", "a drift")
    assert drift is not None
    figure, (ax,) = new_figure(1, 1, height=3.1)
    shown = [name for name in drift.before if name in _SHOWN or name.startswith(("always ", "ucb c="))]
    for index, name in enumerate(shown):
        mine = [point for point in drift.curve if point.policy == name]
        width = mine[0].until
        x = [point.until - width / 2 for point in mine]
        draw_line(ax, x, [_as_estimate(point.efficiency) for point in mine], index, short(name, 34))
    ax.axvline(drift.switch, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=1.5)
    ax.axhline(1, color=REFERENCE, lw=0.8, zorder=1.5)
    ax.set_xlabel("Requests served")
    ax.set_ylabel("Efficiency", rotation_mode="anchor")
    figure.legend(loc="outside lower center", ncols=2)
    orders = drift.curve[0].efficiency.orders
    return Drawing(
        "routing-drift",
        to_svg(figure),
        "Time of the oracle by request over that of each router, when traffic turns from "
        f"{listing(list(drift.first))} to {listing(list(drift.later))} after {drift.switch} requests (dashed): the "
        f"change between which the drafters differ most. Bars: 95% intervals of the mean over {orders} orders. "
        f"Batch 1, {routing.price.name} prices. "
        f"{sample_label(findings, f'simulated; {cost_words(routing.price, routing.extrapolated)}')}",
        f"Line chart of efficiency against requests served for {len(shown)} routers; the traffic changes at "
        f"{drift.switch}.",
        data=tuple(
            {"prices": routing.price.name, "policy": p.policy, "until": p.until, **_mean_record(p.efficiency)}
            for p in drift.curve
        ),
    )


def _regret(ax: Axes, row: PolicyRow, y: int) -> None:
    value, low, high = (None if x is None else 100 * x for x in (row.regret.value, row.regret.low, row.regret.high))
    hundred = Estimate(value, low, high, row.regret.requests)
    single = row.policy == f"always {row.best_single}"
    colour = look(1)["color"] if single else INK
    style: dict[str, Any] = {"marker": "D" if single else "o", "mfc": "white" if row.oracle else colour, "ms": 4}
    ax.errorbar(or_nan(hundred.value), y, xerr=bars([hundred]), color=colour, elinewidth=0.9, **style)


def _as_estimate(mean: MeanOverOrders) -> Estimate:
    return Estimate(mean.value, mean.low, mean.high, mean.orders)


def _mean_record(mean: MeanOverOrders) -> dict[str, Any]:
    return {"value": mean.value, "low": mean.low, "high": mean.high, "orders": mean.orders}


def _row_record(routing: PricedRouting, row: PolicyRow) -> dict[str, Any]:
    record: dict[str, Any] = {
        "prices": routing.price.name,
        "domain": row.domain or "mixed",
        "policy": row.policy,
        "best_single": row.best_single,
    }
    named: Sequence[tuple[str, Estimate]] = (
        ("speedup", row.speedup),
        ("against_single", row.against_single),
        ("regret", row.regret),
    )
    for name, value in named:
        record |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return record | {"verdict": row.verdict}
