"""Commands that write reports: demo and report."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.terminal import progress_bars, read_traces, say, stage

DEMO_TRACES = "smollm2-135m-cpu-greedy"


@click.command()
@click.option("--out", default="paceline-demo", show_default=True, help="Folder for the report and its figures.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes for the simulations."
)
def demo(out: str, workers: int) -> None:
    """From bundled traces of a real model to a PDF report: replay, analysis, report."""
    _report(DEMO_TRACES, Path(out), workers)


@click.command()
@click.argument("traces")
@click.option("--out", default="paceline-report", show_default=True, help="Folder for the report and its figures.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes for the simulations."
)
def report(traces: str, out: str, workers: int) -> None:
    """Study TRACES (a folder or a bundled name) and write report.pdf."""
    _report(traces, Path(out), workers)


def _report(source: str, out: Path, workers: int) -> None:
    from analysis import study
    from reports import summary_table, write_report

    traces = read_traces(source)
    with progress_bars() as progress:
        findings = study(traces, workers=workers, progress=stage(progress, "simulate"))
        path = write_report(findings, out / "report.pdf", progress=stage(progress, "report"))
    say(summary_table(findings))
    click.echo(f"{path}")
