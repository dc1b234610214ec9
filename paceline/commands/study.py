"""Commands that write reports: demo and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from paceline.terminal.progress import progress_bars, read_traces, say, stage

if TYPE_CHECKING:
    from analysis.capacity import Objective
    from reports.writing.collect import Answers

DEMO_TRACES = "smollm2-135m-cpu-greedy"
STUDY_REQUESTS = 250
"""Arrivals of a run of the capacity plan where it is one question of many."""

_WORKERS = click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes for the simulations."
)
_ABOVE_ZERO = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--out", default="paceline-demo", show_default=True, help="Folder for the report and its figures.")
@_WORKERS
def demo(out: str, workers: int) -> None:
    """From bundled traces of a real model to a PDF report: replay, analysis, report."""
    from analysis import study
    from reports import summary_table, write_report

    traces = read_traces(DEMO_TRACES)
    with progress_bars() as progress:
        findings = study(traces, workers=workers, progress=stage(progress, "simulate"))
        path = write_report(findings, Path(out) / "report.pdf", progress=stage(progress, "report"))
    say(summary_table(findings))
    click.echo(f"{path}")


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", default="paceline-report", show_default=True, help="A PDF, or a folder for the report and its figures."
)
@click.option(
    "--template",
    default="study",
    show_default=True,
    type=click.Choice(["study", "capacity", "brief"]),
    help="Everything; the capacity plan first; or two pages.",
)
@click.option("--load-rps", type=_ABOVE_ZERO, help="Requests per second to plan for.")
@click.option("--price-per-hour", type=_ABOVE_ZERO, help="USD an hour of one device, for the cost of tokens.")
@click.option("--ttft-ms", type=_ABOVE_ZERO, help="Objective: time to first token of 99% of requests.")
@click.option("--tpot-ms", type=_ABOVE_ZERO, help="Objective: time per output token of 99% of requests.")
@click.option("--e2el-ms", type=_ABOVE_ZERO, help="Objective: end-to-end time of 99% of requests.")
@_WORKERS
def report(
    inputs: tuple[str, ...],
    out: str,
    template: str,
    load_rps: float | None,
    price_per_hour: float | None,
    ttft_ms: float | None,
    tpot_ms: float | None,
    e2el_ms: float | None,
    workers: int,
) -> None:
    """Answer what RUN... have data for, and write it up as a PDF with its figures (SVG, CSV) and findings (JSON).

    RUN is a TraceSet (a folder or a bundled name), or a folder written by paceline simulate, compare, tune, cascade
    or validate. What they cannot answer is named with the reason.
    """
    from reports.page.inputs import read_inputs
    from reports.writing.collect import Options, collect
    from reports.writing.report import write_answers

    options = Options(
        template,
        workers,
        load_rps,
        price_per_hour,
        _objective(ttft_ms, tpot_ms, e2el_ms),
        None if template == "capacity" else STUDY_REQUESTS,
    )
    read = read_inputs(inputs)
    with progress_bars() as progress:
        answers = collect(read, options, progress)
        progress("report", 0, 1)
        path = write_answers(answers, read.names, answers.created, out, template)
        progress("report", 1, 1)
    _tell(answers)
    click.echo(f"{path}")


def _objective(ttft_ms: float | None, tpot_ms: float | None, e2el_ms: float | None) -> Objective | None:
    from analysis.capacity import Objective

    if ttft_ms is None and tpot_ms is None and e2el_ms is None:
        return None
    return Objective(ttft_ms, tpot_ms, e2el_ms)


def _tell(answers: Answers) -> None:
    """Print the table of the study, what was answered, and what was not."""
    from rich.table import Table
    from rich.text import Text

    from reports import summary_table

    if answers.study is not None:
        say(summary_table(answers.study))
    if answers.answered:
        table = Table(title="Answered", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for one in answers.answered:
            answer = one.part.answer
            table.add_row(Text(_clean(answer.lead or one.part.title)), Text(_clean(answer.text)))
        say(table)
    for left in answers.unanswered:
        say(Text(f"not answered: {left.title}, because {left.reason}"))


def _clean(text: str) -> str:
    """Text without the invisible places to break of a page."""
    return text.replace("\u200b", "")
