"""The answer of a search for the best settings, as a part of a report."""

from __future__ import annotations

from analysis.common.bootstrap import Estimate
from analysis.tuning.findings import Export, Scored, TuneFindings
from analysis.tuning.halving import METHOD
from reports.page.document import Block, Bullets, Figure, Paragraph, Part, table
from reports.page.drawing import Drawing, styled
from reports.page.text import DASH, breakable, estimate, listing, named, percent, plain
from reports.questions.tuning_figures import drawings


def tuning_part(findings: TuneFindings) -> Part:
    """Give the part: best and runners-up, what lies around the best, the oracle, and configurations of engines."""
    with styled():
        figures = drawings(findings)
    return Part(
        key="tuning",
        title="Which settings",
        answer=_answer(findings),
        blocks=tuple(_blocks(findings, figures)),
        drawings=figures,
        guidelines=tuple(_guidelines(findings)),
        limits=tuple(_limits(findings)),
        evidence=findings.evidence,
    )


def _answer(findings: TuneFindings) -> Paragraph:
    best, judged = findings.best, findings.judged
    value = estimate(judged.best, _digits(judged.best))
    text = f"{_quoted(best)} reaches {value} {judged.unit} (simulated; {judged.how})"
    if best.name != findings.baseline.name:
        shown = "" if judged.pays else ", which does not show that it pays"
        text += f": {estimate(judged.over_baseline)} times as good as no speculation{shown}"
    text += "."
    if findings.runners_up:
        names = [_quoted(one) for one in findings.runners_up[:3]]
        more = len(findings.runners_up) - len(names)
        text += (
            f" In the search not to be told apart from it: {listing([*names, *([f'{more} more'] if more else [])])}."
        )
    if not findings.feasible:
        text += " No setting keeps the service-level objectives."
    return Paragraph(text, "Settings.")


def _quoted(one: Scored) -> str:
    return f"\u2018{named(one.name)}\u2019"


def _digits(value: Estimate) -> int:
    """Digits after the point that an interval supports, about."""
    size = abs(value.value or 0.0)
    return 0 if size >= 1000 else 1 if size >= 10 else 3


def _blocks(findings: TuneFindings, figures: tuple[Drawing, ...]) -> list[Block]:
    by_name = {drawing.name: drawing for drawing in figures}
    blocks: list[Block] = [_method(findings), _ranking(findings), Figure.of(by_name["tuning-contenders"])]
    if findings.oracles:
        blocks.append(_oracles(findings))
    blocks += [Figure.of(drawing) for name, drawing in by_name.items() if name != "tuning-contenders"]
    if findings.exports:
        blocks.append(Bullets(tuple(_export(one) for one in findings.exports)))
    return blocks


def _method(findings: TuneFindings) -> Paragraph:
    plan, goal = findings.plan, findings.goal
    each = "the requests that the scenario states" if plan.requests is None else f"{plan.requests} requests"
    constraint = ""
    if goal.slo:
        limits = listing([f"{key.removesuffix('_ms')} at most {limit:g} ms" for key, limit in goal.slo.items()])
        role = "counting requests with" if goal.objective == "goodput" else f"for {goal.attainment:.0%} of requests:"
        constraint = f", {role} {limits}"
    share = (
        f" Every run serves {plan.share:.0%} of the recorded requests, drawn anew for each seed; intervals are "
        "widened so that they also cover which requests were recorded."
        if plan.share is not None
        else " Intervals are for these requests alone."
    )
    cuts = f" The time budget cut: {listing(list(plan.cuts))}." if plan.cuts else ""
    where = f" The search ran under {plain(findings.searched)}." if findings.searched else ""
    return Paragraph(
        f"{len(findings.candidates)} settings of {named(findings.scenario)} were compared for {goal.objective} "
        f"({goal.unit}{constraint}) by successive halving over {plan.rungs[0].replications} to "
        f"{findings.best.replications} seeds of {each}, all on common random numbers; {METHOD}, differences in the "
        f"final stage adjusted for {findings.compared} comparisons (Bonferroni). The winner was then judged by "
        f"{findings.judged.how}.{share} Costs: {plain(findings.costs)}.{cuts}{where}"
    )


