"""Look-ups that several sections share.

What the findings do not say: limits of validity, each from the data at hand.

Where the numbers come from.

Where the time goes, and how well the costs are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.common.bootstrap import FEW
from analysis.speedup.acceptance import AcceptanceRow, DepthPoint
from analysis.speedup.findings import Findings
from calibration.traces.grades import RECORDED
from reports.page.document import Block, Bullets, Figure, Paragraph, evidence_line, grade_limits, table
from reports.page.text import acceptance_label, breakable, count, estimate, listing, parameters, sample, short
from reports.questions.figures import Drawing

_COLUMNS = 6
"""Drafters side by side in one table; more go into the next one."""


def acceptance_row(findings: Findings, drafter: str, domain: str | None, k: int) -> AcceptanceRow:
    """The acceptance of `drafter` on `domain` (None: all) at draft length `k`."""
    return next(r for r in findings.acceptance if (r.drafter, r.domain, r.draft_tokens) == (drafter, domain, k))


def depth_point(findings: Findings, drafter: str, depth: int) -> DepthPoint:
    """The acceptance of `drafter` at `depth`, all domains."""
    return next(p for p in findings.depth if (p.drafter, p.domain, p.depth) == (drafter, None, depth))


def request_count(findings: Findings) -> int:
    """Requests recorded, over all domains."""
    return sum(findings.sizes.requests.values())


def measured_label(findings: Findings) -> str:
    """End of the caption of a table of acceptance: recorded, imported or synthesised numbers."""
    return f"[{acceptance_label(findings)}; {sample(findings)}]"


def chunks(names: Sequence[str]) -> list[Sequence[str]]:
    """Divide names into rows of a table's width."""
    return [names[i : i + _COLUMNS] for i in range(0, len(names), _COLUMNS)]


def provenance(findings: Findings) -> tuple[Block, ...]:
    """Models, setting and sample sizes."""
    facts, sizes = findings.provenance, findings.sizes
    models = table(
        "Verifier and drafters. Parameters count everything once; those of the embedding and the output head "
        "are left out in the next column.",
        ("Model", "Role", "Parameters", "Without embedding", "Layers", "Weights", "Requests"),
        [
            (
                breakable(m.name),
                breakable(m.role),
                parameters(m.parameters),
                parameters(m.parameters_non_embedding),
                f"{m.layers}" if m.layers is not None else "none" if m.parameters == 0 else "unknown",
                breakable(m.dtype or ("none" if m.parameters == 0 else "unknown")),
                count(sizes.requests_by_drafter.get(m.name, request_count(findings))),
            )
            for m in facts.models
        ],
        "llrrrlr",
        ("1.6", "1.2", "auto", "auto", "auto", "0.8", "auto"),
    )
    memory = "" if facts.memory_bytes is None else f", {facts.memory_bytes / 2**30:.0f} GiB"
    threads = "" if facts.threads is None else f", {facts.threads} thread{'s' * (facts.threads != 1)}"
    setup = [
        ("Traces", f"{facts.kind}{' from ' + facts.import_format if facts.import_format else ''}, {facts.created}"),
        ("Grades", "" if facts.evidence is None else evidence_line([("", facts.evidence)])),
        ("Command", facts.command),
        ("Device", f"{facts.device} ({facts.device_kind}{memory}{threads})"),
        ("Software", ", ".join(f"{k} {v}" for k, v in sorted(facts.software.items())) or "unknown"),
        ("Decoding", facts.decoding),
        ("Prompts", ", ".join(f"{k} ({v})" for k, v in facts.prompts.items()) or "unknown"),
        ("Recorded", f"{sizes.positions:,} positions over all drafters; {sizes.timed_steps:,} timed steps"),
        ("Seeds", f"recording {'unknown' if facts.seed is None else facts.seed}, study {findings.settings.seed}"),
        ("Intervals", findings.method),
        ("Unknown", "; ".join(facts.unknown)),
        ("Notes", "; ".join(facts.notes)),
    ]
    how = table(
        "How it was recorded and studied.",
        ("Item", "What"),
        [(name, breakable(text, 40)) for name, text in setup if text],
        "ll",
        ("auto", "1"),
    )
    amounts = [(breakable(d), count(sizes.requests[d]), count(sizes.output_tokens[d])) for d in findings.domains]
    total = ("all", count(request_count(findings)), count(sum(sizes.output_tokens.values())))
    return (
        models,
        how,
        table(
            f"Sample sizes by domain. [{acceptance_label(findings)}]",
            ("Domain", "Requests", "Output tokens"),
            [*amounts, total],
            "lrr",
        ),
    )


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


