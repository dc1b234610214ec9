"""The knowledge question in the report: a generalist, or specialists and a router?"""

from __future__ import annotations

from analysis.knowledge.findings import KnowledgeFindings, PairedRow, RouterValue
from reports.page.document import Block, Figure, Paragraph, Part, table
from reports.page.drawing import styled
from reports.page.text import breakable, count, estimate, listing, named, percent, short
from reports.questions.knowledge_figures import costs_label, paired_forest, router_curves, sample_label, transfer_map


def knowledge_part(findings: KnowledgeFindings) -> Part:
    """Give what `findings` contribute to a report."""
    with styled():
        drawings = (paired_forest(findings), transfer_map(findings), router_curves(findings))
    forest, transfer, router = (Figure.of(drawing) for drawing in drawings)
    blocks: list[Block] = [_setting(findings), forest, _home_table(findings), transfer, _transfer_text(findings)]
    blocks += [router, _router_text(findings), _router_table(findings)]
    if findings.published:
        blocks.append(_published_table(findings))
    return Part(
        key="knowledge",
        title="Generalist or specialists",
        answer=_answer(findings),
        blocks=tuple(blocks),
        drawings=drawings,
        guidelines=_guidelines(findings),
        limits=_limits(findings),
    )


def _answer(findings: KnowledgeFindings) -> Paragraph:
    pooled, router = findings.pooled, findings.routers[-1]
    words = {
        "better": "specialists on their home domains beat a generalist of the same cost",
        "worse": "a generalist beats specialists of the same cost even on their home domains",
        "cannot tell apart": "specialists at home and a generalist of the same cost cannot be told apart",
    }[pooled.verdict]
    p = _p(pooled.p_value)
    text = (
        f"Here {words}: {estimate(pooled.difference)} tokens per round more for the specialists (p "
        f"{p if p.startswith('<') else f'= {p}'}, {pooled.difference.requests} prompts). "
    )
    return Paragraph(text + _even_words(router), lead="Generalist or specialists")


def _even_words(router: RouterValue) -> str:
    even = router.break_even
    if even.value is None or even.value > 1:
        return "No router accuracy makes the specialists pay on this traffic."
    return (
        f"Someone must choose between them: a router that errs at random must be right {estimate(even)} of the time "
        f"before it beats the generalist (chance is {router.chance:.2f}), and one that is always right gains "
        f"{_gain(router)}% ({router.price.name} prices)."
    )


def _gain(router: RouterValue) -> str:
    import dataclasses

    gain = router.gain
    shifted = (None if x is None else x - 1 for x in (gain.value, gain.low, gain.high))
    value, low, high = shifted
    return percent(dataclasses.replace(gain, value=value, low=low, high=high), 1)


def _setting(findings: KnowledgeFindings) -> Paragraph:
    general = findings.generalist
    size = f"{general.parameters / 1e6:.1f} M parameters" if general.parameters else "unknown size"
    home = listing([f"{named(s.name)} on {named(s.home or '')}" for s in findings.specialists])
    trained = ""
    if general.texts and all(s.texts for s in findings.specialists):
        texts = [s.texts or 0 for s in findings.specialists]
        trained = (
            f" All trained on about {count(general.tokens or 0)} tokens: the generalist on {count(general.texts)} "
            f"different texts, the specialists on {count(min(texts))} to {count(max(texts))} each, read more often."
        )
    return Paragraph(
        f"{named(general.name)} ({size}) is the generalist; the specialists, of the same shape and cost, are "
        f"{home}.{trained}"
    )


def _home_table(findings: KnowledgeFindings) -> Block:
    rows = [_home_row(row, short(row.domain or "", 14)) for row in findings.paired if row.home]
    rows.append(_home_row(findings.pooled, "all homes"))
    return table(
        f"Specialists at home against {short(findings.generalist.name)}: tokens per round, bonus included, draft "
        f"length {findings.draft_tokens}, with 95% intervals; p by a sign-flip permutation test over prompts, "
        f"adjusted by Holm's method over the home domains. {sample_label(findings, 'measured')}",
        ("Home domain", "Prompts", "Specialist", "Generalist", "Difference", "p", "Adjusted p", "Specialist is"),
        rows,
        "lrrrrrrl",
        size=8.2,
    )


