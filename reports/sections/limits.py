"""What the findings do not say: limits of validity, each from the data at hand."""

from __future__ import annotations

from analysis.findings import Findings
from reports.document import Bullets, Paragraph
from reports.text import breakable, listing


def limits(findings: Findings) -> Bullets:
    """List the limits that apply to these findings."""
    items = [
        _sample(findings),
        _choice(findings),
        _replay(findings),
        _load(findings),
        _device(findings),
        costs(findings),
        _extrapolation(findings),
        _unknown(findings),
        *(Paragraph(breakable(text, 40), lead="Warning.") for text in findings.warnings),
    ]
    return Bullets(tuple(item for item in items if item is not None))


def _sample(findings: Findings) -> Paragraph:
    sizes = findings.sizes.requests
    fewest = min(sizes.values())
    counts = set(findings.sizes.requests_by_drafter.values())
    partly = "" if len(counts) == 1 else " Not every drafter was recorded on every request (see the table of models)."
    return Paragraph(
        f"{sum(sizes.values())} requests over {len(sizes)} domains, the smallest with {fewest}. The intervals "
        "say how much other prompts of the same kind would move the numbers; they know nothing of other kinds "
        f"of prompts. With {fewest} requests an interval covers a little less than it says.{partly}",
        lead="Sample.",
    )


def _choice(findings: Findings) -> Paragraph:
    cells = len({(c.drafter, c.draft_tokens) for c in findings.speedup})
    return Paragraph(
        f"The best of {cells} pairs of drafter and draft length is partly the luckiest one: its speed-up leans high, "
        "and its interval does not include the choosing. Near-equal lengths are listed for that reason.",
        lead="Choosing the best.",
    )


def _replay(findings: Findings) -> Paragraph:
    if findings.provenance.decoding.startswith("greedy"):
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
        "step shared by the requests in it.",
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


def costs(findings: Findings) -> Paragraph:
    if findings.cost_source != "fitted":
        whose = "stated with the import" if findings.cost_source == "stated" else "assumed"
        return Paragraph(
            f"Step costs were {whose}, not measured; every speed-up is only as good as they are.", lead="Costs."
        )
    errors = [f.held_out_error for f in findings.cost_fits if f.held_out_error is not None]
    size = f"up to {100 * max(errors):.0f}% off" if errors else "not checked"
    return Paragraph(
        f"Fitted step costs are {size} on timings that they had not seen. Part of such an error cancels in a "
        "ratio, but it is not in the intervals, which speak of requests alone. Timings on a shared machine "
        "move by as much.",
        lead="Costs.",
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
