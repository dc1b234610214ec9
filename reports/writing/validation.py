"""The document of a validation: predicted against measured as PDF, figures, JSON and a Markdown table.

Predicted against measured as Markdown: the table of errors, and a page with every condition.
"""

from __future__ import annotations

import os
from pathlib import Path

from analysis.fidelity.table import Condition, Crossover, Fidelity, Source, errors_of
from reports.page.document import Document, Figure, timestamp
from reports.page.text import (
    COUNT_HEADER,
    COUNT_NOTE,
    SPLIT_HEADER,
    SPLIT_NOTE,
    SUMMARISED,
    acceptance_sentence,
    breakable,
    count_cells,
    error_with_spread,
    far_off,
    listing,
    plain,
    split_cells,
)
from reports.questions.fidelity import fidelity_answer, fidelity_sections
from reports.questions.fidelity_figures import draw_fidelity
from reports.writing.report import Place, render, write_files


def fidelity_markdown(fidelity: Fidelity) -> str:
    """Give the table: a row per engine and device, errors over held-out conditions as ``median / worst``."""
    names = [name for name in SUMMARISED if any(c.of(name) for c in fidelity.held_out())]
    header = ["engine, device", "held-out conditions", *(SUMMARISED[name] for name in names), "spread", "crossovers"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(_row(fidelity, source, names)) + " |" for source in fidelity.sources]
    return "\n".join(lines) + "\n"


def _row(fidelity: Fidelity, source: Source, names: list[str]) -> list[str]:
    held = fidelity.held_out(source.name)
    opened = sum(c.open_loop for c in held)
    counted = f"{len(held)} ({opened} open-loop)" if opened else str(len(held))
    found = {name: errors_of(name, held) for name in names}
    cells = [
        "" if errors is None else f"{100 * errors.median:.1f} / {100 * errors.worst:.1f}%"
        for errors in found.values()
    ]
    spreads = [errors.spread for errors in found.values() if errors is not None and errors.spread is not None]
    spread = f"{100 * spreads[0]:.1f}%" if spreads else ""
    mine = [c for c in fidelity.crossovers if c.source == source.name]
    return [source.title, counted, *cells, spread, _within(mine)]


def _within(crossovers: list[Crossover]) -> str:
    """Count the crossings that were found; where speculation pays at every batch size there is none to find."""
    crossovers = [c for c in crossovers if c.measured is not None or c.predicted is not None]
    if not crossovers:
        return ""
    return f"{sum(c.steps_apart <= 1 for c in crossovers)} of {len(crossovers)} within a grid step"


_PAGE = """# Predicted against measured

Written by `paceline validate --page`. Every condition was predicted by
simulating the scenario that lies beside its measurement. *fit* conditions were looked at before predicting,
*held-out* ones were not. A cell is the measured value, the signed error of the prediction, and after ± the spread:
half the range of the engine's own repeats over their mean, where it was repeated. Measured runs of the bundled
engines: `analysis/fidelity/bundled/`.

## How an error is split

The mean end-to-end time of a request is E = W + P + D: it waits W for its first token (mean TTFT: queue and
prefill), then spends D in steps that decode, and P waiting for prompts of others that are prefilled alone. m stands
for measured, p for predicted, t for tokens per round (bonus included, rounds without a draft too). Three factors lead
from Em to Ep, each with everything else held:

- *acceptance*: E1 / Em, where E1 = Wm + Pm + Dm (tm / tp) w. The factor w re-prices the measured decode steps for as
  many drafted tokens a round as predicted; it is 1 where drafts are as long as predicted, or padded to one length.
- *step time*: E2 / E1, where E2 = a (Wm + Pm) + b Dm (tm / tp) w: a and b are predicted over measured seconds of the
  *measured* steps, those that prefill alone and those that decode.
- *queue*: Ep / E2, what is left: waiting, and which requests share a step. What acceptance and step times do to the
  number of requests that wait counts here.

The product of the three is Ep / Em; each is shown minus one. A part that cannot be told apart (an engine that counts
no accepted tokens, steps that cannot be seen over HTTP) is named and left in the queue.

## Errors on held-out conditions
"""


