"""The capacity plan: what one replica carries, how many a load needs, and what a million tokens cost."""

from __future__ import annotations

from analysis.capacity import CapacityFindings, PolicyCapacity
from analysis.common.bootstrap import Estimate
from reports.page.document import Block, Figure, Paragraph, Part, table
from reports.page.drawing import styled
from reports.page.text import DASH, breakable, count, listing, named, short
from reports.questions.capacity_figures import capacity_curves

_WORDS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end-to-end time"}


def capacity_part(findings: CapacityFindings) -> Part:
    """Give the part of a report that `findings` answer."""
    with styled():
        drawing = capacity_curves(findings)
    blocks: list[Block] = [Paragraph(_setting(findings)), Figure.of(drawing), _table(findings)]
    if any(one is not None for policy in findings.policies for one in _bills(policy)):
        blocks.append(_bill(findings))
    if findings.load_rps is None:
        blocks.append(Paragraph("How many replicas a load needs: divide it by the sustained rate and round up."))
    if findings.usd_per_device_hour is None:
        blocks.append(Paragraph("Nothing is said of money: no price of a device was given."))
    blocks.append(Paragraph(_method(findings), lead="Method."))
    return Part(
        "capacity",
        "Capacity plan",
        Paragraph(_answer(findings), lead="Capacity."),
        tuple(blocks),
        (drawing,),
        guidelines=_guidelines(findings),
        limits=_limits(findings),
        evidence=findings.evidence,
    )


def best_policy(findings: CapacityFindings) -> PolicyCapacity:
    """The policy that sustains the highest rate."""
    return max(findings.policies, key=lambda policy: policy.rate_rps.value or 0.0)


def objective_words(findings: CapacityFindings) -> str:
    """The objective as a phrase: ``99% of requests with a TTFT of at most 500 ms``."""
    named = [(_WORDS[name], limit) for name, limit in findings.objective.limits.items()]
    limits = [f"{_article(word)} {word} of at most {_ms(limit)}" for word, limit in named]
    return f"{100 * findings.objective.attainment:g}% of requests with {listing(limits)}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _answer(findings: CapacityFindings) -> str:
    best, first = best_policy(findings), findings.policies[0]
    if not best.rate_rps.value:
        return f"No policy keeps the objective ({objective_words(findings)}) at any load that was simulated."
    head = (
        f"Within {objective_words(findings)}, one replica carries {rate(best.rate_rps)} requests per second with "
        f"{_called(findings, best)}"
    )
    if best is first:
        others = [p for p in findings.policies[1:] if p.ratio is not None and p.ratio.value is not None]
        told = [f"{_called(findings, p)} {rate(p.ratio)} times as much" for p in others if p.ratio is not None]
        more = f"; {listing(told)}" if told else ""
    elif best.ratio is not None and best.ratio.low is not None and best.ratio.low <= 1:
        more = f"; that cannot be told apart from no speculation ({rate(best.ratio)} times as much)"
    elif best.ratio is not None and best.ratio.value is not None:
        more = f", {rate(best.ratio)} times what it carries without speculation"
    else:
        more = "; without speculation it keeps the objective at no load"
    need = best.needed
    needs = ""
    if need is not None:
        high = "no bound" if need.devices_high is None else str(need.devices_high)
        needs = (
            f" A load of {need.load_rps:g} requests per second needs {need.devices} device"
            f"{'s' * (need.devices != 1)} ({need.devices_low} to {high})."
        )
    return f"{head}{more}.{needs}"


def _called(findings: CapacityFindings, policy: PolicyCapacity) -> str:
    """The name of a policy in a sentence: in quotation marks, but for no speculation."""
    return policy.policy if policy is findings.policies[0] else f"\u2018{named(policy.policy)}\u2019"


def _setting(findings: CapacityFindings) -> str:
    size = findings.devices_per_replica
    devices = "one device" if size == 1 else f"{size} devices"
    source = ""
    if findings.objective.source != "stated":
        source = f" The objective is {breakable(findings.objective.source)}."
    fleet = "" if findings.replicas == 1 else f" The plan is of {findings.replicas} replicas behind one router."
    return (
        f"How many requests per second can arrive before fewer than {objective_words(findings)} are served?{source} "
        f"Requests are those of the scenario \u2018{named(findings.name)}\u2019; their arrivals are "
        f"{findings.arrivals}. The verifier is {named(findings.verifier)}; a replica takes {devices}.{fleet} Every "
        f"number is simulated; step costs are {findings.costs}."
    )


