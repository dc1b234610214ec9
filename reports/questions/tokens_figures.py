"""Figures of drafted tokens: odds ratios, calibration on held-out prompts, and the hazard of rejection by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.common.bootstrap import Estimate
from analysis.tokens import HazardCurve, HeldOut, Regression, Score, TokenFindings
from analysis.tokens.heldout import CONFIDENCE, NEW_PROMPT
from reports.page.drawing import (
    INK,
    REFERENCE,
    Drawing,
    add_key,
    bars,
    label_below,
    label_beside,
    look,
    need,
    new_figure,
    to_svg,
)
from reports.page.text import count, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FITS = (
    ("exchangeable", "equations, exchangeable"),
    ("independence", "equations, independent"),
    ("mixed", "mixed, prompt and drafter"),
)


def sample_label(findings: TokenFindings, tokens: int | None = None) -> str:
    """End of a caption: n and how the numbers were come by."""
    how = "measured" if findings.decoding == "greedy" else "measured, acceptance drawn with its recorded probability"
    size = f"n = {count(tokens or findings.tokens)} drafted tokens of {findings.requests} requests"
    return f"[{how}; {size}, {len(findings.domains)} domains]"


def odds_figure(findings: TokenFindings, regression: Regression) -> Drawing:
    """A forest plot of the odds ratios of features and domains in three fits."""
    rows = [r for r in regression.ratios if not r.feature.startswith("drafter ")][::-1]
    need(rows, "token-odds", "odds ratios")
    figure, (ax,) = new_figure(1, 1, height=0.75 + 0.27 * len(rows))
    records: list[Mapping[str, Any]] = []
    for index, (fit, words) in enumerate(FITS):
        style = {**look(index), "linestyle": "none", "ms": 4}
        places, values = [], []
        for y, row in enumerate(rows):
            estimate: Estimate | None = getattr(row, fit)
            if estimate is not None and estimate.value is not None:
                places.append(y + 0.22 * (1 - index))
                values.append(estimate)
                records.append(_odds_record(row.feature, row.step, fit, estimate))
        ax.errorbar(
            [e.value or math.nan for e in values], places, xerr=bars(values), elinewidth=0.9, label=words, **style
        )
    ax.axvline(1, color=REFERENCE, lw=0.9)
    ax.set_xscale("log")
    _plain_ticks(ax)
    ax.set_yticks(range(len(rows)), [f"{short(r.feature)} ({short(r.step, 28)})" for r in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("Ratio of the odds of acceptance")
    figure.legend(loc="outside lower center", ncols=3)
    used = ", ".join(f"{name} {count(n)}" for name, n in regression.rows.items())
    return Drawing(
        "token-odds",
        to_svg(figure),
        "Odds ratios of acceptance of a drafted token, given that those before it were accepted: one standard "
        "deviation of a feature, or a domain against the first. Bars: 95% intervals, of the equations robust and "
        f"clustered by prompt, of the mixed model from its curvature. Rows used: {used}. {sample_label(findings)}",
        f"Forest plot of {len(rows)} odds ratios in three fits; the numbers are in the table that follows.",
        tuple(records),
    )


def _odds_record(feature: str, step: str, fit: str, e: Estimate) -> Mapping[str, Any]:
    return {"feature": feature, "step": step, "fit": fit, "odds_ratio": e.value, "low": e.low, "high": e.high}


def _plain_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def calibration_figure(findings: TokenFindings, held_out: HeldOut) -> Drawing:
    """Observed acceptance against the predicted one on held-out prompts: the regression, and raw confidence."""
    scores = [held_out.score(NEW_PROMPT), held_out.score(CONFIDENCE)]
    figure, axes = new_figure(1, 2, height=2.9, sharey=True)
    titles = ("regression, new prompts", "raw confidence as probability")
    for index, (ax, score, title) in enumerate(zip(axes, scores, titles, strict=True)):
        _draw_calibration(ax, score, index)
        ax.set_title(title)
        ax.set_xlabel("Predicted probability of acceptance")
    axes[0].set_ylabel("Share accepted")
    return Drawing(
        "token-calibration",
        to_svg(figure),
        "Predicted and observed acceptance of drafted tokens on prompts that the regression had not seen, in ten "
        "equally full bins; on the diagonal a prediction means what it says. Bars: 95% intervals over prompts. "
        f"{sample_label(findings, scores[0].tokens)}",
        "Two calibration plots. Expected calibration error "
        + " and ".join(f"{s.ece.value or 0:.3f} for {s.predictor}" for s in scores)
        + ".",
        tuple(
            {
                "predictor": s.predictor,
                "predicted": b.predicted,
                "observed": b.observed.value,
                "low": b.observed.low,
                "high": b.observed.high,
                "tokens": b.tokens,
            }
            for s in scores
            for b in s.calibration
        ),
    )


def _draw_calibration(ax: Axes, score: Score, index: int) -> None:
    ax.plot([0, 1], [0, 1], color=REFERENCE, lw=0.9, ls=(0, (4, 2)))
    observed = [b.observed for b in score.calibration]
    style = {**look(index), "linestyle": "-"}
    x = [b.predicted for b in score.calibration]
    ax.errorbar(x, [e.value or 0.0 for e in observed], yerr=bars(observed), elinewidth=0.9, **style)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    words = f"Brier {score.brier.value or 0:.3f}\nECE {score.ece.value or 0:.3f}\nAUROC {score.auroc.value or 0:.3f}"
    ax.text(0.04, 0.96, words, transform=ax.transAxes, va="top", fontsize=8)


def hazard_figure(findings: TokenFindings) -> Drawing:
    """The hazard of rejection by depth with the constant one, one panel a drafter."""
    curves = findings.hazards
    need(curves, "token-hazard", "hazards")
    columns = 2 if len(curves) == 4 else min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, axes = new_figure(rows, columns, height=0.55 + 1.3 * rows, sharey=True)
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    deepest = max(len(curve.points) for curve in curves)
    for index, (curve, ax) in enumerate(zip(curves, axes, strict=False)):
        _draw_hazard(ax, curve, index)
        ax.set_xlim(0.5, deepest + 0.5)
        ax.set_xticks(range(1, deepest + 1))
        ax.set_ylim(0, 1.04)
    label_below(axes[: len(curves)], "Depth in the draft")
    label_beside(axes[: len(curves)], "Hazard of rejection")
    add_key(
        figure,
        [
            ("P(rejected | those before accepted), 95% interval", {"color": INK, "marker": "o"}),
            ("constant hazard (geometric law)", {"color": REFERENCE, "ls": (0, (4, 2))}),
        ],
    )
    return Drawing(
        "token-hazard",
        to_svg(figure),
        f"Hazard of rejection by depth in rounds that draft {findings.draft_tokens} tokens; the end of the draft "
        "and of the text censor. On the dashed line the accepted length would be geometric. Bars: 95% intervals "
        f"over requests. [measured; n = {findings.requests} requests, {len(findings.domains)} domains]",
        f"Line charts of the hazard of rejection against depth, one panel for each of {len(curves)} drafters; the "
        "tests are in the table that follows.",
        tuple(_hazard_records(curves)),
    )


def _draw_hazard(ax: Axes, curve: HazardCurve, index: int) -> None:
    depths = [p.depth for p in curve.points]
    hazards = [p.hazard for p in curve.points]
    ax.errorbar(depths, [e.value or 0.0 for e in hazards], yerr=bars(hazards), elinewidth=0.8, **look(index))
    if curve.constant.value is not None:
        ax.axhline(curve.constant.value, color=REFERENCE, lw=0.9, ls=(0, (4, 2)), zorder=0)
    ax.set_title(short(curve.drafter))


def _hazard_records(curves: Sequence[HazardCurve]) -> list[Mapping[str, Any]]:
    return [
        {
            "drafter": c.drafter,
            "depth": p.depth,
            "at_risk": p.at_risk,
            "hazard": p.hazard.value,
            "low": p.hazard.low,
            "high": p.hazard.high,
            "constant_hazard": c.constant.value,
            "survival": p.survival.value,
            "survival_low": p.survival.low,
            "survival_high": p.survival.high,
            "survival_geometric": p.geometric,
        }
        for c in curves
        for p in c.points
    ]
