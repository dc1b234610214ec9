"""Results of simulations as parts: one run, replications of one, and a comparison on common random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.common.bootstrap import Estimate
from calibration.traces.grades import told_grade
from reports.page.document import Block, Figure, Paragraph, Part, table
from reports.page.drawing import styled
from reports.page.inputs import Summed
from reports.page.text import breakable, count, listing, named, short
from reports.questions.capacity import rate
from reports.questions.runs_figures import contrast_ratios
from simulator.experiments.replicate import COVERS
from simulator.results.evidence import Evidence, verifier_on
from simulator.results.result import RunResult

QUANTITIES = {
    "request_throughput": "Requests per second",
    "output_throughput": "Output tokens per second",
    "request_goodput": "Requests per second within the objectives",
    "slo_attainment": "Share of requests within the objectives",
    "mean_ttft_ms": "Mean TTFT, ms",
    "p99_ttft_ms": "99th percentile of TTFT, ms",
    "mean_tpot_ms": "Mean TPOT, ms",
    "p99_tpot_ms": "99th percentile of TPOT, ms",
    "mean_e2el_ms": "Mean end-to-end time, ms",
    "spec_decode_acceptance_length": "Tokens per round that drafted, bonus included",
    "spec_decode_acceptance_rate": "Accepted per drafted, %",
    "usd_per_million_output_tokens": "USD per million output tokens",
    "joules_per_million_output_tokens": "Joules per million output tokens",
    "mean_kv_cache_usage": "Mean use of KV memory",
    "num_preemptions": "Preemptions",
}
"""Numbers of a summary that are shown, where they are there, under these names."""


def run_part(result: RunResult, name: str) -> Part:
    """Give the part for one run: what was run, and its numbers; a single run has no intervals."""
    summary = result.summary
    rows = [(title, _plain(summary[key])) for key, title in QUANTITIES.items() if key in summary]
    served = f"n = {count(summary['completed'])} requests"
    told = (
        f"{named(result.scenario.name)}: {_plain(summary['output_throughput'])} output tokens per second over "
        f"{count(summary['completed'])} requests in one run (no interval: replications would give one)."
    )
    return Part(
        f"run-{name}",
        f"Run: {short(name, 40)}",
        Paragraph(told, lead=f"{short(name)}."),
        (Paragraph(_sources(summary)), table(f"One run. [simulated; {served}]", ("Number", "Value"), rows, "lr")),
        (),
        limits=_extrapolated(summary, name),
        evidence=Evidence.of([summary["provenance"]]),
    )


def replications_part(several: Summed, name: str) -> Part:
    """Give the part for replications: means with intervals."""
    told = several.told
    metrics = {key: _estimate(told["metrics"][key]) for key in QUANTITIES if key in told["metrics"]}
    rows = [(QUANTITIES[key], rate(value)) for key, value in metrics.items()]
    answer = (
        f"{named(str(told['name']))}: {rate(metrics.get('output_throughput'))} output tokens per second over "
        f"{told['replications']} replications."
    )
    return Part(
        f"replications-{name}",
        f"Replications: {short(name, 40)}",
        Paragraph(answer, lead=f"{short(name)}."),
        (
            Paragraph(_sources(told)),
            table(
                f"Means with 95% intervals {COVERS}. [simulated; n = {told['replications']} replications]",
                ("Number", "Mean"),
                rows,
                "lr",
            ),
        ),
        (),
        evidence=Evidence.of([told["provenance"]]),
    )


def comparison_part(several: Summed, name: str) -> Part:
    """Give the part for a comparison: ratios to the first scenario on common random numbers, with intervals."""
    told = several.told
    rivals: Mapping[str, Mapping[str, Any]] = told["against_baseline"]
    with styled():
        drawing = contrast_ratios(told, QUANTITIES)
    blocks: list[Block] = [Figure.of(drawing)]
    for rival, contrasts in rivals.items():
        rows = [_contrast(title, contrasts[key]) for key, title in QUANTITIES.items() if key in contrasts]
        blocks.append(
            table(
                f"{breakable(rival)} against {breakable(str(told['baseline']))}, on the same seeds, with paired 95% "
                f"intervals {COVERS}. [simulated; n = {told['replications']} replications]",
                ("Number", "First", "Other", "Other over first", "Verdict"),
                rows,
                "lrrrl",
                ("1.2", "1", "1", "1", "auto"),
                size=8.2,
            )
        )
    return Part(
        f"comparison-{name}",
        f"Comparison: {short(name, 40)}",
        Paragraph(_comparison(told, rivals), lead=f"{short(name)}."),
        tuple(blocks),
        (drawing,),
        evidence=Evidence.of(told["provenance"].values()),
    )


def _comparison(told: Mapping[str, Any], rivals: Mapping[str, Mapping[str, Any]]) -> str:
    said = []
    for rival, contrasts in rivals.items():
        found = contrasts.get("output_throughput")
        if found is not None and "ratio" in found:
            ratio = rate(_estimate(found["ratio"]))
            said.append(f"{named(rival)} has {ratio} times the output throughput ({found['verdict']})")
    head = f"Against {named(str(told['baseline']))}, over {told['replications']} replications: "
    return head + (f"{listing(said)}." if said else "no throughput that both have.")


def _contrast(title: str, found: Mapping[str, Any]) -> Sequence[str]:
    ratio = rate(_estimate(found["ratio"])) if "ratio" in found else "\u2014"
    return (title, rate(_estimate(found["a"])), rate(_estimate(found["b"])), ratio, str(found["verdict"]))


def _estimate(told: Mapping[str, Any]) -> Estimate:
    return Estimate(told["mean"], told.get("low"), told.get("high"), int(told["n"]))


def _sources(told: Mapping[str, Any]) -> str:
    source = told["provenance"]
    drafter = source.get("drafter")
    return (
        f"Verifier {breakable(verifier_on(source))}, {'no drafter' if drafter is None else named(drafter)}; costs: "
        f"{breakable(source['costs'])}; acceptance: {told_grade(source)} ({breakable(source['acceptance'])}); "
        f"replay: {breakable(source['replay'])}."
    )


def _extrapolated(summary: Mapping[str, Any], name: str) -> tuple[Paragraph, ...]:
    outside, of = summary.get("extrapolated_iterations", 0), summary.get("iterations", 0)
    if not outside:
        return ()
    return (
        Paragraph(
            f"{100 * outside / of:.0f}% of the iterations of this run were priced outside of what was measured.",
            lead=f"{short(name)}.",
        ),
    )


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
