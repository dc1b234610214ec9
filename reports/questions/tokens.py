"""Drafted tokens in the report: what acceptance depends on, how well it is foreseen, and its hazard by depth."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.common.bootstrap import Estimate
from analysis.tokens import HazardCurve, HeldOut, Regression, Score, TokenFindings
from analysis.tokens.heldout import BASE, CONFIDENCE, FOLDS, NEW_DRAFTER, NEW_PROMPT, SEEN_PROMPT
from reports.page.document import Block, Figure, Paragraph, Part, table
from reports.page.drawing import Drawing, styled
from reports.page.text import breakable, count, estimate, listing, short
from reports.questions.tokens_figures import calibration_figure, hazard_figure, odds_figure, sample_label


def tokens_part(findings: TokenFindings) -> Part:
    """Compose what the drafted tokens say; without recorded confidence, the hazard alone."""
    blocks: list[Block] = []
    drawings: list[Drawing] = []
    with styled():
        if findings.regression is not None:
            drawings.append(odds_figure(findings, findings.regression))
            blocks += [
                Paragraph(_MODEL.format(k=findings.draft_tokens)),
                Figure.of(drawings[-1]),
                _odds_table(findings, findings.regression),
                *_effects(findings.regression),
            ]
        if findings.held_out is not None:
            drawings.append(calibration_figure(findings, findings.held_out))
            blocks += [
                Figure.of(drawings[-1]),
                _scores(findings, findings.held_out.scores, "on every token"),
                _scores(findings, findings.held_out.later, "on the second half of every output"),
            ]
        drawings.append(hazard_figure(findings))
    blocks += [Figure.of(drawings[-1]), Paragraph(_SURVIVAL), _hazards(findings)]
    return Part(
        key="tokens",
        title="Acceptance token by token",
        answer=_answer(findings),
        blocks=tuple(blocks),
        drawings=tuple(drawings),
        guidelines=_guidelines(findings),
        limits=_limits(findings),
    )


_MODEL = (
    "Every drafted token of rounds of {k} that was compared is one row: was it accepted, given that all before it "
    "were? The logistic regression has three fits. The estimating equations (Liang and Zeger 1986) average over "
    "prompts; with an exchangeable correlation of a prompt's tokens, and with independence, their intervals are "
    "robust and clustered by prompt, and drafters are fixed effects. The mixed model has random effects of prompts "
    "and drafters; its ratios hold within a prompt and a drafter, and its intervals take the effects of features "
    "to be the same in all prompts."
)
_SURVIVAL = (
    "A round survives depth d when its d-th draft is accepted. If every token were accepted independently at one "
    "rate, the hazard would be constant and the accepted length geometric. The test is Wald's, with covariance "
    "clustered by prompt and Holm's correction over drafters. The slopes tell where a change comes from: pooled "
    "over prompts; with a random effect of every prompt (frailty), which a fall that is only a mixture of easy and "
    "hard prompts does not survive; and given the drafter's confidence and entropy."
)


def _answer(findings: TokenFindings) -> Paragraph:
    if findings.regression is None or findings.held_out is None:
        return Paragraph(_hazard_answer(findings.hazards[0]), "Token acceptance")
    ratio = findings.regression.ratio("confidence")
    chosen = ratio.exchangeable or ratio.independence or ratio.mixed
    odds = "" if chosen is None else f": times {estimate(chosen)} for one standard deviation ({ratio.step})"
    score, raw = findings.held_out.score(NEW_PROMPT), findings.held_out.score(CONFIDENCE)
    better = "better" if (score.gain.low or 0.0) > 0 else "not surely better"
    return Paragraph(
        f"A drafter's confidence moves the odds that its token is accepted{odds}. On prompts not seen before, the "
        f"regression has a Brier score of {estimate(score.brier, 3)}, {better} than raw confidence taken as the "
        f"probability, {estimate(raw.brier, 3)}.",
        "Token acceptance",
    )


def _hazard_answer(curve: HazardCurve) -> str:
    return (
        f"The hazard of rejection by depth of {short(curve.drafter)} is {_WORDS[curve.verdict]}; its rounds accept "
        f"{estimate(curve.mean_accepted)} tokens (bonus not included), where the constant hazard gives "
        f"{curve.geometric_accepted:.2f}."
    )


def _odds_table(findings: TokenFindings, regression: Regression) -> Block:
    rows = [
        (
            breakable(r.feature),
            breakable(r.step, 28),
            *(_or_dash(e) for e in (r.exchangeable, r.independence, r.mixed)),
        )
        for r in regression.ratios
    ]
    return table(
        f"Odds ratios of acceptance with 95% intervals. {sample_label(findings)}",
        ("Feature", "Step", "Equations, exchangeable", "Equations, independent", "Mixed"),
        rows,
        "llrrr",
        ("1.1", "1.2", "1.2", "1.2", "1.2"),
        size=8.2,
    )


def _or_dash(value: Estimate | None) -> str:
    return "\u2014" if value is None else estimate(value)


def _signed(value: Estimate) -> str:
    """An estimate that may be negative: ``-0.17 (-0.21 to -0.13)`` with minus signs."""
    if value.value is None:
        return "\u2014"
    text = f"{value.value:.2f}"
    if value.low is not None and value.high is not None:
        text += f" ({value.low:.2f} to {value.high:.2f})"
    return text.replace("-", "\u2212")


def _effects(r: Regression) -> list[Block]:
    """What is left of prompts and drafters once the features are known."""
    said = []
    if r.correlation is not None:
        said.append(f"Two tokens of one prompt correlate by {r.correlation:.3f} given the features.")
    if r.prompt_sd is not None:
        drafter = "" if r.drafter_sd is None else f", drafters by {r.drafter_sd:.2f}"
        said.append(
            f"Prompts differ by a standard deviation of {r.prompt_sd:.2f} in log-odds{drafter} ({r.mixed_by})."
        )
    said += [f"{t[0].upper()}{t[1:]}." for t in r.troubles]
    return [Paragraph(" ".join(said))] if said else []


def _scores(findings: TokenFindings, scores: Sequence[Score], where: str) -> Block:
    rows = [
        (
            s.predictor,
            s.known,
            estimate(s.brier, 3),
            _signed(s.skill),
            estimate(s.ece, 3),
            estimate(s.auroc),
        )
        for s in scores
    ]
    return table(
        f"Held-out scores {where}: {FOLDS} folds of whole prompts. Skill is 1 less the Brier "
        f"score over that of the base rate; intervals over prompts. {sample_label(findings, scores[0].tokens)}",
        ("Predictor", "Knows", "Brier score", "Skill", "Calibration error", "AUROC"),
        rows,
        "llrrrr",
        ("1", "1.3", "1.2", "1.2", "1.2", "1.1"),
        size=8.0,
    )


def _hazards(findings: TokenFindings) -> Block:
    return table(
        f"Hazard of rejection in rounds of {findings.draft_tokens}: slopes are changes of its log-odds per depth, "
        "with 95% intervals clustered by prompt; lengths exclude the bonus token. [measured and fitted; n = "
        f"{findings.requests} requests, {len(findings.domains)} domains]",
        (
            "Drafter",
            "Hazard is",
            "p (Holm)",
            "Slope, pooled",
            "Slope within prompts",
            "Slope given confidence",
            "Accepted",
            "Geometric",
        ),
        [_hazard_row(curve) for curve in findings.hazards],
        "llrrrrrr",
        ("1.1", "0.8", "0.7", "1.2", "1.2", "1.2", "1.2", "0.8"),
        size=7.8,
    )


_WORDS = {
    "falls": "falling",
    "rises": "rising",
    "varies": "varying",
    "constant": "not told from constant",
    "untested": "untested",
}


def _hazard_row(curve: HazardCurve) -> tuple[str, ...]:
    t = curve.trend
    slopes = (None, None, None) if t is None else (t.marginal, t.within_prompts, t.given_confidence)
    p = "\u2014" if curve.adjusted is None else ("< 0.001" if curve.adjusted < 0.001 else f"{curve.adjusted:.3f}")
    return (
        short(curve.drafter),
        _WORDS[curve.verdict],
        p,
        *("\u2014" if s is None else _signed(s) for s in slopes),
        estimate(curve.mean_accepted),
        f"{curve.geometric_accepted:.2f}",
    )


def _guidelines(findings: TokenFindings) -> tuple[Paragraph, ...]:
    told = [_on_hazard(findings)]
    if findings.held_out is not None:
        told = [_on_confidence(findings.held_out), _on_prompts(findings.held_out), *told]
    return tuple(p for p in told if p is not None)


def _on_confidence(held_out: HeldOut) -> Paragraph:
    raw, base = held_out.score(CONFIDENCE), held_out.score(BASE)
    worse = (raw.brier.value or 0.0) > (base.brier.value or 0.0)
    lead = "Recalibrate confidence before a threshold is set on it."
    told = (
        f"as a probability it has a Brier score of {estimate(raw.brier, 3)}, "
        + ("worse than the base rate alone" if worse else "better than the base rate alone")
        + f" ({estimate(base.brier, 3)}); its ranking is good all the same (AUROC {estimate(raw.auroc)})"
    )
    new = next((s for s in held_out.scores if s.predictor == NEW_DRAFTER), None)
    also = "" if new is None else f". For a drafter never recorded, the regression has {estimate(new.brier, 3)}"
    return Paragraph(f"{told[0].upper()}{told[1:]}{also}.", lead)


def _on_prompts(held_out: HeldOut) -> Paragraph | None:
    later = {s.predictor: s for s in held_out.later}
    if SEEN_PROMPT not in later:
        return None
    seen, new = later[SEEN_PROMPT], later[NEW_PROMPT]
    return Paragraph(
        "Having seen the first half of an output takes the Brier score on its second half from "
        f"{estimate(new.brier, 3)} to {estimate(seen.brier, 3)}.",
        "What a request's own past is worth.",
    )


def _on_hazard(findings: TokenFindings) -> Paragraph | None:
    named = {
        verdict: listing([short(c.drafter) for c in findings.hazards if c.verdict == verdict])
        for verdict in ("falls", "rises", "varies", "constant")
    }
    moving = [f"{_WORDS[v]} for {named[v]}" for v in ("falls", "rises", "varies") if named[v]]
    if not moving:
        return None
    other = f"; for {named['constant']} nothing speaks against one" if named["constant"] else ""
    return Paragraph(
        f"The hazard of rejection by depth is {listing(moving)}, so that a constant acceptance rate misprices their "
        f"long drafts{other}.",
        "Do not use one acceptance rate for every depth.",
    )


def _limits(findings: TokenFindings) -> tuple[Paragraph, ...]:
    said = ["Odds ratios describe and do not cause: confidence, entropy and depth go together"]
    if findings.held_out is not None:
        scored = findings.held_out.scores[0].tokens
        said.append(
            f"scores are of {count(scored)} of {count(findings.tokens)} tokens, the same share of every prompt"
        )
    if findings.decoding != "greedy":
        said.append("acceptance was drawn once with its recorded probability; another draw moves the scores a little")
    return (Paragraph("; ".join([*said, *findings.notes]) + ".", "Token regression."),)
