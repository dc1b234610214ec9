"""The command that compares predictions with measurements."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.terminal.progress import progress_bars, say, stage


@click.command()
@click.argument("folder", required=False, type=click.Path(file_okay=False))
@click.option("--out", default="paceline-validation", show_default=True, help="Folder for the report and the table.")
@click.option("--published", type=click.Path(file_okay=False), help="Folder with public measurements, to add them.")
@click.option("--readme", type=click.Path(dir_okay=False), help="Put the table between the marks of this file, too.")
@click.option("--page", type=click.Path(dir_okay=False), help="Markdown page with every condition to write.")
@click.option("--json", "also", type=click.Path(file_okay=False), help="Another folder for fidelity.json.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes; results do not depend on it."
)
def validate(
    folder: str | None,
    out: str,
    published: str | None,
    readme: str | None,
    page: str | None,
    also: str | None,
    workers: int,
) -> None:
    """Compare predictions with measurements: every measured run below FOLDER with the scenario beside it.

    Without FOLDER, the measured runs that come with the package. `paceline observe` makes such runs of your own
    engines. First comes acceptance: drafts, drafted tokens, accepted tokens by position and tokens per round,
    predicted and as the engine counted them; then times; then how much of each error is acceptance, step time and
    queue. Writes report.pdf, its figures, fidelity.json and conditions.csv.
    """
    from analysis.fidelity.bundle import bundled_runs
    from analysis.fidelity.table import merged
    from analysis.fidelity.validate import FILES, write
    from analysis.fidelity.validate import validate as compare
    from calibration.common.files import write_whole
    from reports.page.text import acceptance_lines
    from reports.writing.markdown import fidelity_markdown, fidelity_page, write_between
    from reports.writing.terminal import acceptance_table, fidelity_table, split_table
    from reports.writing.validation import write_validation

    with progress_bars() as progress:
        found = compare(folder or bundled_runs(), workers=workers, progress=stage(progress, "predict"))
        if published is not None:
            from analysis.fidelity.public import public_fidelity

            found = merged(found, public_fidelity(published, progress=stage(progress, "published")))
        write(found, out)
        path = write_validation(found, Path(out) / "report.pdf")
    if readme is not None:
        write_between(Path(readme), fidelity_markdown(found))
    if page is not None:
        write_whole(Path(page), fidelity_page(found))
    if also is not None:
        write_whole(Path(also) / FILES[0], (Path(out) / FILES[0]).read_text(encoding="utf-8"))
    for line in acceptance_lines(found):
        click.echo(line)
    for table in (acceptance_table(found), fidelity_table(found), split_table(found)):
        if table is not None:
            say(table)
    click.echo(str(path))
