"""Commands that run real models: calibrate, distill and time-shapes.

The command that grades models: which stage of a cascade answers which item rightly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from paceline.terminal.progress import command_line, progress_bars, say

if TYPE_CHECKING:
    from rich.table import Table

    from calibration.grading.job import Grading
    from calibration.jobs.job import CalibrationSettings


@click.command()
@click.argument("what", metavar="JOB.toml|VERIFIER")
@click.option("--drafter", "drafters", multiple=True, help="prompt-lookup, exit-L or skip-A-B; repeat.")
@click.option("--out", help="Folder of the TraceSet to write; a job file names its own.")
@click.option("--domain", "domains", multiple=True, help="Only these bundled domains; repeat.")
@click.option("--prompts", "prompt_file", type=click.Path(dir_okay=False), help="Your own prompts (.toml or .jsonl).")
@click.option("--limit", "limit_per_domain", type=click.IntRange(1), help="Prompts per domain.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Prompts generated at once.")
@click.option("--gamma-max", default=8, show_default=True, type=click.IntRange(1), help="Steps of a free draft.")
@click.option(
    "--rollout-stride",
    default=8,
    show_default=True,
    type=click.IntRange(0),
    help="A free draft is recorded at every so many positions; 0: none.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8"]),
)
@click.option("--timings/--no-timings", default=True, show_default=True, help="Time steps over a grid.")
@click.option("--timing-repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--retime", is_flag=True, help="Only take the step times of an existing TraceSet anew.")
@click.pass_context
def calibrate(ctx: click.Context, /, what: str, out: str | None, retime: bool, **options: Any) -> None:
    """Record a verifier with its drafters.

    JOB.toml describes everything (see recipes/ and the README); VERIFIER (smollm2-135m, a local folder or a hub name)
    with --drafter and --out is the short way for the simplest drafters. An interrupted run goes on where it stopped
    when the same command is given again.
    """
    from calibration.jobs.job import calibrate as record
    from calibration.jobs.job import record_timings

    settings, target = _calibration_job(ctx, what, out, options)
    with progress_bars() as progress:
        if retime:
            record_timings(settings, target, progress=progress)
        else:
            record(settings, target, progress=progress)
    click.echo(str(target))
    if settings.long_context is not None and not retime:
        from calibration.jobs.long_context_job import long_context_path

        click.echo(str(long_context_path(target)))


def _calibration_job(
    ctx: click.Context, what: str, out: str | None, options: dict[str, Any]
) -> tuple[CalibrationSettings, Path]:
    """Give the settings that the command line asks for, and where the TraceSet goes."""
    from calibration.jobs.job import CalibrationSettings

    if what.endswith(".toml"):
        from calibration.jobs.jobfile import load_job

        given = [name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            name = given[0].replace("_", "-").removesuffix("s" if given[0] in ("drafters", "domains") else "")
            raise click.UsageError(f"--{name} belongs to the short way; with a job file, write it there")
        settings, target = load_job(what, command_line())
        return settings, target if out is None else Path(out)
    if not options["drafters"] or out is None:
        raise click.UsageError("without a job file, --drafter and --out must be given")
    chosen = {
        **options,
        "domains": options["domains"] or None,
        "prompt_file": Path(options["prompt_file"]) if options["prompt_file"] else None,
    }
    return CalibrationSettings(verifier=what, command=command_line(), **chosen), Path(out)


@click.command()
@click.argument("job", type=click.Path(dir_okay=False))
def distill(job: str) -> None:
    """Train drafters as JOB (a TOML file) says: students of a verifier, or heads on its states.

    Finished texts and drafters stay, one under way goes on from its last checkpoint when the command is given again.
    """
    from calibration.common.errors import CalibrationError
    from calibration.common.toml import read_toml

    if "head" in read_toml(job, CalibrationError):
        from calibration.training.head_job import load_heads_job, run_heads

        heads, out = load_heads_job(job)
        with progress_bars() as progress:
            run_heads(heads, out, progress)
    else:
        from calibration.training.jobfile import load_distill_job
        from calibration.training.run import run_distill
        from calibration.training.tables import results_table

        students, out = load_distill_job(job)
        with progress_bars() as progress:
            results = run_distill(students, out, progress)
        say(results_table(results))
    click.echo(str(out))


@click.command("time-shapes")
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--out", required=True, help="Folder of the step grid to write.")
def time_shapes_command(job: str, out: str) -> None:
    """Time steps of published shapes with random weights, as JOB (a TOML file) says.

    Works through the most useful cells first, within the job's budget; the same command goes on where it stopped.
    """
    import pyarrow.compute as pc

    from calibration.timing import load_timing_job, time_shapes

    loaded = load_timing_job(job)
    with progress_bars() as progress:
        grid = time_shapes(loaded, out, progress)
    cells = len(grid.steps.select(["repeat"]).filter(pc.equal(grid.steps["repeat"], 0)))
    click.echo(f"{cells:,} cells timed, {grid.skipped.num_rows:,} skipped (the table says why)")
    if not grid.complete:
        left = sum(group.cells for group in grid.manifest.missing)
        click.echo(f"{left:,} cells are left: the budget is spent, the same command goes on", err=True)
    click.echo(out)


@click.command()
@click.option("--verifier", help="A model whose exits are graded: smollm2-135m, a local folder or a hub name.")
@click.option("--exits", help="Layers of its exits, as 20,24,28; the whole model is always the last stage.")
@click.option("--models", help="Several models as stages, the cheapest first, with commas: A,B,C.")
@click.option("--items", default="builtin", show_default=True, help="builtin, or a JSONL file of your own items.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Draws the built-in items.")
@click.option("--limit", "limit_per_domain", type=click.IntRange(1), help="Items per domain.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Items read at once.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8"]),
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The table to write (.csv).")
def grade(out: str, exits: str | None, models: str | None, **options: object) -> None:
    """Measure how often each stage of a cascade answers rightly.

    Stages are exits of one model (--verifier and --exits) or several models (--models). Writes a table with a row
    per item and stage, and a manifest beside it that says how it was made; both at the end, whole or not at all.
    """
    from calibration.common.errors import CalibrationError
    from calibration.grading.job import GradingSettings, run_grading, write_grading

    if not out.endswith(".csv"):
        raise CalibrationError(f"out: must end in .csv, got '{Path(out).name}'")
    settings = GradingSettings(
        exits=_layers(exits),
        models=tuple(name for name in (models or "").split(",") if name),
        command=command_line(),
        **options,  # type: ignore[arg-type]  # click has checked them
    )
    with progress_bars() as progress:
        grading = run_grading(settings, progress)
    target = write_grading(grading, out)
    say(_table(grading))
    click.echo(str(target))


def _layers(given: str | None) -> tuple[int, ...]:
    """Give the layers of ``20,24,28``."""
    from calibration.common.errors import CalibrationError

    try:
        return tuple(int(part) for part in (given or "").split(",") if part)
    except ValueError:
        raise CalibrationError(f"exits: must be numbers of layers with commas, as 20,24,28, got '{given}'") from None


def _table(grading: Grading) -> Table:
    """Give quality and cost of every stage as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape("graded quality [measured]"))
    for column in ("stage", "items", "quality", "95% interval", "chance", "greedy exact", "cost (s)"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, told in grading.manifest["stages"].items():
        low, high = told["quality_95"]
        table.add_row(
            name,
            str(told["items"]),
            f"{told['quality']:.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{told['chance']:.3f}",
            f"{told['greedy_exact']:.3f}",
            f"{told['cost_s']:.4g}",
        )
    return table