def fidelity_page(fidelity: Fidelity) -> str:
    """Give a page with every condition of every source, what they were fitted on, and what explains the errors."""
    parts = [_PAGE, fidelity_markdown(fidelity)]
    for source in fidelity.sources:
        mine = [c for c in fidelity.conditions if c.source == source.name]
        names = [name for name in SUMMARISED if any(c.of(name) for c in mine)]
        header = ["condition", "role", *(SUMMARISED[name] for name in names), "notes"]
        lines = [
            f"## {source.title}\n",
            f"Device: {source.device}. Clock: {source.clock}. Fitted: {source.fitted_on}",
        ]
        lines += [f"Source: {source.citation}"] if source.citation else []
        lines += ["", *(f"- {text}" for text in source.explained)] if source.explained else []
        lines += _counts(mine)
        lines += ["", "| " + " | ".join(header) + " |", "|---|---|" + "---:|" * len(names) + "---|"]
        lines += ["| " + " | ".join(_condition(c, names)) + " |" for c in mine]
        lines += _splits(mine)
        crossings = [c for c in fidelity.crossovers if c.source == source.name]
        if crossings:
            lines += ["", "Where speculation stops paying (smallest batch size of the grid):", ""]
            lines += [f"- {_crossing(one)}" for one in crossings]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _counts(conditions: list[Condition]) -> list[str]:
    """Give the table of acceptance, predicted and counted, of the conditions that have any."""
    rows = [(one.name, *count_cells(one)) for one in conditions if one.counts]
    if not rows:
        return []
    head = ["", f"Acceptance. {COUNT_NOTE}", "", f"| {' | '.join(COUNT_HEADER)} |", "|---|" + "---:|" * 4]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def _splits(conditions: list[Condition]) -> list[str]:
    """Give the table of whose each error is, of the conditions whose times were seen."""
    rows = [(one.name, *split_cells(one.split)) for one in conditions if one.split is not None]
    if not rows:
        return []
    head = ["", f"Whose error it is. {SPLIT_NOTE}", "", f"| {' | '.join(SPLIT_HEADER)} |", "|---|" + "---:|" * 4]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def _condition(condition: Condition, names: list[str]) -> list[str]:
    cells = []
    for name in names:
        one = condition.of(name)
        cells.append("" if one is None else f"{one.measured:.4g} ({error_with_spread(one)})")
    return [condition.name, condition.role, *cells, "; ".join(condition.notes).replace("|", "/")]


def _crossing(one: Crossover) -> str:
    def told(batch: int | None) -> str:
        return "at none" if batch is None else f"at {batch}"

    grid = ", ".join(str(batch) for batch in one.grid)
    return (
        f"{one.drafter}, draft {one.draft_tokens} (grid {grid}): measured {told(one.measured)}, "
        f"predicted {told(one.predicted)}"
    )


_MOST_LINES = 4
"""Conditions whose counts are far off that page one names; the first section has them all."""


def write_validation(fidelity: Fidelity, out_pdf: str | os.PathLike[str]) -> Path:
    """Write the document of `fidelity` to `out_pdf` and its figures as SVG beside it; give its path.

    Dated by the youngest measurement: the same measurements give the same bytes. Raises `ReportError` for a figure or
    document that cannot be made.
    """
    target = Path(out_pdf)
    drawings = draw_fidelity(fidelity)
    moment = timestamp(fidelity.created, "fidelity")
    head = _verdict(fidelity)
    under = " under speculation" if any(one.speculates for one in fidelity.conditions) else ""
    document = Document(
        title="How far can the predictions be trusted?",
        kicker="paceline validation",
        subtitle=f"{len(fidelity.conditions)} conditions, {len(fidelity.held_out())} of them held out.",
        running="Predicted against measured",
        footer="[measured] on an engine   [simulated] predicted by the scenario beside it",
        date=f"{moment:%Y-%m-%d}",
        created=(moment.year, moment.month, moment.day),
        question=f"How close do simulated acceptance, throughput and latency come to what real engines do{under}?",
        verdict=head[0],
        answer=head[1:],
        front=(Figure.of(drawings["fidelity-errors"]),) if "fidelity-errors" in drawings else (),
        sections=fidelity_sections(fidelity, drawings),
    )
    place = Place(target, target.parent / "figures", target.parent)
    write_files(place, render(document, moment), list(drawings.values()), {})
    return target


def _verdict(fidelity: Fidelity) -> tuple[str, ...]:
    """Give the headline, where counts are far off first of all, then acceptance, then a sentence for each source."""
    told = []
    for source in fidelity.sources:
        held = fidelity.held_out(source.name)
        found = [
            f"{label} {100 * errors.median:.1f}% (worst {100 * errors.worst:.1f}%)"
            for name, label in (
                ("output_throughput", "throughput"),
                ("speedup", "speed-up"),
                ("p99_tpot_ms", "p99 TPOT"),
            )
            if (errors := errors_of(name, held)) is not None
        ]
        if found:
            told.append(f"{plain(source.title)}, {len(held)} held-out conditions, median errors: {listing(found)}.")
    late = far_off(fidelity)
    first = f"{breakable(late[0], 40)}. " if late else ""
    more = [f"{breakable(line, 40)}." for line in late[1:_MOST_LINES]]
    return (first + fidelity_answer(fidelity), *more, plain(acceptance_sentence(fidelity)), *told)
