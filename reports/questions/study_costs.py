"""Where the time goes, and how well the costs are known."""

from __future__ import annotations

from collections.abc import Mapping

from analysis.speedup.findings import Findings
from reports.page.document import Block, Figure, Paragraph, table
from reports.page.text import breakable, count, estimate, short
from reports.questions.figures import Drawing
from reports.questions.study_common import acceptance_row


def costs(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """Time per output token, cost ratios, and the fits."""
    blocks: list[Block] = [Figure.of(drawings["time-breakdown"])]
    if not findings.cost_fits:
        blocks.append(Paragraph(_not_fitted(findings)))
        return tuple(blocks)
    ratios = cost_ratios(findings)
    blocks.append(
        Paragraph(
            "Were verification free and acceptance independent, a drafter whose step costs c verifier steps "
            "would pay exactly if its rate of acceptance is above c (Leviathan et al. 2023); the table sets "
            "both side by side. Prices are those of the fits for one new token at batch 1, the mean over the "
            "timed contexts; a lookup proposes its whole draft in one step."
        )
    )
    if ratios:
        blocks.append(
            table(
                "Cost of a step relative to the verifier (c) and acceptance. [fitted, measured]",
                ("Drafter", "Step, ms", "c", "Position rate", "Geometric rate"),
                [
                    (
                        short(d),
                        f"{1000 * step:.3g}",
                        f"{c:.2f}",
                        estimate(row.position_rate),
                        estimate(row.geometric_rate),
                    )
                    for d, step, c in ratios
                    for row in [acceptance_row(findings, d, None, findings.reference_draft_tokens)]
                ],
                "lrrrr",
            )
        )
    blocks.append(Figure.of(drawings["cost-fit"]))
    blocks.append(
        table(
            "Fits of the step costs: configurations timed, the spread of their repeats (interquartile range "
            "over median), mean relative error of the fit, and mean and largest error on configurations that "
            "the fit had not seen. [measured, fitted]",
            (
                "Model",
                "Operation",
                "Configurations",
                "Spread of repeats",
                "Error",
                "Held-out error",
                "Largest held-out",
            ),
            [
                (
                    breakable(f.model),
                    f.operation,
                    count(len(f.points)),
                    *(
                        "\u2014" if e is None else f"{100 * e:.1f}%"
                        for e in (f.repeat_spread, f.error, f.held_out_error, f.held_out_worst)
                    ),
                )
                for f in findings.cost_fits
            ],
            "llrrrrr",
        )
    )
    return tuple(blocks)


def _not_fitted(findings: Findings) -> str:
    if findings.cost_source == "stated":
        return "Step costs were not fitted to timings: they are constants stated with the imported traces."
    return "Step costs were not fitted to timings: they were given with the study, and are assumed."


def cost_ratios(findings: Findings) -> list[tuple[str, float, float]]:
    """(drafter, seconds of its step, the same in verifier steps) of every drafter that was timed, at batch 1."""
    steps = {}
    for fit in findings.cost_fits:
        single = [p.fitted_s for p in fit.points if p.batch == 1 and p.new_tokens == 1]
        if single and fit.operation != "prefill":
            steps[fit.model] = sum(single) / len(single)
    verifier = steps.get(findings.provenance.models[0].name)
    if verifier is None:
        return []
    return [(d, steps[d], steps[d] / verifier) for d in findings.drafters if d in steps]
