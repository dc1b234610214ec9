"""Routing in the report: is it worth choosing the drafter by request, and who should choose?"""

from __future__ import annotations

import dataclasses

from analysis.common.bootstrap import Estimate
from analysis.routing.findings import BatchRow, PolicyRow, PricedRouting, RoutingFindings
from reports.page.document import Block, Figure, Paragraph, Part, table
from reports.page.drawing import Drawing, styled
from reports.page.text import breakable, estimate, listing, named, percent, short
from reports.questions.routing_figures import (
    costs_label,
    drift_curves,
    regret_curves,
    regret_dots,
    reliability_plot,
    sample_label,
)

_BY_ROUND = "oracle by round"
_MARKS = {"beats it": "+", "loses to it": "\u2212", "cannot tell apart": "="}


def routing_part(findings: RoutingFindings) -> Part:
    """Give what `findings` contribute to a report; drift and draft lengths are shown for the last price list."""
    last = findings.prices[-1]
    with styled():
        drawings: list[Drawing] = [regret_dots(findings)]
        if findings.classifier is not None:
            drawings.append(reliability_plot(findings, findings.classifier))
        drawings.append(regret_curves(findings))
        if last.drift is not None:
            drawings.append(drift_curves(findings, last))
    figure = {drawing.name: Figure.of(drawing) for drawing in drawings}
    blocks: list[Block] = [_setting(findings), _traffic_table(findings), _traffic_text(findings)]
    blocks += [figure["routing-regret"], *_batch_blocks(findings), _classifier_text(findings)]
    blocks += [figure[name] for name in ("routing-reliability", "routing-growth", "routing-drift") if name in figure]
    blocks += _online_blocks(findings)
    return Part(
        key="routing",
        title="Routing to drafters",
        answer=_answer(findings),
        blocks=tuple(blocks),
        drawings=tuple(drawings),
        guidelines=_guidelines(findings),
        limits=_limits(findings),
    )


def best_router(routing: PricedRouting) -> PolicyRow:
    """What does best on mixed traffic of all that an engine could run, single drafters aside."""
    rows = [r for r in routing.rows if r.domain is None and not r.oracle and not r.policy.startswith("always ")]
    return max(rows, key=lambda row: row.speedup.value or 0.0)


def _answer(findings: RoutingFindings) -> Paragraph:
    sentences = []
    for routing in findings.prices:
        row, oracle = best_router(routing), routing.row("oracle by request")
        sentences.append(
            f"At {routing.price.name} prices the best way to choose on mixed traffic ({row.policy}) "
            f"{_verdict_words(row)} the best single drafter, {named(row.best_single)}: "
            f"{_gain(row.against_together)}% of throughput at batch 1, where the oracle by request has "
            f"{_gain(oracle.against_together)}%.{_rivals(routing, row)}"
        )
        if _never_pays(routing):
            worth = estimate(row.speedup_together)
            sentences.append(f"Speculation itself does not pay there ({worth} times no speculation).")
    sentences.append("Bounds hold for all ways to choose and all drafters at once (95%).")
    return Paragraph(" ".join(sentences), lead="Routing")


def _rivals(routing: PricedRouting, row: PolicyRow) -> str:
    """How many others may be as good."""
    fair = [r.policy for r in routing.rows if r.domain is None and not r.oracle]
    others = [name for name in routing.alike if name != row.policy]
    return f" {len(others)} of {len(fair) - 1} others, single drafters included, may be as good." if others else ""


def _never_pays(routing: PricedRouting) -> bool:
    """Whether everything that an engine could run on mixed traffic is shown to be slower than no speculation."""
    highs = [r.speedup_together.high for r in routing.rows if r.domain is None and not r.oracle]
    return all(high is not None and high < 1 for high in highs)


def _verdict_words(row: PolicyRow) -> str:
    if row.against_single.low == row.against_single.high == 1:
        return "always takes"
    return {"beats it": "beats", "loses to it": "loses to", "cannot tell apart": "cannot be told apart from"}[
        row.verdict
    ]


def _gain(ratio: Estimate) -> str:
    value, low, high = (None if x is None else x - 1 for x in (ratio.value, ratio.low, ratio.high))
    return percent(dataclasses.replace(ratio, value=value, low=low, high=high), 1)