def _table(findings: CapacityFindings) -> Block:
    judged = sum(policy.rate_rps.requests for policy in findings.policies)
    return table(
        "What one replica sustains: requests per second within the objective, that over no speculation (paired by "
        "seed), requests per second of a saturated engine, the binding limit, and at the sustained rate "
        "output tokens per second, tails and requests in the system. 95% intervals over "
        f"{findings.replications} replications. [simulated, costs {findings.costs}; n = {count(judged)} requests]",
        (
            "Policy",
            "Sustained, requests/s",
            "Ratio",
            "Saturated",
            "Gives way",
            "Tokens/s",
            "p99 TTFT",
            "p99 TPOT",
            "In system",
        ),
        [
            (
                breakable(short(p.policy, 40), 20),
                rate(p.rate_rps),
                "1" if p is findings.policies[0] else rate(p.ratio),
                _number(p.saturation_rps.value),
                _WORDS.get(p.limited_by, p.limited_by),
                _number(p.output_tokens_per_s.value),
                _ms(p.p99_ttft_ms.value),
                _ms(p.p99_tpot_ms.value),
                _number(p.requests_in_system.value),
            )
            for p in findings.policies
        ],
        "lrrrlrrrr",
        ("1", *("auto",) * 8),
        size=7.8,
    )


def _bills(policy: PolicyCapacity) -> tuple[object, object, object]:
    return policy.needed, policy.usd_per_million_output_tokens, policy.joules_per_million_output_tokens


def _bill(findings: CapacityFindings) -> Block:
    """Devices for the load, dollars and joules of a million output tokens; a column only where one is known."""
    columns = [
        (
            f"Replicas for {findings.load_rps:g}/s" if findings.load_rps else "",
            [_replicas(p) for p in findings.policies],
        ),
        (
            f"Devices for {findings.load_rps:g}/s" if findings.load_rps else "",
            [_devices(p) for p in findings.policies],
        ),
        ("USD per million tokens", [rate(p.usd_per_million_output_tokens) for p in findings.policies]),
        (
            "Joules per output token",
            [rate(_scaled(p.joules_per_million_output_tokens, 1e-6)) for p in findings.policies],
        ),
        (
            "kWh per million tokens",
            [rate(_scaled(p.joules_per_million_output_tokens, 1 / 3.6e6)) for p in findings.policies],
        ),
    ]
    kept = [(title, cells) for title, cells in columns if title and any(cell != "\u2014" for cell in cells)]
    price = findings.usd_per_device_hour
    told = "" if price is None else f" A device costs {price:g} USD an hour, as given."
    counts = "" if findings.energy_counts is None else f" Joules: {breakable(findings.energy_counts)}."
    return table(
        f"What the load needs, and what a million output tokens take at the sustained rate.{told}{counts} 95% "
        f"intervals over {findings.replications} replications. [simulated, costs {findings.costs}]",
        ("Policy", *(title for title, _ in kept)),
        [
            (breakable(short(p.policy, 40), 20), *(cells[i] for _, cells in kept))
            for i, p in enumerate(findings.policies)
        ],
        "l" + "r" * len(kept),
        ("1", *("auto",) * len(kept)),
    )


def _replicas(policy: PolicyCapacity) -> str:
    need = policy.needed
    return "\u2014" if need is None else _whole(need.replicas, need.replicas_low, need.replicas_high)


def _devices(policy: PolicyCapacity) -> str:
    need = policy.needed
    return "\u2014" if need is None else _whole(need.devices, need.devices_low, need.devices_high)


def _whole(value: int, low: int, high: int | None) -> str:
    return f"{value} ({low} or more)" if high is None else f"{value} ({low}{DASH}{high})"


