"""The table of page one."""

from __future__ import annotations

from analysis.speedup.findings import Findings
from reports.page.document import Table, table
from reports.page.text import acceptance_label, estimate, sample, short, sim_label
from reports.questions import answer
from reports.questions.study_common import acceptance_row


def summary(findings: Findings) -> Table:
    """Every drafter at the smallest batch size, in one row each."""
    head = findings.answer.headline
    k = findings.reference_draft_tokens
    size = findings.provenance.models[0].parameters
    rows = []
    for model in findings.provenance.models[1:]:
        best = answer.best_at(findings, model.name, head.batch)
        if best is None:
            continue
        got = answer.cell(findings, best)
        accepted = acceptance_row(findings, model.name, None, k).accepted_per_drafted.value
        crossover = next(c for c in findings.crossovers if c.drafter == model.name and c.domain is None)
        relative = "?" if model.parameters is None or not size else f"{model.parameters / size:.2f}"
        rows.append(
            (
                short(model.name),
                relative,
                "\u2014" if accepted is None else f"{accepted:.2f}",
                f"{best.speculative_tokens}",
                estimate(answer.judged(best)),
                _plain(got.tokens_per_round),
                _plain(got.break_even_tokens),
                answer.pays_at(crossover),
            )
        )
    return table(
        f"Every drafter at batch {head.batch}, all domains: its size relative to the verifier, accepted per "
        f"drafted at draft length {k}, its fastest draft length (of those shown to pay, where some are), the "
        f"speed-up there with the 95% interval that decides what pays (over {_over(findings)}, for all drafters, "
        "lengths and batch sizes at once), tokens per round (bonus included), break-even tokens per round, and the "
        "batch sizes at which it is shown to pay (in brackets: for the requests only). "
        f"[{acceptance_label(findings)}, {sim_label(findings)}; {sample(findings)}]",
        ("Drafter", "Size", "Accepted", "Length", "Speed-up", "Tokens", "Break-even", "Pays at batch"),
        rows,
        "lrrrrrrr",
        ("1", *("auto",) * 7),
    )


def _plain(value: float | None) -> str:
    return "\u2014" if value is None else f"{value:.2f}"


def _over(findings: Findings) -> str:
    return "requests" if findings.answer.headline.with_costs is None else "requests and fitted costs"