_FEW_REQUESTS = 20
_MUCH_REPETITION = 0.02


def limits(findings: Findings) -> Bullets:
    """List the limits that apply to these findings."""
    items = [
        *grade_limits(findings.provenance.evidence),
        _sample(findings),
        _repetition(findings),
        _choice(findings),
        _replay(findings),
        _load(findings),
        _device(findings),
        _costs(findings),
        _suspicious(findings),
        _extrapolation(findings),
        _unknown(findings),
        *(Paragraph(breakable(text, 40), lead="Warning.") for text in findings.warnings),
    ]
    return Bullets(tuple(item for item in items if item is not None))


def _sample(findings: Findings) -> Paragraph:
    sizes = findings.sizes.requests
    total, fewest = sum(sizes.values()), min(sizes.values())
    text = (
        f"{total} requests over {len(sizes)} domains, the smallest with {fewest}. The intervals say how much "
        "other prompts of the same kind would move the numbers; they know nothing of other kinds of prompts."
    )
    if fewest < _FEW_REQUESTS:
        text += " Intervals over so few requests of a domain cover a little less often than they say."
    if fewest < FEW:
        text += f" Below {FEW} requests they are Student's t, and below 3 none is given."
    if any(count != total for count in findings.sizes.requests_by_drafter.values()):
        text += " Not every drafter was recorded on every request; each is compared with no speculation on its own."
    return Paragraph(text, lead="Sample.")


def _repetition(findings: Findings) -> Paragraph | None:
    share = findings.sizes.repetition
    if share is None or share < _MUCH_REPETITION:
        return None
    return Paragraph(
        f"{100 * share:.0f}% of the output tokens follow the same 16 tokens as once before in their own output: the "
        "verifier runs in circles there, and every drafter, prompt lookup most of all, finds such text easy. A "
        "verifier that repeats itself less will see less acceptance.",
        lead="Repetition.",
    )


def _choice(findings: Findings) -> Paragraph:
    cells = len({(c.drafter, c.draft_tokens, c.batch) for c in findings.speedup})
    return Paragraph(
        f"The fastest of {cells} combinations of drafter, draft length and batch size is partly the luckiest: its "
        "speed-up leans high. What is said to pay or to lose therefore stands on bounds that hold for all of them at "
        "once (max-t over the same bootstrap replicates); statements on single domains on such bounds for all "
        "domains. Where nothing pays, at most one such study in twenty says that something does.",
        lead="Choosing the best.",
    )


def _replay(findings: Findings) -> Paragraph:
    evidence = findings.provenance.evidence
    if evidence is not None and evidence.acceptance != RECORDED:
        text = (
            "The replay of what was imported is exact; how close that is to the live pair, the grade of acceptance "
            "says. Other decoding settings give other text and other acceptance."
        )
    elif findings.provenance.decoding.startswith("greedy"):
        text = (
            "Greedy replay is exact: acceptance is that of the live pair, token by token. Sampling at a temperature "
            "gives other text and other acceptance; record it to know."
        )
    else:
        text = (
            "Sampled replay is exact in distribution, given the recorded text; drafters that propose fixed "
            "tokens replay exactly. Greedy decoding gives other text and other acceptance; record it to know."
        )
    longest = f" Text beyond the recorded length ({findings.provenance.decoding}) is not known."
    return Paragraph(text + longest, lead="Replay.")


