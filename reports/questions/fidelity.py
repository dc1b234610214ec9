"""Predicted against measured, as a part of a report.

Predicted against measured: the error table, what was missed, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.fidelity.table import QUANTITIES, TARGETS, Condition, Fidelity, Source, errors_of, missed
from reports.page.document import Block, Bullets, Figure, Paragraph, Part, Section, table
from reports.page.text import (
    COUNT_HEADER,
    COUNT_NOTE,
    SPLIT_DEFINITION,
    SPLIT_HEADER,
    SPLIT_NOTE,
    SUMMARISED,
    acceptance_sentence,
    breakable,
    count_cells,
    counted,
    error_cells,
    error_with_spread,
    far_off,
    plain,
    short,
    split_cells,
)
from reports.questions.fidelity_figures import draw_fidelity
from reports.questions.figures import Drawing


def fidelity_sections(fidelity: Fidelity, drawings: Mapping[str, Drawing]) -> tuple[Section, ...]:
    """Give the sections of a validation: errors by source, every condition, crossovers, how it was done."""
    sections = [
        Section("Acceptance, predicted and counted", acceptance_blocks(fidelity)),
        Section("Errors on held-out conditions", (*_errors(fidelity), *_figures(drawings))),
        Section("Where speculation stops paying", _crossovers(fidelity, drawings)),
        Section("Whose error it is", split_blocks(fidelity)),
        Section("What explains the errors", _explained(fidelity)),
        Section("Every condition", tuple(_conditions(fidelity, source) for source in fidelity.sources)),
        Section("How predictions were made", _method(fidelity)),
    ]
    return tuple(section for section in sections if section.blocks)


def error_blocks(fidelity: Fidelity, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    """Give the errors by engine, every condition in one figure each way, and where speculation stops paying."""
    shown = [Figure.of(drawings[name]) for name in ("fidelity-predicted-measured", "fidelity-errors")]
    return (*acceptance_blocks(fidelity), *_errors(fidelity), *shown, *_crossovers(fidelity, drawings))


def acceptance_blocks(fidelity: Fidelity) -> tuple[Block, ...]:
    """Give what is said before any time: where counts are far off, and every condition that drafted."""
    blocks: list[Block] = [Paragraph(plain(acceptance_sentence(fidelity)))]
    if late := far_off(fidelity):
        blocks.append(Bullets(tuple(Paragraph(breakable(line, 40)) for line in late)))
    rows = [(breakable(f"{one.source}: {one.name}", 30), *count_cells(one)) for one in counted(fidelity)]
    if rows:
        blocks.append(
            table(
                f"{COUNT_NOTE} [simulated / measured]",
                tuple(name[0].upper() + name[1:] for name in COUNT_HEADER),
                rows,
                "lrrrr",
                ("1", "auto", "auto", "auto", "1.4"),
                size=7.2,
            )
        )
    return tuple(blocks)


def split_blocks(fidelity: Fidelity) -> tuple[Block, ...]:
    """Give how much of every error is acceptance, step time and queue."""
    rows = [
        (
            breakable(f"{one.source}: {one.name}", 30),
            *(cell.replace("-", "\u2212") for cell in split_cells(one.split)),
        )
        for one in fidelity.conditions
        if one.split is not None
    ]
    if not rows:
        return ()
    header = tuple(name[0].upper() + name[1:] for name in SPLIT_HEADER)
    return (
        Paragraph(SPLIT_DEFINITION),
        table(f"{SPLIT_NOTE} [measured, simulated]", header, rows, "lrrrr", ("1", *("auto",) * 4), size=7.2),
    )


def _figures(drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    return (Figure.of(drawings["fidelity-predicted-measured"]),)


def _errors(fidelity: Fidelity) -> tuple[Block, ...]:
    rows = []
    for source in fidelity.sources:
        title = breakable(source.title, 30)
        for name in SUMMARISED:
            errors = errors_of(name, fidelity.held_out(source.name))
            if errors is not None:
                rows.append((title, QUANTITIES[name][0], *error_cells(errors)))
                title = ""  # said once
    header = ("Engine and device", "Quantity", "n", "Median", "Worst", "Bias", "Engine's own spread")
    return (
        Paragraph(
            "Each condition was predicted by simulating the scenario that lies beside its measurement; no held-out "
            "measurement entered a fit. The spread is half the range of the engine's own repeats over their mean "
            "(median over conditions): no prediction can be expected to be closer than that."
        ),
        table(
            "Absolute relative errors over held-out conditions: median and worst; bias is the median signed error. "
            "[measured, simulated]",
            header,
            rows,
            "llrrrrr",
            ("1.5", "1", "auto", "auto", "auto", "auto", "auto"),
        ),
    )


def _crossovers(fidelity: Fidelity, drawings: Mapping[str, Drawing]) -> tuple[Block, ...]:
    if not fidelity.crossovers:
        return ()
    rows = [
        (
            short(c.source, 22),
            short(c.drafter, 20),
            c.draft_tokens,
            ", ".join(str(batch) for batch in c.grid),
            _batch(c.measured),
            _batch(c.predicted),
            str(c.steps_apart),
        )
        for c in fidelity.crossovers
    ]
    return (
        Figure.of(drawings["fidelity-crossovers"]),
        table(
            "Smallest batch size at which speculation no longer pays, and how many grid steps the prediction is off. "
            "[measured, simulated]",
            ("Source", "Drafter", "Draft", "Grid", "Measured", "Predicted", "Steps apart"),
            rows,
            "lllrrrr",
        ),
    )


def _batch(batch: int | None) -> str:
    return "pays at all" if batch is None else str(batch)


def _explained(fidelity: Fidelity) -> tuple[Block, ...]:
    found = missed(fidelity)
    targets = "; ".join(
        f"{QUANTITIES[name][0]}, {statistic}: at most {100 * limit:.0f}%"
        for (name, statistic), limit in TARGETS.items()
    )
    said = [
        f"{QUANTITIES[name][0]} of {plain(source)}: {statistic} error {100 * error:.1f}% against {100 * limit:.0f}%"
        for source, name, statistic, error, limit in found
    ]
    told = f"Missed: {'; '.join(said)}." if said else "All of them are met."
    blocks: list[Block] = [Paragraph(f"Targets for engines that were driven ({targets}). {told}")]
    for source in fidelity.sources:
        if source.explained:
            blocks.append(Paragraph("", lead=f"{plain(source.title)}."))
            blocks.append(Bullets(tuple(Paragraph(plain(text)) for text in source.explained)))
    return tuple(blocks)


def _conditions(fidelity: Fidelity, source: Source) -> Block:
    mine = [c for c in fidelity.conditions if c.source == source.name]
    names = [name for name in SUMMARISED if any(c.of(name) for c in mine)][:5]
    return table(
        f"{plain(source.title)}: measured, the error of the prediction, and the spread of the repeats behind \u00b1. "
        "[measured, simulated]",
        ("Condition", "Role", *(f"{QUANTITIES[n][0].split(',')[0]}, {QUANTITIES[n][1]}" for n in names)),
        [(breakable(c.name, 30), c.role, *(_cell(c, name) for name in names)) for c in mine],
        "ll" + "r" * len(names),
        ("1", *("auto",) * (len(names) + 1)),
        size=7.2,
    )


def _cell(condition: Condition, name: str) -> str:
    one = condition.of(name)
    if one is None:
        return "\u2014"
    return f"{one.measured:.4g} ({error_with_spread(one)})".replace("-", "\u2212")


def _method(fidelity: Fidelity) -> tuple[Block, ...]:
    return (
        Bullets(
            tuple(
                Paragraph(
                    f"{plain(source.fitted_on)} Device: {plain(source.device)}; clock: {plain(source.clock)}."
                    + (f" Source: {plain(source.citation)}." if source.citation else ""),
                    lead=f"{plain(source.title)}.",
                )
                for source in fidelity.sources
            )
        ),
    )


def fidelity_part(fidelity: Fidelity) -> Part:
    """Give the part: errors over held-out conditions by engine, and predicted against measured."""
    drawings = draw_fidelity(fidelity)
    late = {source for source, *_ in missed(fidelity)}
    first = [f"{breakable(line, 40)}." for line in far_off(fidelity)[:1]]
    explained = [
        Paragraph(" ".join(plain(text) for text in source.explained), lead=f"{plain(source.title)}.")
        for source in fidelity.sources
        if source.name in late and source.explained
    ]
    return Part(
        "fidelity",
        "Predicted against measured",
        Paragraph(" ".join((*first, fidelity_answer(fidelity))), lead="Trust."),
        error_blocks(fidelity, drawings),
        tuple(drawings.values()),
        limits=tuple(explained),
    )


def fidelity_answer(fidelity: Fidelity) -> str:
    """Say how close throughput came over held-out conditions: under speculation where any was, and without."""
    held = fidelity.held_out()
    under, plain_ones = ([one for one in held if one.speculates is wanted] for wanted in (True, False))
    told = [_throughput(under, "under speculation"), _throughput(plain_ones, "without speculation")]
    if not any(told):
        return "No throughput was measured on held-out conditions."
    if not any(one.speculates for one in fidelity.conditions):
        told.append("No condition ran under speculation: nothing is said of it.")
    return " ".join(sentence for sentence in told if sentence)


def _throughput(conditions: Sequence[Condition], how: str) -> str:
    overall = errors_of("output_throughput", conditions)
    if overall is None:
        return ""
    spread = "" if overall.spread is None else f"; the engines' own repeats spread by {100 * overall.spread:.1f}%"
    return (
        f"Throughput {how} is predicted within {100 * overall.median:.1f}% (median over "
        f"{overall.conditions} held-out conditions; worst {100 * overall.worst:.1f}%{spread})."
    )
