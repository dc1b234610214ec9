"""The command that compares predictions with measurements."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.terminal.progress import progress_bars, say, stage


@click.command()
@click.argument("folder", required=False, type=click.Path(file_okay=False))
@click.option("--out", default="paceline-validation", show_default=True, help="Folder for the report and the table.")
@click.option("--page", type=click.Path(dir_okay=False), help="Markdown page with every condition to write.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes; results do not depend on it."
)
def validate(
    folder: str | None,
    out: str,
    page: str | None,
    workers: int,
) -> None:
    """Compare predictions with measurements: every measured run below FOLDER with the scenario beside it.

    Without FOLDER, the measured runs that come with the package. `paceline observe` makes such runs of your own
    engines. First comes acceptance: drafts, drafted tokens, accepted tokens by position and tokens per round,
    predicted and as the engine counted them; then times; then how much of each error is acceptance, step time and
    queue. Writes report.pdf, its figures, fidelity.json and conditions.csv.
    """
    from analysis.fidelity.bundle import bundled_runs
    from analysis.fidelity.validate import validate as compare
    from analysis.fidelity.validate import write
    from calibration.common.files import write_whole
    from reports.page.text import acceptance_lines
    from reports.writing.markdown import fidelity_page
    from reports.writing.terminal import acceptance_table, fidelity_table, split_table
    from reports.writing.validation import write_validation

    with progress_bars() as progress:
        found = compare(folder or bundled_runs(), workers=workers, progress=stage(progress, "predict"))
        write(found, out)
        path = write_validation(found, Path(out) / "report.pdf")
    if page is not None:
        write_whole(Path(page), fidelity_page(found))
    for line in acceptance_lines(found):
        click.echo(line)
    for table in (acceptance_table(found), fidelity_table(found), split_table(found)):
        if table is not None:
            say(table)
    click.echo(str(path))