def _load(findings: Findings) -> Paragraph:
    return Paragraph(
        "Every simulation keeps its batch full of the recorded requests. There are no arrivals, no queue and "
        "no limit on cache memory; under light load the batch of a real engine is smaller than its maximum. A "
        "domain's figures are of its requests served among those of the other domains, with the time of a "
        "step shared by the requests in it. The drafter's own reading of the prompt is not charged.",
        lead="Load.",
    )


def _device(findings: Findings) -> Paragraph:
    facts = findings.provenance
    text = f"Costs are those of {breakable(facts.device)}."
    if facts.device_kind == "cpu":
        text += (
            " On a CPU the verifier is bound by arithmetic already at small batches, so each further token to "
            "verify has its price; on a GPU those tokens are almost free until the batch is large. The "
            "acceptance in this report carries over to any device, the speed-ups do not."
        )
    return Paragraph(text, lead="Device.")


def _costs(findings: Findings) -> Paragraph:
    if findings.cost_source != "fitted":
        whose = "stated with the import" if findings.cost_source == "stated" else "assumed"
        return Paragraph(
            f"Step costs were {whose}, not measured; every speed-up is only as good as they are.", lead="Costs."
        )
    head = findings.answer.headline
    error = findings.run(head.drafter, head.speculative_tokens, head.batch).cost_error
    verify = [
        f.held_out_error for f in findings.cost_fits if f.operation == "verify" and f.held_out_error is not None
    ]
    size = (
        f"the verifier's steps are off by {100 * verify[0]:.0f}% on average" if verify else "nothing could be checked"
    )
    weighted = "" if error is None else f"; weighted by where the time of the headline's run goes, {100 * error:.0f}%"
    return Paragraph(
        f"On timings left out of the fit, {size}{weighted}. {_cost_draws(findings)} Timings on a shared machine move "
        "by as much.",
        lead="Costs.",
    )


def _cost_draws(findings: Findings) -> str:
    if any(row.with_costs is None for row in findings.best):
        return (
            "Where steps were timed too sparsely to hold any out, intervals speak of requests alone; part of an "
            "error of the costs cancels in a ratio."
        )
    return (
        "Intervals with costs price the same schedule by fits to resampled timings, times an error for each timed "
        "configuration as large as the held-out ones (root mean square), drawn as independent between configurations "
        "(what two runs share cancels). Intervals over requests take the costs as fitted."
    )


def _suspicious(findings: Findings) -> Paragraph | None:
    """Drafters that are smaller than the verifier and were timed slower: the machine was busy with something else."""
    sizes = {m.name: m.parameters_non_embedding for m in findings.provenance.models}
    whole = sizes[findings.provenance.models[0].name]
    slower = [
        breakable(drafter)
        for drafter, _, ratio in cost_ratios(findings)
        if ratio > 1 and whole is not None and (sizes[drafter] or whole) < whole
    ]
    if not slower:
        return None
    return Paragraph(
        f"A step of {listing(slower)} was timed slower than one of the verifier, which is larger. Either it "
        "keeps the device less busy or the timings were disturbed; record them again on a quiet machine "
        "before relying on it.",
        lead="Timings.",
    )


def _extrapolation(findings: Findings) -> Paragraph | None:
    rows = {(c.draft_tokens, c.batch) for c in findings.speedup if c.extrapolated}
    if not rows:
        return None
    batches = sorted({b for _, b in rows})
    return Paragraph(
        f"{len(rows)} pairs of draft length and batch size were priced partly outside the timed range "
        f"(batch {listing([str(b) for b in batches])}); they are marked with a star or a hollow mark.",
        lead="Extrapolation.",
    )


def _unknown(findings: Findings) -> Paragraph | None:
    if not findings.provenance.unknown:
        return None
    return Paragraph("; ".join(breakable(u, 40) for u in findings.provenance.unknown) + ".", lead="Not known.")
