"""Acceptance: by definition, by domain, by depth, and against the constant-rate formula."""

from __future__ import annotations

from collections.abc import Mapping

from analysis.speedup.findings import Findings
from reports.page.document import Block, Figure, Paragraph, table
from reports.page.text import breakable, estimate, percent, short
from reports.questions.figures import Drawing
from reports.questions.study_common import acceptance_row, chunks, depth_point, measured_label


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
