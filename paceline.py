"""paceline: predict what speculative decoding will bring, by replaying recorded behaviour of real models.

The command line is `main`; the public names below are re-exported from the four packages and loaded when used:

    TraceSet, bundled, bundled_names        calibration: recorded behaviour
    Scenario, load_scenario, simulate       simulator: replay it under traffic and policies
    study                                   analysis: what follows from it, with intervals
    write_report                            reports: the PDF

    >>> import paceline
    >>> traces = paceline.bundled("smollm2-135m-cpu-greedy")
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from analysis import study
    from calibration import PacelineError, PacelineWarning, TraceSet, bundled, bundled_names
    from calibration.job import CalibrationSettings
    from reports import write_report
    from simulator import RunResult, Scenario, load_scenario, simulate

_HOME = {
    "PacelineError": "calibration",
    "PacelineWarning": "calibration",
    "RunResult": "simulator",
    "Scenario": "simulator",
    "TraceSet": "calibration",
    "bundled": "calibration",
    "bundled_names": "calibration",
    "load_scenario": "simulator",
    "simulate": "simulator",
    "study": "analysis",
    "write_report": "reports",
}

__all__ = [
    "PacelineError",
    "PacelineWarning",
    "RunResult",
    "Scenario",
    "TraceSet",
    "bundled",
    "bundled_names",
    "load_scenario",
    "main",
    "simulate",
    "study",
    "write_report",
]

DEMO_TRACES = "smollm2-135m-cpu-greedy"

Progress = Callable[[str, int, int], None]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `paceline --help` does not pay for pyarrow, pydantic and scipy.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'paceline' has no attribute '{name}'")


class _Group(click.Group):
    """Turns expected failures into one line, warnings into one line each, and Ctrl-C into a plain goodbye."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\ninterrupted: nothing was left half-written", err=True)
            ctx.exit(130)
        except Exception as fault:
            from calibration.errors import PacelineError

            if isinstance(fault, PacelineError):
                raise click.ClickException(str(fault)) from None
            raise


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from calibration.errors import PacelineWarning

    if issubclass(category, PacelineWarning):
        click.echo(f"{category.__name__}: {message}", err=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show one bar per stage on the terminal; give the callback ``(stage, done, total)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), speed_estimate_period=300) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # What an interrupted run had done is not speed: the estimate counts from here.
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def _stage(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """Give a callback ``(done, total)`` for one stage."""
    return lambda done, total: progress(stage, done, total)


def _print(*objects: Any) -> None:
    from rich.console import Console

    Console().print(*objects)


def _traces(source: str) -> TraceSet:
    """Read a TraceSet from a folder, or a bundled one by name."""
    from calibration.errors import TraceError, did_you_mean
    from calibration.traces import TraceSet, bundled, bundled_names

    if source in bundled_names() and not Path(source).exists():
        return bundled(source)
    if not Path(source).exists():
        raise TraceError(f"{source}: no such folder or bundled TraceSet{did_you_mean(source, bundled_names())}")
    return TraceSet.read(source)


_WORKERS = click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes; results do not depend on it."
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paceline")
def main() -> None:
    """Predict what speculative decoding will bring, before anything is deployed.

    Record a drafter/verifier pair (calibrate), replay it under traffic (simulate), and hand on a report.
    """


@main.command()
@click.option("--out", default="paceline-demo", show_default=True, help="Folder for the report and its figures.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes for the simulations."
)
def demo(out: str, workers: int) -> None:
    """From bundled traces of a real model to a PDF report: replay, analysis, report."""
    _report(DEMO_TRACES, Path(out), workers)


@main.command()
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

    traces = _traces(source)
    with _progress() as progress:
        findings = study(traces, workers=workers, progress=_stage(progress, "simulate"))
        path = write_report(findings, out / "report.pdf", progress=_stage(progress, "report"))
    _print(summary_table(findings))
    click.echo(f"{path}")


@main.command("simulate")
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.option("--out", required=True, help="Folder for summary.json, requests.parquet and iterations.parquet.")
@click.option("--replications", type=click.IntRange(2), help="Run that many seeds; give means with intervals.")
@_WORKERS
def simulate_command(scenario: str, out: str, replications: int | None, workers: int) -> None:
    """Run SCENARIO (a TOML file) and write its results."""
    from simulator import load_scenario, replicate
    from simulator import simulate as run
    from simulator.results.tables import replications_table, summary_table

    loaded = load_scenario(scenario)
    with _progress() as progress:
        if replications:
            several = replicate(loaded, replications, workers=workers, progress=_stage(progress, "simulate"))
            path, table = several.write(out), replications_table(several)
        else:
            result = run(loaded, progress=_stage(progress, "simulate"))
            path, table = result.write(out), summary_table(result.summary)
    _print(table)
    click.echo(f"{path}")


_FILES = {
    "scenario": ("scenario", "simulator", "Scenario"),
    "calibrate": ("recording job", "calibration.jobfile", "Job"),
    "distill": ("distillation job", "calibration.distill.jobfile", "DistillJob"),
    "heads": ("heads job", "calibration.heads.job", "HeadsJob"),
    "time-shapes": ("timing job", "calibration.timing", "TimingJob"),
}
"""Files that a user writes: name -> (what it is called, where its model lives, the model)."""


@main.command("keys")
@click.argument("file", default="scenario", type=click.Choice(list(_FILES)))
def keys_command(file: str) -> None:
    """Print the reference of the keys of a FILE that you write (Markdown)."""
    from calibration.reference import reference

    what, module, model = _FILES[file]
    page = reference(getattr(importlib.import_module(module), model), what, f"paceline keys {file}")
    click.echo(page, nl=False)


@main.command("compare")
@click.argument("scenarios", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--replications", default=10, show_default=True, type=click.IntRange(2), help="Seeds, shared by all.")
@click.option("--out", help="Folder for comparison.json and the table of runs.")
@_WORKERS
def compare_command(scenarios: tuple[str, ...], replications: int, out: str | None, workers: int) -> None:
    """Run the first of SCENARIOS against each other one, on the same luck."""
    from simulator import compare, load_scenario
    from simulator.results.tables import comparison_table

    loaded = [load_scenario(path) for path in scenarios]
    with _progress() as progress:
        found = compare(*loaded, replications=replications, workers=workers, progress=_stage(progress, "simulate"))
    _print(comparison_table(found))
    if out:
        click.echo(f"{found.write(out)}")


@main.command("sweep")
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.argument("axes", nargs=-1, metavar="[KEY=VALUE,VALUE...]...")
@click.option("--out", required=True, help="Table to write: .csv or .parquet.")
@click.option("--store", help="sqlite file that keeps finished cells; default: beside --out.")
@click.option("--replications", type=click.IntRange(1), help="Seeds per cell.")
@_WORKERS
def sweep_command(
    scenario: str, axes: tuple[str, ...], out: str, store: str | None, replications: int | None, workers: int
) -> None:
    """Run SCENARIO for every combination of values, e.g. stopping.draft_tokens=1,2,4 engine.max_num_seqs=1,8.

    Finished cells are kept: an interrupted sweep goes on where it stopped.
    """
    from simulator import load_sweep, run_sweep
    from simulator.experiments.sweep import check_format
    from simulator.results.tables import sweep_table

    check_format(out)
    plan = load_sweep(scenario, axes, replications)
    with _progress() as progress:
        found = run_sweep(
            plan,
            store=store or Path(out).with_suffix(".sqlite"),
            workers=workers,
            progress=_stage(progress, "sweep"),
        )
    _print(sweep_table(found))
    click.echo(f"{found.write(out)}")


@main.command()
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
    from calibration.job import calibrate as record
    from calibration.job import record_timings

    settings, target = _calibration_job(ctx, what, out, options)
    with _progress() as progress:
        if retime:
            record_timings(settings, target, progress=progress)
        else:
            record(settings, target, progress=progress)
    click.echo(str(target))
    if settings.long_context is not None and not retime:
        from calibration.long_context_job import long_context_path

        click.echo(str(long_context_path(target)))


def _calibration_job(
    ctx: click.Context, what: str, out: str | None, options: dict[str, Any]
) -> tuple[CalibrationSettings, Path]:
    """Give the settings that the command line asks for, and where the TraceSet goes."""
    from calibration.job import CalibrationSettings

    if what.endswith(".toml"):
        from calibration.jobfile import load_job

        given = [name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            name = given[0].replace("_", "-").removesuffix("s" if given[0] in ("drafters", "domains") else "")
            raise click.UsageError(f"--{name} belongs to the short way; with a job file, write it there")
        settings, target = load_job(what, _command())
        return settings, target if out is None else Path(out)
    if not options["drafters"] or out is None:
        raise click.UsageError("without a job file, --drafter and --out must be given")
    chosen = {
        **options,
        "domains": options["domains"] or None,
        "prompt_file": Path(options["prompt_file"]) if options["prompt_file"] else None,
    }
    return CalibrationSettings(verifier=what, command=_command(), **chosen), Path(out)


@main.command()
@click.argument("job", type=click.Path(dir_okay=False))
def distill(job: str) -> None:
    """Train drafters as JOB (a TOML file) says: students of a verifier, or heads on its states.

    Finished texts and drafters stay, one under way goes on from its last checkpoint when the command is given again.
    """
    from calibration.errors import CalibrationError
    from calibration.tomlfile import read_toml

    if "head" in read_toml(job, CalibrationError):
        from calibration.heads.job import load_heads_job, run_heads

        heads, out = load_heads_job(job)
        with _progress() as progress:
            run_heads(heads, out, progress)
    else:
        from calibration.distill.jobfile import load_distill_job
        from calibration.distill.run import run_distill
        from calibration.distill.tables import results_table

        students, out = load_distill_job(job)
        with _progress() as progress:
            results = run_distill(students, out, progress)
        _print(results_table(results))
    click.echo(str(out))


@main.command("time-shapes")
@click.argument("job", type=click.Path(dir_okay=False))
@click.option("--out", required=True, help="Folder of the step grid to write.")
def time_shapes_command(job: str, out: str) -> None:
    """Time steps of published shapes with random weights, as JOB (a TOML file) says.

    Works through the most useful cells first, within the job's budget; the same command goes on where it stopped.
    """
    import pyarrow.compute as pc

    from calibration.timing import load_timing_job, time_shapes

    loaded = load_timing_job(job)
    with _progress() as progress:
        grid = time_shapes(loaded, out, progress)
    cells = len(grid.steps.select(["repeat"]).filter(pc.equal(grid.steps["repeat"], 0)))
    click.echo(f"{cells:,} cells timed, {grid.skipped.num_rows:,} skipped (the table says why)")
    if not grid.complete:
        left = sum(group.cells for group in grid.manifest.missing)
        click.echo(f"{left:,} cells are left: the budget is spent, the same command goes on", err=True)
    click.echo(out)


def _command() -> str:
    """Give the command line as it was typed, without the folder of the program."""
    import shlex

    return shlex.join(["paceline", *sys.argv[1:]])


@main.group()
def traces() -> None:
    """Show, check and import recorded behaviour."""


@traces.command()
@click.argument("folder")
def show(folder: str) -> None:
    """Describe the TraceSet in FOLDER (or a bundled one by name)."""
    from calibration.traces.show import show as describe
    from reports import definitions_table

    described = _traces(folder)
    _print(describe(described), definitions_table(described))


@traces.command()
@click.argument("folder")
def validate(folder: str) -> None:
    """Check the TraceSet in FOLDER against the contract."""
    checked = _traces(folder)
    rows = ", ".join(
        f"{getattr(checked, name).num_rows:,} {name}" for name in ("sequences", "positions", "rollouts", "timings")
    )
    click.echo(f"{folder}: keeps the contract ({rows})")


@traces.command("list")
def list_bundled() -> None:
    """Name the TraceSets that come with the package."""
    from calibration.traces import bundled_names

    for name in bundled_names():
        click.echo(name)


@traces.group("import")
def import_() -> None:
    """Turn others' recordings into TraceSets."""


@import_.command("specdecode-bench")
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--out", required=True, help="Folder of the TraceSet to write.")
@click.option(
    "--alignment",
    default="position",
    show_default=True,
    type=click.Choice(["position", "published"]),
    help="'published' reads the lists one place too early, as the published simulator does.",
)
@click.option("--domain", help="Domain of all files; default: each file's name.")
@click.option("--verifier-cost", metavar="BASE,TOKEN,CONTEXT", help="Seconds of a verifier step: linear constants.")
@click.option(
    "--drafter-cost",
    "drafter_costs",
    multiple=True,
    metavar="NAME=BASE,TOKEN,CONTEXT[,per_round]",
    help="Seconds of a draft step (or round); or NAME=FRACTION of verification; repeat.",
)
@click.option("--overhead", default=0.0, show_default=True, type=click.FloatRange(0), help="Host seconds a step.")
@click.option("--cost-source", default="given on the command line", show_default=True, help="Where they come from.")
def specdecode_bench(
    files: tuple[str, ...],
    out: str,
    alignment: Any,
    domain: str | None,
    verifier_cost: str | None,
    drafter_costs: tuple[str, ...],
    overhead: float,
    cost_source: str,
) -> None:
    """Import FILES (JSON lines) of SpecDecode-Bench's simulator: EAGLE and n-gram on Llama-3.1-8B."""
    from calibration.importers import import_specdecode_bench
    from calibration.importers.cost_options import cost_constants

    costs = cost_constants(verifier_cost, drafter_costs, overhead, cost_source)
    with _progress() as progress:
        imported = import_specdecode_bench(
            files, alignment=alignment, domain=domain, costs=costs, command=_command(), progress=progress
        )
    imported.write(out)
    click.echo(out)