def _method(findings: CapacityFindings) -> str:
    how = f"{findings.requests_per_run} requests arrive in a run"
    if findings.trials:
        trail = listing([f"{_number(t.rate_rps)} with {t.requests}" for t in findings.trials])
        verdict = (
            "until doubling it no longer moved the rate" if findings.stable else "and did not come to rest; a limit"
        )
        how += (
            f", a number that was doubled {verdict} by {100 * findings.stability:.0f}% (pilot seeds sustain {trail})"
        )
    return (
        f"For each policy and each of {findings.replications} seeds, shared by all policies, the largest rate at "
        "which the objective is kept is found by bisection over simulated rates, to "
        f"{100 * findings.tolerance:.0f}% of the saturated rate; the interval is Student's t over the seeds. {how}; "
        f"the first {100 * findings.warmup_share:.0f}% and the last {100 * findings.tail_share:.0f}% are served but "
        "not judged, as the system fills up and runs empty there. No rate above that of an engine which is never "
        "idle is called sustained, however long a run would bear it."
    )


def _guidelines(findings: CapacityFindings) -> tuple[Paragraph, ...]:
    best = best_policy(findings)
    if not best.rate_rps.value:
        return (Paragraph("Loosen the objective or take a faster device: no policy keeps it.", lead="Capacity."),)
    floor = best.rate_rps.low if best.rate_rps.low else best.rate_rps.value
    ways = {
        "ttft": "TTFT is the binding limit: a larger max_num_seqs or more replicas help before a longer draft does",
        "tpot": "TPOT is the binding limit; lower max_num_seqs to protect it (TTFT rises)",
        "e2el": "The time of whole requests is the binding limit",
        "saturation": "Throughput is the binding limit: a shorter queue will not help, a faster engine will",
    }
    return (
        Paragraph(
            f"Plan for at most {_number(floor)} requests per second and replica (the lower end of the interval) with "
            f"{_called(findings, best)}. {ways[best.limited_by]}.",
            lead="Load.",
        ),
    )


def _limits(findings: CapacityFindings) -> tuple[Paragraph, ...]:
    limits = [
        Paragraph(
            f"Arrivals are {findings.arrivals} at a constant rate; bursts and daily peaks need room above it. "
            "Replicas are taken to share a load evenly, without helping each other.",
            lead="Capacity.",
        )
    ]
    if findings.objective.source != "stated":
        limits.append(Paragraph(f"The objective is {breakable(findings.objective.source)}.", lead="Objective."))
    if not findings.stable:
        limits.append(
            Paragraph(
                f"The sustained rate still moved between the longest runs ({findings.requests_per_run} requests).",
                lead="Run length.",
            )
        )
    if any(policy.limited_by == "saturation" for policy in findings.policies):
        limits.append(
            Paragraph(
                "Where saturation is named, the objective is so loose that a finite run at the saturated rate keeps "
                "it; a longer one may not, so that this rate is an upper bound.",
                lead="Saturation.",
            )
        )
    outside = max(policy.extrapolated_share for policy in findings.policies)
    if outside > 0.01:
        limits.append(
            Paragraph(
                f"Up to {100 * outside:.0f}% of the iterations of a run were priced outside of what was measured: "
                "those rates are extrapolated.",
                lead="Prices.",
            )
        )
    limits += [Paragraph(breakable(text, 40), lead="Warning.") for text in findings.warnings]
    return tuple(limits)


def rate(value: Estimate | None) -> str:
    """An estimate to three digits, with its interval in brackets; an em dash where there is none."""
    if value is None or value.value is None:
        return "\u2014"
    if value.low is None or value.high is None:
        return _number(value.value)
    return f"{_number(value.value)} ({_number(value.low)}{DASH}{_number(value.high)})"


def _scaled(value: Estimate | None, factor: float) -> Estimate | None:
    if value is None:
        return None
    middle, low, high = (None if v is None else v * factor for v in (value.value, value.low, value.high))
    return Estimate(middle, low, high, value.requests)


def _number(value: float | None) -> str:
    if value is None:
        return "\u2014"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ms(value: float | None) -> str:
    """A time given in ms: as seconds from one second on."""
    if value is None:
        return "\u2014"
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"
