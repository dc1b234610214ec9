"""Where the numbers come from."""

from __future__ import annotations

from analysis.speedup.findings import Findings
from reports.page.document import Block, table
from reports.page.evidence import evidence_line
from reports.page.text import acceptance_label, breakable, count, parameters
from reports.questions.study_common import request_count


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
