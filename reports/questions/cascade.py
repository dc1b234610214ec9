"""The part on cascades: when a larger model is worth asking, by whom that is decided, and what it is worth.

Tables of a cascade: policies by lambda, where each stage is used, scores of the predictor.
"""

from __future__ import annotations

import math

from analysis.cascade.findings import CascadeFindings, PolicyPoint, StageRange
from analysis.cascade.published import Switch
from analysis.common.bootstrap import Estimate
from reports.page.document import Block, Bullets, Figure, Paragraph, Part, Table, table
from reports.page.drawing import styled
from reports.page.text import DASH, estimate, listing, named, short, signed
from reports.questions.cascade_figures import (
    SHORT,
    cascade_frontier,
    cascade_label,
    cascade_reliability,
    cascade_usage,
)

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


LAMBDA = "\u03bb"
TOGETHER = "bounds that hold for all policies at once, 95%"


def cascade_part(findings: CascadeFindings, other: CascadeFindings | None = None) -> Part:
    """Answer: when to ask a larger model. `other`: the same table with its costs counted the other way.

    That is, stages that go on from each other where those of `findings` pay from nothing, or the reverse.
    """
    with styled():
        drawings = (cascade_frontier(findings), cascade_usage(findings), cascade_reliability(findings))
    frontier, usage, reliability = (Figure.of(drawing) for drawing in drawings)
    blocks: list[Block] = [
        Paragraph(_setting(findings), "Setting"),
        frontier,
        policies_table(findings),
        *([Paragraph(_other(findings, other), "Counted the other way")] if other is not None else []),
        usage,
        ranges_table(findings),
        Paragraph(_switches(findings), "Without signals"),
        Paragraph(_predictor(findings), "Predictor"),
        reliability,
        scores_table(findings),
        Bullets(_published(findings)),
    ]
    return Part(
        key="cascade",
        title="When to ask a larger model",
        answer=Paragraph(_answer(findings), "Cascade"),
        blocks=tuple(blocks),
        drawings=drawings,
        guidelines=_guidelines(findings),
        limits=_limits(findings),
    )


def _answer(findings: CascadeFindings) -> str:
    head, low, high = findings.headline, findings.lambdas[0], findings.lambdas[-1]
    where = f"on {named(findings.name)} ({findings.items:,} items, {len(findings.stages)} stages)"
    gain = f"{points(head.mean_gain_together)} points of quality"
    if not head.pays:
        return (
            f"No learned policy is shown to be better than the best single stage {where}: averaged over {LAMBDA}, "
            f"the best of them, {SHORT[head.policy]}, gains {gain} ({TOGETHER})."
        )
    return (
        f"The {SHORT[head.policy]} policy gains {gain} over the best single stage {where}, averaged over {LAMBDA} "
        f"from {low:.3g} to {high:.3g} ({TOGETHER}); most at {LAMBDA} = {head.lam:g}, "
        f"{estimate(head.gain_together, 3)} units of cost an item more than {named(head.best_stage)}."
        f"{_rivals(findings)}"
    )


def _rivals(findings: CascadeFindings) -> str:
    """What may be as good as the headline's policy where it gains most."""
    head = findings.headline
    best = next(one for one in findings.best if one.lam == head.lam)
    names = [SHORT[name] for name in best.policies if name != head.policy] + [named(name) for name in best.stages]
    if not names:
        return " Nothing else that can be run is as good there."
    return f" There {listing(names)} cannot be told from the best."


def _setting(findings: CascadeFindings) -> str:
    costs = listing([f"{named(s.name)} {s.cost.value:.3g}" for s in findings.stages])
    known = listing([f"{named(name)}" for name in (*findings.item_features, *findings.signals)]) or "nothing"
    how = (
        "Stages go on from each other: one that runs after others pays only what it adds."
        if findings.continued
        else "Each stage pays from nothing, so that what ran before is paid on top."
    )
    return (
        f"Every stage ran on each of {findings.items:,} items, so what a policy would have answered and paid is "
        f"looked up, not estimated. Mean cost of a stage: {costs}. {how} {LAMBDA} is what a correct answer is "
        f"worth in that unit; utility is {LAMBDA} times quality, minus cost. A predictor sees {known}"
        f"{' and the domain' if findings.known_domain else ''}; the sequential policy stops by backward induction on "
        "its calibrated posterior, with what is already paid left out of account (sunk). Cascade-routing may run any "
        "stage next and hands out the answer of highest posterior; route-once chooses one stage before any runs. "
        f"Predictors and rules are fitted on four fifths of the items and act on the rest, {findings.folds} times "
        "over."
    )


def _other(findings: CascadeFindings, other: CascadeFindings) -> str:
    if other.name != findings.name or other.continued == findings.continued:
        return f"Another study, of {named(other.name)}: {_answer(other)}"
    how = "where stages go on from each other" if other.continued else "where each stage pays from nothing"
    gains = [
        f"{SHORT[c.policy]} {points(c.mean_gain_together)}"
        for c in other.policies
        if c.policy in LEARNED_AND_THRESHOLDS
    ]
    return (
        f"The same answers {how}: gains over the best single stage, averaged over {LAMBDA}, in points of quality "
        f"({TOGETHER}): {listing(gains)}."
    )