def _setting(findings: RoutingFindings) -> Paragraph:
    prices = "; ".join(f"{p.price.name}: {p.price.text}, draft length {p.draft_tokens}" for p in findings.prices)
    return Paragraph(
        f"The drafters are {listing([named(name) for name in findings.drafters])}. Every drafter drafts equally "
        "long, at the length where the best single drafter is best; that drafter, chosen in hindsight on the very "
        f"traffic, is what routers must beat. Prices: {breakable(prices)}."
    )


def _traffic_table(findings: RoutingFindings) -> Block:
    rows = []
    for routing in findings.prices:
        for index, domain in enumerate((None, *sorted(findings.requests))):
            mine = [row for row in routing.rows if row.domain == domain]
            fair = [row for row in mine if not row.oracle and not row.policy.startswith("always ")]
            best = max(fair, key=lambda row: row.speedup.value or 0.0, default=None)
            oracle = next(row for row in mine if row.policy == "oracle by request")
            rows.append(
                (
                    short(routing.price.name) if index == 0 else "",
                    "mixed" if domain is None else short(domain, 14),
                    short(oracle.best_single, 22),
                    "\u2014" if best is None else short(best.policy, 26),
                    "\u2014" if best is None else f"{estimate(best.against_together)} {_MARKS[best.verdict]}",
                    estimate(oracle.against_together),
                )
            )
    return table(
        "Who wins on which traffic at batch 1: the best single drafter there, the best way to choose that an "
        "engine could run, and its throughput over that drafter's (+ beats it, \u2212 loses to it, = cannot "
        "be told apart); beside it the oracle by request. Bounds hold for all policies and drafters on mixed traffic "
        "at once, and for all of them and all domains at once (95%). "
        f"{sample_label(findings, costs_label(findings))}",
        ("Prices", "Traffic", "Best single drafter", "Best way to choose", "Chosen / single", "Oracle / single"),
        rows,
        "llllrr",
        size=8.2,
    )


def _traffic_text(findings: RoutingFindings) -> Paragraph:
    sentences = []
    for routing in findings.prices:
        wins: list[str] = []
        rest: list[str] = []
        for domain in (None, *sorted(findings.requests)):
            rows = [r for r in routing.rows if r.domain == domain and not r.oracle]
            won = any(row.verdict == "beats it" for row in rows if not row.policy.startswith("always "))
            (wins if won else rest).append("mixed traffic" if domain is None else named(domain))
        if not wins:
            sentences.append(f"At {routing.price.name} prices no way to choose is shown to beat it on any traffic.")
        elif rest:
            sentences.append(
                f"At {routing.price.name} prices some way to choose beats it on {listing(wins)}, and is not "
                f"shown to on {listing(rest)}."
            )
        else:
            sentences.append(f"At {routing.price.name} prices some way to choose beats it on every traffic.")
    last = findings.prices[-1]
    sentences.append(
        "Choosing the better drafter anew in every round would give "
        f"{estimate(last.row(_BY_ROUND).against_together)} times the best single drafter's throughput "
        f"({last.price.name} prices, mixed traffic): what a choice by request leaves behind."
    )
    return Paragraph(" ".join(sentences))


def _batch_blocks(findings: RoutingFindings) -> list[Block]:
    if not any(routing.batches for routing in findings.prices):
        return []
    rows = [
        _batch_row(short(routing.price.name) if index == 0 else "", row)
        for routing in findings.prices
        for index, row in enumerate(routing.batches)
    ]
    return [
        table(
            "The same in a larger batch on mixed traffic, simulated in full: every drafter in use drafts for its own "
            f"requests, one drafter after the other, and all wait. Ratios with bounds that hold for all rows of a "
            f"price list at once. {sample_label(findings, costs_label(findings))}",
            ("Prices", "Batch", "Policy", "Speed-up", "Over the best single drafter"),
            rows,
            "lrlrr",
            size=8.2,
        )
    ]


def _batch_row(prices: str, row: BatchRow) -> tuple[str, ...]:
    ratio = f"{estimate(row.against_together)} {_MARKS[row.verdict]}"
    return (prices, str(row.batch), short(row.policy, 30), estimate(row.speedup), ratio)


