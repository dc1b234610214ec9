"""Tables of a cascade: policies by lambda, where each stage is used, scores of the predictor."""

from __future__ import annotations

import math

from analysis.cascade.findings import CascadeFindings, PolicyPoint, StageRange
from analysis.common.bootstrap import Estimate
from reports.page.document import Table, table
from reports.page.text import DASH, estimate, short, signed
from reports.questions.cascade_figures import SHORT, cascade_label

LEARNED = ("sequential", "cascade-routing", "route-once")
"""Policies that the predictor drives."""

LEARNED_AND_THRESHOLDS = (*LEARNED, "score-threshold", "confidence-threshold")

_LAMBDA = "\u03bb"


def policies_table(findings: CascadeFindings) -> Table:
    """Quality, cost and gain of every policy at up to three lambdas, and the stages' shares of answers."""
    rows = []
    best = {one.lam: one.policies for one in findings.best}
    for lam in _chosen(findings):
        for curve in findings.policies:
            point = next(p for p in curve.points if p.lam == lam)
            first = f"{lam:.3g}" if curve is findings.policies[0] else ""
            gain = points(point.gain_together, point.lam)
            cells = (estimate(point.quality), estimate(point.cost, _digits(findings)), gain)
            mark = " *" if curve.policy in best[lam] else ""
            rows.append((first, f"{SHORT[curve.policy]}{mark}", *cells, _shares(point)))
    names = "/".join(short(stage.name, 12) for stage in findings.stages)
    return table(
        "Policies on held-out items, with 95% intervals. Gain: utility over that of the best single stage in "
        f"hindsight, divided by {_LAMBDA}, in points of quality; its bounds hold for all policies and {_LAMBDA} at "
        f"once. *: may be the best that can be run at that {_LAMBDA}, single stages included. Answered: percent of "
        f"items by stage ({names}). {cascade_label(findings)}",
        (_LAMBDA, "Policy", "Quality", "Cost", "Gain", "Answered (%)"),
        rows,
        "rlrrrr",
        ("auto", "1.2", "1.2", "1.3", "1.4", "1.2"),
        size=7.6,
    )


def ranges_table(findings: CascadeFindings) -> Table:
    """The lambdas at which each stage answers items, by learned policy."""
    rows = []
    for stage in findings.stages:
        mine = {r.policy: r for r in findings.ranges if r.stage == stage.name}
        rows.append(
            (short(stage.name, 20), *(_range(mine.get(key), findings.lambdas[0]) for key in _policies(findings)))
        )
    return table(
        f"{_LAMBDA} at which each stage answers 1% of the items or more, of a grid from {findings.lambdas[0]:.3g} to "
        f"{findings.lambdas[-1]:.3g}; in brackets its largest share. {cascade_label(findings)}",
        ("Stage", *(SHORT[key] for key in _policies(findings))),
        rows,
        "l" + "r" * len(_policies(findings)),
        ("1",) * (1 + len(_policies(findings))),
    )


def scores_table(findings: CascadeFindings) -> Table:
    """Brier score, skill, calibration error and AUROC before anything ran, before a stage and after it."""
    at = {stage.name: index + 1 for index, stage in enumerate(findings.stages)}
    rows = []
    for stage in findings.stages:
        mine = [s for s in findings.scores if s.stage == stage.name]
        for score in mine:
            if score.after not in (0, at[stage.name] - 1, at[stage.name]):
                continue
            when = "before any" if score.after == 0 else f"{score.after} of {len(findings.stages)}"
            chance = f"{score.ece:.3f} ({score.ece_chance_low:.3f}{DASH}{score.ece_chance_high:.3f})"
            base = "\u2014" if score.brier_base.value is None else f"{score.brier_base.value:.3f}"
            cells = (when, estimate(score.brier, 3), base, chance, estimate(score.auroc))
            rows.append((short(stage.name, 16) if score is mine[0] else "", *cells))
    return table(
        "Predictions of each stage's correctness by how many stages had run, on held-out items. Brier and AUROC with "
        "95% intervals over items; base: Brier score of the rate alone; ECE with the range that chance alone "
        f"gives to exact predictions (95%). {cascade_label(findings)}",
        ("Stage", "Seen", "Brier", "Base", "ECE (by chance)", "AUROC"),
        rows,
        "llrrrr",
        ("1", "auto", "1.3", "auto", "1.3", "1.1"),
        size=8.0,
    )


def _chosen(findings: CascadeFindings) -> list[float]:
    """Up to three lambdas: where the headline is, and those a third and two thirds along the rest of the grid."""
    grid, most = findings.lambdas, findings.headline.lam
    above = [lam for lam in grid if lam > most]
    picked = {most, *(above[len(above) * k // 3] for k in (1, 2) if above)}
    return sorted(picked)


def _policies(findings: CascadeFindings) -> list[str]:
    return [key for key in LEARNED if findings.policy(key) is not None]


def _shares(point: PolicyPoint) -> str:
    return "/".join(f"{100 * (share.value or 0):.0f}" for share in point.answered)


def _range(found: StageRange | None, first: float) -> str:
    if found is None or found.from_lambda is None or found.to_lambda is None:
        return "never"
    share = f"({100 * found.most_share:.0f}%)"
    if found.from_lambda == first and found.edge:
        return f"at all {share}"
    if found.edge:
        return f"from {found.from_lambda:.3g} {share}"
    if found.from_lambda == first:
        return f"up to {found.to_lambda:.3g} {share}"
    return f"{found.from_lambda:.3g} {DASH} {found.to_lambda:.3g} {share}"


def points(value: Estimate, lam: float = 1.0) -> str:
    """Give a difference of qualities, or of utilities over lambda, in points of 100, with its interval."""
    if value.value is None:
        return "\u2014"
    text = signed(value.value / lam, 1)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({signed(value.low / lam, 1)} to {signed(value.high / lam, 1)})"


def _digits(findings: CascadeFindings) -> int:
    """Decimals that show three digits of the dearest stage's cost."""
    dearest = max(stage.cost.value or 0.0 for stage in findings.stages)
    return max(0, 2 - math.floor(math.log10(dearest))) if dearest > 0 else 2
