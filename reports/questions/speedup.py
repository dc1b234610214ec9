"""The speed-up map, and the best draft lengths that follow from it.

Acceptance: by definition, by domain, by depth, and against the constant-rate formula.

The table of page one.

The report from findings to sections.
"""

from __future__ import annotations

from collections.abc import Mapping

from analysis.common.bootstrap import Estimate
from analysis.speedup.findings import Findings
from analysis.speedup.speedup import BestLength
from reports.page.document import Block, Bullets, Document, Figure, Paragraph, Section, Table, evidence_line, table
from reports.page.text import DASH, acceptance_label, breakable, estimate, listing, percent, sample, short, sim_label
from reports.questions import answer
from reports.questions.answer import study_guidelines
from reports.questions.figures import Drawing
from reports.questions.limits import acceptance_row, chunks, costs, depth_point, limits, measured_label, provenance

__all__ = ["compose", "study_sections"]


def speedup(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """The map, the best length per batch size, and the same by domain."""
    batches = findings.settings.batches
    rows = []
    for drafter in findings.drafters:
        found = [answer.best_at(findings, drafter, b) for b in batches]
        rows.append((short(drafter), *("\u2014" if r is None else _length(r) for r in found)))
    cause = "requests and the error of the fitted costs" if _costs_known(findings) else "requests"
    blocks: list[Block] = [
        Figure.of(drawings["speedup-map"]),
        _headline_by_batch(findings),
        table(
            "Fastest draft length by batch size, all domains; 0 means do not speculate. In brackets the lengths "
            f"that may be as fast, given the {cause} (multiple comparisons with the best, 95%). "
            f"[{sim_label(findings)}; {sample(findings)}]",
            ("Drafter", *(f"Batch {b}" for b in batches)),
            rows,
            "l" + "c" * len(batches),
            ("1.2", *("1",) * len(batches)),
        ),
    ]
    return (*blocks, *_best_by_domain(findings))


def _headline_by_batch(findings: Findings) -> Table:
    """The headline's drafter at every batch size: its intervals, what they say, and the recommended length."""
    drafter = findings.answer.headline.drafter
    schedule = next(s for s in findings.schedules if s.drafter == drafter and s.domain is None)
    recommended = dict(zip(schedule.batches, schedule.draft_tokens, strict=True))
    rows = []
    for batch in schedule.batches:
        row = answer.best_at(findings, drafter, batch)
        if row is not None:
            costs = "\u2014" if row.with_costs is None else _range(row.with_costs)
            intervals = (estimate(row.speedup), _range(row.simultaneous), costs)
            length = f"{row.speculative_tokens}"
            rows.append((f"{batch}", length, *intervals, _reading(row), f"{recommended[batch]}"))
    return table(
        f"{short(drafter)} at its fastest length by batch size (of those shown to pay, where some are), all domains: "
        "the speed-up with the 95% interval of a length chosen beforehand; the simultaneous one that holds for every "
        "drafter, length and batch size tried, over requests, and over requests and fitted costs; what is said of "
        "it; and the length to use, which does not grow with the batch where the data cannot tell. "
        f"[{sim_label(findings)}; {sample(findings)}]",
        ("Batch", "Length", "Speed-up", "Simultaneous", "With costs", "Verdict", "Recommended"),
        rows,
        "rrrrrlr",
    )


def _reading(row: BestLength) -> str:
    if row.within_costs:
        return "pays (requests only)"
    return "pays" if row.pays else "loses" if row.loses else "not shown"


def _range(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return "\u2014"
    return f"{value.low:.2f}{DASH}{value.high:.2f}"


def _costs_known(findings: Findings) -> bool:
    return all(row.with_costs is not None for row in findings.best)


def _best_by_domain(findings: Findings) -> list[Block]:
    """Best lengths per domain and batch of the drafters that have one above 0; the others in a sentence."""
    batches = findings.settings.batches
    rows, never = [], []
    for drafter in findings.drafters:
        mine = [r for r in findings.best if r.drafter == drafter and r.domain is not None]
        if not any(r.draft_tokens for r in mine):
            never.append(breakable(drafter))
            continue
        for index, domain in enumerate(findings.domains):
            cells = []
            for b in batches:
                best = answer.best_at(findings, drafter, b, domain)
                if best is None or best.speedup.value is None:
                    cells.append("\u2014")
                elif best.draft_tokens == 0:
                    cells.append("0")
                else:
                    sign = "" if best.pays and not best.within_costs else " c" if best.pays else " ?"
                    cells.append(f"{best.draft_tokens}: {best.speedup.value:.2f}{sign}")
            rows.append((short(drafter) if index == 0 else "", breakable(domain, 16), *cells))
    blocks: list[Block] = []
    if rows:
        blocks.append(
            table(
                "Fastest draft length and its speed-up by domain and batch size; a question mark where it is not "
                "shown to pay by bounds that hold for all domains, drafters, lengths and batch sizes at once, a c "
                "where it pays for the requests only: the gain is within the error of the fitted costs. "
                f"[{sim_label(findings)}; {sample(findings)}]",
                ("Drafter", "Domain", *(f"Batch {b}" for b in batches)),
                rows,
                "ll" + "r" * len(batches),
                ("1.2", "1.1", *("1",) * len(batches)),
            )
        )
    if never:
        blocks.append(
            Paragraph(f"On every domain and at every batch size the fastest draft length is 0 for {listing(never)}.")
        )
    return blocks


def _length(row: BestLength) -> str:
    alike = row.indistinct if row.indistinct_with_costs is None else row.indistinct_with_costs
    others = [str(k) for k in alike if k != row.draft_tokens]
    return f"{row.draft_tokens} [{', '.join(others)}]" if others else f"{row.draft_tokens}"


def acceptance(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """The definitions side by side, then the domains."""
    k = findings.reference_draft_tokens
    rows = []
    for drafter in findings.drafters:
        row = acceptance_row(findings, drafter, None, k)
        first, last = depth_point(findings, drafter, 1), depth_point(findings, drafter, k)
        values = (row.accepted_per_drafted, row.geometric_rate, row.position_rate, row.mean_overlap)
        rows.append(
            (short(drafter), *(estimate(v) for v in values), estimate(first.conditional), estimate(last.conditional))
        )
    meaning = (
        "Four numbers go by the name of acceptance rate; they differ, and none can stand in for another. "
        f"Accepted per drafted is what engines log; it falls with the draft length (here {k}) because a "
        "rejection wastes the drafts behind it. The geometric rate is the maximum likelihood estimate if "
        "every draft were accepted independently at one rate. The position rate asks at every position of the "
        "text whether the drafter would be right there. The overlap is the mean of sum min(p, q) of the two "
        "models at temperature 1"
        + (", a diagnostic where decoding is greedy. " if findings.provenance.decoding.startswith("greedy") else ". ")
        + "The last two columns are conditional on all drafts before being accepted."
    )
    return (
        Paragraph(meaning),
        table(
            f"Acceptance by definition, all domains. Rounds draft {k} tokens. {measured_label(findings)}",
            (
                "Drafter",
                "Accepted per drafted",
                "Geometric rate",
                "Position rate",
                "Mean overlap",
                "At depth 1",
                f"At depth {k}",
            ),
            rows,
            "lrrrrrr",
            ("1.1", *("1",) * 6),
            size=8.2,
        ),
        Figure.of(drawings["acceptance-by-domain"]),
        *_by_domain(findings, k),
    )


def _by_domain(findings: Findings, k: int) -> list[Block]:
    domains: list[str | None] = [*findings.domains, None]
    return [
        table(
            f"Accepted per drafted at draft length {k}, with 95% intervals. {measured_label(findings)}",
            ("Domain", *(short(d, 16) for d in names)),
            [
                (
                    "all" if domain is None else breakable(domain, 16),
                    *(estimate(acceptance_row(findings, name, domain, k).accepted_per_drafted) for name in names),
                )
                for domain in domains
            ],
            "l" + "r" * len(names),
            ("1", *("1.1",) * len(names)),
            size=8.2,
        )
        for names in chunks(findings.drafters)
    ]


def depth(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """Acceptance by depth, and how far a constant rate is off."""
    lengths = findings.settings.draft_tokens
    rows = []
    for drafter in findings.drafters:
        mine = {r.draft_tokens: r for r in findings.acceptance if r.drafter == drafter and r.domain is None}
        rows.append((short(drafter), *(percent(mine[k].formula_error) if k in mine else "\u2014" for k in lengths)))
    return (
        Figure.of(drawings["acceptance-by-depth"]),
        Paragraph(
            "A draft cut short by the end of the text counts as compared up to there, not as rejected "
            "(right-censored); rounds whose drafts and bonus token do not fit before the end are left out of "
            "rates per round. A drafter that proposes nothing at a position plays a round of one token."
        ),
        Figure.of(drawings["constant-rate-formula"]),
        Paragraph(
            "The formula (1 \u2212 a^(k+1)) / (1 \u2212 a) takes acceptance to be independent from token to token. "
            "Recorded acceptance comes in runs, which raises the yield of a round, and rounds start right after a "
            "rejection, where the text is hard, which lowers it. The table gives the sum of both."
        ),
        table(
            "Error of the constant-rate formula in tokens per round, in percent with 95% intervals, by draft length: "
            f"positive where it promises too much. {measured_label(findings)}",
            ("Drafter", *(f"Draft {k}" for k in lengths)),
            rows,
            "l" + "r" * len(lengths),
            ("1.1", *("1.2",) * len(lengths)),
            size=8.2,
        ),
    )


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


def compose(findings: Findings, drawings: Mapping[str, Drawing]) -> Document:
    """Arrange the report of one study; without `drawings` its front alone, for a template to go on with."""
    facts = findings.provenance
    date = facts.created[:10]
    year, month, day = (int(part) for part in date.split("-"))
    verifier = breakable(facts.models[0].name)
    return Document(
        title="Does speculative decoding pay?",
        kicker="paceline report",
        subtitle=f"{verifier} with {answer.number(len(findings.drafters))} drafters on {breakable(facts.device)}; "
        f"{facts.decoding}; {facts.kind} {date}.",
        running=f"Does speculative decoding pay? {short(facts.models[0].name)} on {short(facts.device, 40)}",
        footer=f"[{acceptance_label(findings)}] acceptance, replayed   [simulated] served in SimPy, costs "
        f"{findings.cost_source}",
        date=date,
        created=(year, month, day),
        question=answer.question(findings),
        verdict=answer.verdict(findings),
        answer=tuple(answer.explanation(findings)),
        evidence=evidence_line([("Study", facts.evidence)] if facts.evidence is not None else []),
        front=(summary(findings), Figure.of(drawings["speedup-by-batch"])) if drawings else (),
        sections=(
            *study_sections(findings, drawings),
            Section("Guidelines in plain words", (Bullets(study_guidelines(findings)),)),
            Section("Limits of validity", (limits(findings),)),
        )
        if drawings
        else (),
    )


def study_sections(findings: Findings, drawings: Mapping[str, Drawing]) -> tuple[Section, ...]:
    """Give the sections of a study: sources, acceptance, speed-up and costs."""
    return (
        Section("Where the numbers come from", provenance(findings)),
        Section("Acceptance by domain and drafter", acceptance(findings, drawings)),
        Section("Acceptance by depth, and the constant-rate formula", depth(findings, drawings)),
        Section("The speed-up map", speedup(findings, drawings)),
        Section("Where the time goes, and how well it is known", costs(findings, drawings)),
    )