def _classifier_text(findings: RoutingFindings) -> Paragraph:
    quality = findings.classifier
    if quality is None:
        return Paragraph(f"There is no classifier: {findings.without_classifier}.")
    return Paragraph(
        f"The classifier finds the domain of {estimate(quality.accuracy)} of the prompts it never saw (the "
        f"largest domain has {quality.largest_share:.2f}). Its log loss is {estimate(quality.log_loss)} nats, "
        f"{estimate(quality.log_loss_uncalibrated)} before its temperature was set, and "
        f"{quality.log_loss_shares:.2f} for one that knows only the shares. It takes the drafter of least expected "
        "time, so that a doubtful prompt goes to a drafter that is safe everywhere."
    )


def _online_blocks(findings: RoutingFindings) -> list[Block]:
    rows = []
    for routing in findings.prices:
        if routing.online is None:
            continue
        for index, row in enumerate(routing.online.rows):
            first = index == 0
            rows.append(
                (
                    short(routing.price.name) if first else "",
                    f"{short(routing.online.drafter, 20)}, {routing.online.tuned_tokens}" if first else "",
                    short(row.policy, 30),
                    estimate(row.tuned_together),
                    estimate(row.later_together),
                )
            )
    if not rows:
        return []
    batch = next(r.online.batch for r in findings.prices if r.online is not None)
    return [
        table(
            "Draft lengths adjusted online when the same domains change in mid-run: throughput over that of the "
            f"fixed length tuned on the first half (named with its drafter), on each half, at batch {batch}, with "
            "95% bounds over prompts for all lengths and policies at once. "
            f"{sample_label(findings, costs_label(findings))}",
            ("Prices", "Drafter, tuned length", "Stopping policy", "First half", "Later half"),
            rows,
            "lllrr",
            size=8.2,
        )
    ]


def _guidelines(findings: RoutingFindings) -> tuple[Paragraph, ...]:
    winning = [r for r in findings.prices if best_router(r).verdict == "beats it"]
    found = []
    if winning:
        row = best_router(winning[-1])
        how = "Verify merged drafts" if row.policy.startswith("merged") else "Choose the drafter by request"
        found.append(
            Paragraph(
                f"{how} ({row.policy}) where batches are small and prices are as in "
                f"\u2018{winning[-1].price.name}\u2019.",
                lead="Route small batches.",
            )
        )
    else:
        found.append(
            Paragraph(
                "Serve the best single drafter; no way to choose between drafters was shown to beat it here.",
                lead="One drafter.",
            )
        )
    losing = [row for r in findings.prices for row in r.batches if _is_router(row) and row.verdict == "loses to it"]
    if losing:
        routed = sum(_is_router(row) for r in findings.prices for row in r.batches)
        found.append(
            Paragraph(
                f"Do not mix drafters with a model of their own in one batch: at batch {losing[0].batch}, "
                f"{len(losing)} of {routed} routed runs were slower than the best single drafter. Send requests to "
                "replicas by drafter instead, or keep to drafters that cost next to nothing.",
                lead="Large batches.",
            )
        )
    found.append(
        Paragraph(
            "A bandit pays for learning with every request it tries; where the mix of traffic is known, a classifier "
            "with calibrated probabilities starts where a bandit may end.",
            lead="Classifier before bandit.",
        )
    )
    return tuple(found)


def _is_router(row: BatchRow) -> bool:
    return not row.oracle and not row.policy.startswith("always ")


def _limits(findings: RoutingFindings) -> tuple[Paragraph, ...]:
    return (
        Paragraph(
            "Verdicts hold for all policies at once on mixed traffic, and for all policies and domains at once on "
            "the domains, under each price list by itself; regrets and speed-ups have intervals of their own. "
            "Learning is not repeated when prompts are resampled.",
            lead="Many comparisons.",
        ),
        Paragraph(
            f"{min(findings.requests.values())} prompts in the smallest domain; prompts of one source are more alike "
            "than those of real users, so a classifier may do worse on them.",
            lead="Few prompts.",
        ),
        Paragraph(
            "All drafters draft one length here; a drafter's memory is not charged, nor is keeping its KV cache "
            "up to date where the drafter changes by round.",
            lead="Costs left out.",
        ),
    )