def _ranking(findings: TuneFindings) -> Block:
    shown = [findings.best, *findings.runners_up]
    shown += [
        one for one in (findings.best_fixed, findings.baseline) if one.name not in {other.name for other in shown}
    ]
    labels = {findings.best.name: "best", findings.best_fixed.name: "best fixed", findings.baseline.name: "none"}
    rows = [_row(one, labels.get(one.name, "as good"), findings) for one in shown[:12]]
    attained = ("Within SLO",) if findings.goal.slo else ()
    return table(
        "What the search saw, on the runs that chose: best, runners-up that cannot be told apart from it, best "
        "single drafter at a fixed length, and no speculation. Behind: paired difference, in per cent of the best. "
        f"[simulated; {findings.best.replications} seeds, n = {findings.plan.recorded} recorded requests]",
        ("", "Setting", findings.goal.unit[0].upper() + findings.goal.unit[1:], "Behind (%)", *attained),
        rows,
        "llrr" + "r" * len(attained),
    )


def _row(one: Scored, label: str, findings: TuneFindings) -> tuple[str, ...]:
    behind = DASH if one.name == findings.best.name else percent(one.behind, 1)
    attained = (DASH if one.attainment is None else f"{one.attainment:.1%}",) if findings.goal.slo else ()
    return label, breakable(one.name), estimate(one.value, _digits(one.value)), behind, *attained


def _oracles(findings: TuneFindings) -> Block:
    rows = [
        (
            breakable(gap.name),
            estimate(gap.value, _digits(gap.value)),
            _share(gap.reached),
            _share(gap.closed),
        )
        for gap in findings.oracles
    ]
    return table(
        "Distance to oracles, which know what will be accepted. Reached: the best as a share of the oracle. Closed: "
        "share of the gap between the best fixed length and the oracle. Above 100%: an oracle of the length alone is "
        "no bound for what also chooses the drafter. "
        f"[simulated; {findings.best.replications} seeds, n = {findings.plan.recorded} recorded requests]",
        ("Oracle", findings.goal.unit[0].upper() + findings.goal.unit[1:], "Reached (%)", "Closed (%)"),
        rows,
        "lrrr",
    )


def _share(value: Estimate) -> str:
    if value.value is None:
        return DASH
    if value.low is None or value.high is None:
        return f"{100 * value.value:.0f}"
    return f"{100 * value.value:.0f} ({100 * value.low:.0f}{DASH}{100 * value.high:.0f})"


def _export(one: Export) -> Paragraph:
    if one.file is None:
        return Paragraph(plain(one.notes[0]), f"{one.engine}:")
    words = " ".join(one.arguments)
    notes = f" ({plain('; '.join(one.notes))})" if one.notes else ""
    return Paragraph(f"\u2018{named(one.candidate)}\u2019: {breakable(words, 40)}{notes}", f"{one.engine}:")


def _guidelines(findings: TuneFindings) -> list[Paragraph]:
    best, fixed = findings.best, findings.best_fixed
    if best.kind == "none":
        return [Paragraph("Do not speculate with these drafters under this load.", "Settings.")]
    found = [Paragraph(f"Run {_quoted(best)}; best.toml beside this report is the whole scenario.", "Settings.")]
    if best.name != fixed.name and any(one.name == fixed.name for one in findings.runners_up):
        found.append(
            Paragraph(f"{_quoted(fixed)} is simpler and cannot be told apart from the best.", "The simple choice.")
        )
    return found


def _limits(findings: TuneFindings) -> list[Paragraph]:
    notes = list(findings.notes)
    notes.append(
        "in the runs of the search the best of many settings looks a little better than it is, as they chose it; "
        "that is why it is judged on others"
    )
    if findings.plan.chosen_by == "clock":
        notes.append("how many seeds were run follows from a timing on the machine that searched")
    return [Paragraph(plain(note[0].upper() + note[1:]) + ".", "Tuning.") for note in notes]