def _switches(findings: CascadeFindings) -> str:
    def told(switches: tuple[Switch, ...]) -> str:
        return listing([f"{named(findings.stages[s.stage].name)} from {s.from_lambda:.3g}" for s in switches])

    return (
        f"With nothing but mean costs and qualities, the best single stage is, by {LAMBDA}: "
        f"{told(findings.switches_once)}. Where stages must run in order the switches are: "
        f"{told(findings.switches_sequential)}. A stage that is not named is dominated."
    )


def _predictor(findings: CascadeFindings) -> str:
    words = []
    for after in sorted({form.after for form in findings.forms}):
        mine = {form.kind: form for form in findings.forms if form.after == after}
        best = max(mine.values(), key=lambda form: form.folds)
        losses = ", ".join(f"{kind} {form.log_loss:.3f}" for kind, form in mine.items())
        words.append(f"after {after} {best.kind} in {best.folds} ({losses})")
    return (
        "Its form is chosen for each number of stages that ran by held-out log loss (nats) within the training "
        f"items, in each of {findings.folds} folds: {listing(words)}. A sigmoid fitted to held-out logits "
        "calibrates it and never turns their order."
    )


def _published(findings: CascadeFindings) -> tuple[Paragraph, ...]:
    facts = findings.published
    names, costs = facts.stages, facts.costs
    priced = ", ".join(f"{name} {cost:g}" for name, cost in zip(names, costs, strict=True))
    lams = listing([f"{lam:g}" for lam in facts.lambdas])
    switch = listing([f"{names[s.stage]} from {s.from_lambda:.3g}" for s in facts.switches])
    reach = listing([f"{100 * one.share:.1f}% at {one.lam:g}" for one in facts.reach])
    largest = names[-1]
    return (
        Paragraph(
            f"Costs {priced}, {LAMBDA} of {lams}: {facts.chosen} was chosen in all of {facts.runs} runs. "
            f"[published; {facts.source}]",
            "A published cascade",
        ),
        Paragraph(
            f"{LAMBDA} times a quality in 0..1 gains at most {max(facts.lambdas):g}, and {largest} costs "
            f"{facts.impossible_below_once[-1]:.3g} more than {names[0]} (routed) or "
            f"{facts.impossible_below_sequential[-1]:.3g} more once {names[0]} ran: it can never be the optimum "
            f"at these {LAMBDA}, whatever the qualities. {names[0]} is, unless {names[1]} is better by more than "
            f"{facts.gap_needed_once:.2f} (routed) or {facts.gap_needed_sequential:.2f} (sequential) at {LAMBDA} = "
            f"{max(facts.lambdas):g}. With example qualities {listing([f'{q:g}' for q in facts.qualities])}: "
            f"{switch}. [calculated]",
            "The optimum under its own costs",
        ),
        Paragraph(
            "Its stopping rule compares a quality of 0.7 + 0.05 per stage plus noise, in which no input enters, "
            "with a fixed threshold; the share of items that this sends to the last of its four stages is "
            f"{reach} ({LAMBDA}). No quality was measured. [calculated from the published rule]",
            "Why it chose so",
        ),
    )


def _guidelines(findings: CascadeFindings) -> tuple[Paragraph, ...]:
    learned = [c for c in findings.policies if c.policy in LEARNED]
    worth = [SHORT[c.policy] for c in learned if (c.mean_gain_together.low or 0.0) > 0]
    found = (
        f"Use {' or '.join(worth)} here: averaged over {LAMBDA} the gain over the best single stage is above 0, by "
        "bounds that hold for all policies."
        if worth
        else f"Serve one stage here: no learned policy is shown to be better, averaged over {LAMBDA}."
    )
    return (
        Paragraph(found, "Cascade or not"),
        Paragraph(
            "A cascade pays for every stage that it tries. Where stages cost much alike and start from nothing, "
            "route once instead; where they go on from each other, or the first is several times cheaper, run "
            "them in order.",
            "Ratio of costs",
        ),
        Paragraph(
            f"State what a correct answer is worth before choosing a policy: below {LAMBDA} = "
            f"{_last_useless(findings):.3g} nothing but {named(findings.stages[0].name)} is used by the "
            "sequential rule.",
            "Value of an answer",
        ),
        Paragraph("Calibrate on answers of your own traffic; a rule is as good as its posterior.", "Predictor"),
    )


def _limits(findings: CascadeFindings) -> tuple[Paragraph, ...]:
    said = [
        f"Intervals resample {findings.items:,} items {findings.draws:,} times and keep the fits: they leave out "
        "what another training sample would change. The headline's policy and \u03bb were chosen after the fact: its "
        "bounds allow for that, its values are on the high side.",
        "Costs are those of the table, an item at a time: queueing and batching are not in them.",
        "The rule acts on cells of 25 training items or more; finer differences of the posterior are not used.",
    ]
    if findings.policy("cascade-routing") is None:
        said.append("Cascade-routing was not learned: it needs a predictor for every set of stages, too many here.")
    if findings.degenerate:
        said.append("The sequential rule lets no two stages share the work at any \u03bb: it is one stage at a time.")
    return tuple(Paragraph(text) for text in said)


def _last_useless(findings: CascadeFindings) -> float:
    """The largest lambda up to which the sequential rule uses the first stage alone (99% of the items)."""
    curve = findings.policy("sequential")
    alone = 0.0
    for point in curve.points if curve is not None else ():
        if (point.answered[0].value or 0.0) < 0.99:
            break
        alone = point.lam
    return alone
