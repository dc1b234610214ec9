"""The laws in the report: which form each follows, what the published form is worth, and how far it may be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.common.bootstrap import Estimate
from analysis.laws import FittedForm, Law, LawFindings, Ranking
from analysis.laws.law import PUBLISHED_FORM
from calibration.common.errors import ReportError
from reports.page.document import Block, Figure, Paragraph, Part, table
from reports.page.drawing import styled
from reports.page.text import DASH, listing
from reports.questions.laws_figures import brief, law_figure

SHOWN = ("size", "training-tokens", "position", "context", "batch-speed", "batch-measured")
"""Laws with a figure; the others are in the table alone."""

_FAR = 10
"""How far beyond the largest x the guideline looks."""


def laws_part(findings: LawFindings) -> Part:
    """Compose what the laws say. Raises `ReportError` where there is not one."""
    if not findings.laws:
        raise ReportError(f"laws: needs one law at least, got none ({'; '.join(findings.absent)})")
    shown = [law for law in findings.laws if law.key in SHOWN]
    with styled():
        drawings = tuple(law_figure(law) for law in shown)
    figures: list[Block] = [Figure.of(drawing) for drawing in drawings]
    return Part(
        key="laws",
        title="Laws of size, training, context and batch",
        answer=_answer(findings),
        blocks=(Paragraph(_METHOD), _verdicts(findings.laws), *figures, *_fits(shown)),
        drawings=drawings,
        guidelines=_guidelines(findings),
        limits=_limits(findings),
    )


_METHOD = (
    "Each form has its parameters fitted by least squares and is then judged on levels that the fit has not seen: by "
    "interpolation, where one inner level is left out at a time, and by extrapolation, where each level above the "
    "fourth is predicted from those below it. Every group (domain, student, drafter) has parameters of its own. Two "
    "forms are told apart when the 95% interval of their difference in squared error, bootstrapped over the groups, "
    "does not hold 0. The log-linear form is that of Scylla (arXiv 2505.07858); its published coefficients are not "
    "at hand, so the form is tested and not the numbers. Fits that left their form (a saturation without a limit in "
    "sight) predict as the form that they turned into."
)


def _answer(findings: LawFindings) -> Paragraph:
    law = next((each for each in findings.laws if each.key == "size"), None)
    if law is None:
        told = [f"{each.title.lower()}: {each.comparison.extrapolation.statement}" for each in findings.laws[:1]]
        return Paragraph((told[0] if told else "no law could be fitted to the data given") + ".", "Laws")
    gain = _per_doubling(law.drawn.fit(PUBLISHED_FORM))
    first = f"Twice the drafter accepts {gain} more tokens a round of {findings.draft_tokens} (bonus not included)"
    return Paragraph(f"{first}; {law.comparison.interpolation.statement}. {_fate(law)}", "Size law")


def _per_doubling(fitted: FittedForm | None) -> str:
    """Gain per factor of two of the log-linear form, b ln 2, with its interval."""
    if fitted is None or fitted.parameters["b"].value is None:
        return "an unknown number of"
    b = fitted.parameters["b"]
    value = f"{(b.value or 0.0) * math.log(2):.2g}"
    if b.low is None or b.high is None:
        return value
    return f"{value} ({b.low * math.log(2):.2g}{DASH}{b.high * math.log(2):.2g})"


_FATES = {
    "best": "is the best",
    "not told apart": "cannot be told from the best",
    "worse": "is worse than the best",
    "too few levels": "could not be judged: too few levels",
}


def _fate(law: Law) -> str:
    inner, beyond = law.published("interpolation"), law.published("extrapolation")
    if inner == beyond:
        return f"The published log-linear form {_FATES[inner]} by both tests."
    return f"The published log-linear form {_FATES[inner]} by interpolation and {_FATES[beyond]} by extrapolation."


def _verdicts(laws: Sequence[Law]) -> Block:
    rows = [
        (law.title, _ranked(law.comparison.interpolation), _ranked(law.comparison.extrapolation), _short_fate(law))
        for law in laws
    ]
    kinds = listing(sorted({law.kind for law in laws}))
    return table(
        "The form that errs least on left-out levels with its error in percent of the mean, and in brackets the "
        "forms that the data cannot tell from it. A star: in most of its fits the form left itself, as a saturation "
        f"without a limit in sight does. [{kinds}; {_sizes(laws)}]",
        ("Law", "By interpolation", "By extrapolation", "Log-linear form (inner / beyond)"),
        rows,
        "llll",
        ("1.2", "1.3", "1.3", "1"),
        size=8.2,
    )


def _sizes(laws: Sequence[Law]) -> str:
    return "; ".join(f"{law.key}: {law.comparison.levels} levels, {_groups(law)}" for law in laws)


def _groups(law: Law) -> str:
    return f"{law.comparison.groups} {law.compared}" if law.comparison.groups else "one curve"


def _ranked(ranking: Ranking) -> str:
    if ranking.best is None:
        return "too few levels"
    alike = f" [{', '.join(ranking.alike)}]" if ranking.alike else ""
    best = ranking.error(ranking.best)
    star = "*" if 2 * best.failures > ranking.points else ""
    return f"{best.form}{star} {100 * best.relative:.1f}%{alike}"


def _short_fate(law: Law) -> str:
    return f"{law.published('interpolation')} / {law.published('extrapolation')}"


def _fits(laws: Sequence[Law]) -> list[Block]:
    rows = []
    for law in laws:
        for fitted in law.drawn.fits:
            if fitted.form != "constant":
                words = fitted.trouble or ", ".join(f"{n} = {_three(e)}" for n, e in fitted.parameters.items())
                r2 = "\u2014" if fitted.r_squared is None else f"{fitted.r_squared:.3f}"
                rows.append((f"{law.key}, {law.drawn.name}", fitted.form, brief(fitted.reference), words, r2))
    if not rows:
        return []
    return [
        table(
            "Fitted parameters with 95% intervals, of the curve that each figure draws; x_0 is the reference of the "
            "form. Intervals of the size law come from resampled requests, the others from the covariance of the "
            "fit. [fitted; the points of the figures]",
            ("Curve", "Form", "x_0", "Parameters", "R\u00b2"),
            rows,
            "lllll",
            ("1.1", "auto", "auto", "2", "auto"),
            size=8.0,
        )
    ]


def _three(estimate: Estimate) -> str:
    if estimate.value is None:
        return "\u2014"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})".replace("-", "\u2212")


def _guidelines(findings: LawFindings) -> tuple[Paragraph, ...]:
    said = []
    for law in findings.laws:
        if law.key in ("size", "training-tokens"):
            far = _far(law)
            if far:
                said.append(Paragraph(far, f"{law.title.split(' against ')[1].capitalize()}."))
    return tuple(said)


def _far(law: Law) -> str | None:
    """What the forms that cannot be told apart promise ten times beyond the data."""
    ranking = law.comparison.extrapolation
    if ranking.best is None:
        return None
    fits = [f for f in (law.drawn.fit(form) for form in (ranking.best, *ranking.alike)) if f is not None]
    fits = [f for f in fits if f.form != "constant" and f.converged]
    if len(fits) < 2:
        return None
    at = _FAR * law.drawn.points[-1].x
    promised = sorted((float(f.predict(at)), f.form) for f in fits)
    (low, least), (high, most) = promised[0], promised[-1]
    return (
        f"Do not draw the law far beyond its data: at ten times the largest measured value, {brief(at)}, the forms "
        f"that the data cannot tell apart promise from {low:.2f} ({least}) to {high:.2f} ({most}) accepted tokens a "
        f"round for {law.drawn.name} [extrapolated]."
    )


def _limits(findings: LawFindings) -> tuple[Paragraph, ...]:
    said = [Paragraph(f"{law.caution[0].upper()}{law.caution[1:]}.", f"{law.title}.") for law in findings.laws]
    said += [Paragraph(f"Not asked: {reason}.", "Absent law.") for reason in findings.absent]
    return tuple(said)