def _home_row(row: PairedRow, name: str) -> tuple[str, ...]:
    return (
        name,
        str(row.difference.requests),
        f"{row.specialist_tokens.value or 0:.2f}",
        f"{row.generalist_tokens.value or 0:.2f}",
        estimate(row.difference),
        _p(row.p_value),
        _p(row.p_adjusted),
        row.verdict,
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _transfer_text(findings: KnowledgeFindings) -> Paragraph:
    away = [row for row in findings.paired if not row.home]
    worse, better = (sum(row.verdict == verdict for row in away) for verdict in ("worse", "better"))
    cells = [
        c for c in findings.transfer if c.domain != _home_of(findings, c.drafter) and c.relative.value is not None
    ]
    least = min(cells, key=lambda c: c.relative.value or 0.0)
    return Paragraph(
        f"Away from home {worse} of {len(away)} pairs are worse than the generalist after correction, {better} "
        f"better. The farthest is {named(least.drafter)} on {named(least.domain)}, which accepts "
        f"{estimate(least.together)} of what the generalist does (bounds for all pairs at once): what a wrong choice "
        "costs."
    )


def _home_of(findings: KnowledgeFindings, drafter: str) -> str | None:
    return next(student.home for student in findings.specialists if student.name == drafter)


def _router_text(findings: KnowledgeFindings) -> Paragraph:
    router = findings.routers[-1]
    slow = [r for r in findings.routers if (r.level("oracle by request").speedup.high or 1) < 1]
    loses = f" At {listing([r.price.name for r in slow])} prices speculation itself does not pay." if slow else ""
    return Paragraph(
        f"A router whose misses all go to the generalist lies between the generalist and the true label, whatever "
        f"its accuracy. Where every request belongs to a specialist's domain, the break-even accuracy is "
        f"{estimate(router.break_even_at_home)}. Choosing the better drafter anew in every round would give "
        f"{estimate(router.level('oracle by round').speedup)} times, against "
        f"{estimate(router.level('oracle by request').speedup)} by request and "
        f"{estimate(router.level('label').speedup)} by the true label ({router.price.name} prices).{loses}"
    )


def _router_table(findings: KnowledgeFindings) -> Block:
    rows = [
        (
            short(router.price.name) if index == 0 else "",
            level.choice,
            estimate(level.tokens_per_round),
            estimate(level.speedup),
        )
        for router in findings.routers
        for index, level in enumerate(router.levels)
    ]
    notes = "; ".join(
        f"{r.price.name}: {r.price.text}, draft length {r.draft_tokens} (best for the generalist)"
        for r in findings.routers
    )
    return table(
        f"What each way to choose comes to at batch 1: tokens per round (bonus included) and speed-up over no "
        f"speculation, 95% intervals over prompts. {breakable(notes)}. "
        f"{sample_label(findings, costs_label(findings))}",
        ("Prices", "Drafter chosen by", "Tokens per round", "Speed-up"),
        rows,
        "llrr",
    )


def _published_table(findings: KnowledgeFindings) -> Block:
    rows = [
        (breakable(row.source, 40), breakable(row.setting, 40), f"{row.generic:.3f}", f"{row.tuned:.3f}")
        for row in findings.published
    ]
    return table(
        "Beside it, what others published: accepted over drafted tokens of a generic drafter and of a tuned one; no "
        "intervals are known. [published; not measured here]",
        ("Source", "Setting", "Generic", "Tuned"),
        rows,
        "llrr",
        ("1.1", "1.2", "auto", "auto"),
        size=8.2,
    )


def _guidelines(findings: KnowledgeFindings) -> tuple[Paragraph, ...]:
    router = findings.routers[-1]
    even = router.break_even
    if findings.pooled.verdict != "better" or even.value is None or even.value > 1:
        return (
            Paragraph(
                "Serve one generalist drafter: specialists of the same cost do not pay here.", lead="One generalist."
            ),
        )
    return (
        Paragraph(
            f"Use specialists only behind a router whose accuracy on your traffic is above "
            f"{min(even.high or even.value, 1.0):.2f} (the upper end of the break-even interval), or one that falls "
            "back to the generalist when unsure.",
            lead="Specialists need a router.",
        ),
        Paragraph(
            f"Keep the generalist loaded for domains without a specialist{_away(findings)}.",
            lead="Keep a generalist.",
        ),
    )


def _away(findings: KnowledgeFindings) -> str:
    """What became of specialists away from home."""
    better = [f"{named(r.specialist or '')} on {named(r.domain or '')}" for r in findings.paired if _beats_away(r)]
    if better:
        return f", but for {listing(better)}, which was better there"
    return ": away from home no specialist is shown to be better"


def _beats_away(row: PairedRow) -> bool:
    return not row.home and row.verdict == "better"


def _limits(findings: KnowledgeFindings) -> tuple[Paragraph, ...]:
    least = min(findings.requests.values())
    texts = [s.texts for s in findings.specialists if s.texts]
    found = [
        Paragraph(
            f"{least} prompts in the smallest domain: a difference that is not shown is not shown to be absent.",
            lead="Few prompts.",
        ),
        Paragraph(
            "Speed-ups are at batch 1 and by prices as named; in larger batches requests of several drafters wait "
            "for each other.",
            lead="Batch 1.",
        ),
    ]
    if texts:
        found.insert(
            0,
            Paragraph(
                f"The specialists saw {count(min(texts))} to {count(max(texts))} different texts each, the "
                f"generalist {count(findings.generalist.texts or 0)}, for the same number of trained tokens. With "
                "more text of their domain specialists may gain more, and transfer less badly. One training run "
                "each: nothing is known of the spread between runs.",
                lead="Little text.",
            ),
        )
    return tuple(found)
