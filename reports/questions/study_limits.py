"""What the findings do not say: limits of validity, each from the data at hand."""

from __future__ import annotations

from analysis.common.bootstrap import FEW
from analysis.speedup.findings import Findings
from calibration.traces.grades import RECORDED
from reports.page.document import Bullets, Paragraph
from reports.page.evidence import grade_limits
from reports.page.text import breakable, listing
from reports.questions.study_costs import cost_ratios

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
