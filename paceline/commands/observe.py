"""The command that runs scenarios on real engines and servers, and keeps what they did.

The command that compares predictions with measurements.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from paceline.terminal.progress import command_line, progress_bars, say, stage

if TYPE_CHECKING:
    from pydantic import SecretStr

    from analysis.fidelity.observing import Planned

KEY_VARIABLE = "OPENAI_API_KEY"
_FILE = click.Path(dir_okay=False)


def _secret(value: str) -> SecretStr:
    from pydantic import SecretStr

    return SecretStr(value)


@click.command()
@click.option("--scenario", "held_out", multiple=True, type=_FILE, help="Condition to predict; repeat.")
@click.option("--fit", multiple=True, type=_FILE, help="Condition that predictions may be fitted to; repeat.")
@click.option("--out", required=True, help="Folder; each condition gets one in it, by the scenario's name.")
@click.option("--url", help="OpenAI-compatible server (vLLM, SGLang, llama.cpp ...) to drive over HTTP.")
@click.option("--engine", type=click.Choice(["own", "openvino"]), help="Engine to drive in this process.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Of each condition, in turns.")
@click.option("--job", type=_FILE, help="For --engine own: the job that recorded the TraceSet (model and drafters).")
@click.option("--kv", default="paged", show_default=True, type=click.Choice(["paged", "padded"]), help="For own.")
@click.option(
    "--gguf", help="For --engine openvino: GGUF file or IR folder; default: that of the TraceSet's verifier."
)
@click.option(
    "--numerics",
    default="engine",
    show_default=True,
    type=click.Choice(["engine", "exact"]),
    help="For --engine openvino: its own rounding, or float32, whose text does not depend on the batch.",
)
@click.option(
    "--num-kv-blocks",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="For --engine openvino: of 32 tokens.",
)
@click.option(
    "--clock",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "thread-cpu", "wall"]),
    help="Of an engine: CPU time on a CPU (other processes do not count), wall time on a GPU.",
)
@click.option("--model", help="For --url: which model, where several are served.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    default=KEY_VARIABLE,
    show_default=True,
    help="For --url: environment variable that holds the key of the server.",
)
@click.option(
    "--api-key",
    type=_secret,
    metavar="KEY",
    help="The key itself. Never written down; but lists of processes show it, so prefer --api-key-env.",
)
@click.option("--endpoint", default="completions", show_default=True, type=click.Choice(["completions", "chat"]))
@click.option("--tokenizer", help="For --url: folder of a tokenizer, where the server takes text only.")
@click.option("--timeout", default=300.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Seconds.")
@click.pass_context
def observe(ctx: click.Context, /, **options: Any) -> None:
    """Run scenarios on a real engine or server and record what it did, for `paceline validate`.

    The requests and arrivals are those of the simulated run. An interrupted call goes on where it stopped when the
    same command is given again.
    """
    from analysis.fidelity.observing import observe as over_http
    from analysis.fidelity.observing import plans

    if not options["held_out"] and not options["fit"]:
        raise click.UsageError("give at least one --scenario or --fit")
    if (options["url"] is None) == (options["engine"] is None):
        raise click.UsageError("give --url or --engine, one of them")
    if options["engine"] == "own" and options["job"] is None:
        raise click.UsageError("--engine own needs --job")
    options["api_key"] = _api_key(ctx, options)
    out = Path(options["out"])
    if options["url"] is None:
        folders = _in_process(plans(options["fit"], options["held_out"]), out, options)
    else:
        with progress_bars() as progress:
            folders = over_http(
                options["url"],
                options["held_out"],
                out,
                fit=options["fit"],
                repeats=options["repeats"],
                model=options["model"],
                api_key=options["api_key"],
                endpoint=options["endpoint"],
                tokenizer=options["tokenizer"],
                timeout_s=options["timeout"],
                command=command_line(),
                progress=progress,
            )
    for folder in folders:
        click.echo(str(folder))


def _api_key(ctx: click.Context, options: dict[str, Any]) -> SecretStr | None:
    """Give the key that was given, or that of the environment; none where the default variable is not set."""
    from calibration.common.errors import CalibrationError

    named = ctx.get_parameter_source("api_key_env") is ParameterSource.COMMANDLINE
    given: SecretStr | None = options["api_key"]
    if given is not None and named:
        raise click.UsageError("give --api-key-env or --api-key, one of them")
    if given is not None:
        return given
    value = os.environ.get(options["api_key_env"], "").strip()
    if not value and named:
        rule = "must name an environment variable that holds a key, it is empty or not set"
        raise CalibrationError(f"--api-key-env: {rule}, got '{options['api_key_env']}'")
    return _secret(value) if value else None


def _in_process(planned: list[Planned], out: Path, options: dict[str, Any]) -> list[Path]:
    from analysis.fidelity.observing import observe_engines

    with progress_bars() as progress:
        make, on_cpu = (_own if options["engine"] == "own" else _openvino)(planned, options)
        clock: Any = ("thread-cpu" if on_cpu else "wall") if options["clock"] == "auto" else options["clock"]
        return observe_engines(
            planned,
            make,
            out,
            repeats=options["repeats"],
            clock=clock,
            command=command_line(),
            progress=lambda stage, done, total: progress(stage, done, total) if stage == "observe" else None,
        )


def _own(planned: list[Planned], options: dict[str, Any]) -> tuple[Any, bool]:
    """Give (maker of engines, whether they run on a CPU)."""
    from analysis.fidelity.observing import own_engines
    from calibration.drafters.kinds import parse_drafter
    from calibration.jobs.jobfile import load_job
    from calibration.models.load import load_verifier

    settings, _ = load_job(options["job"])
    drafters = [parse_drafter(one) if isinstance(one, str) else one for one in settings.drafters]
    verifier = load_verifier(settings.verifier, device=settings.device, dtype=settings.dtype)
    return own_engines(verifier, drafters, kv=options["kv"]), verifier.device.type == "cpu"


def _openvino(planned: list[Planned], options: dict[str, Any]) -> tuple[Any, bool]:
    from analysis.fidelity.observing import openvino_engines
    from calibration.common.errors import CalibrationError, did_you_mean
    from calibration.common.fetch import PUBLISHED, fetch_gguf

    gguf = options["gguf"]
    if gguf is None:
        name = planned[0].traces.manifest.verifier.name
        if name not in PUBLISHED:
            rule = f"verifier '{name}': no GGUF file is known, give --gguf"
            raise CalibrationError(f"{planned[0].path}: {rule}{did_you_mean(name, PUBLISHED)}")
        gguf = fetch_gguf(PUBLISHED[name])
    return openvino_engines(gguf, {name: options[name] for name in ("numerics", "num_kv_blocks")}), True


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
    from analysis.fidelity.measured import bundled_runs
    from analysis.fidelity.validate import validate as compare
    from analysis.fidelity.validate import write
    from calibration.common.files import write_whole
    from reports.page.text import acceptance_lines
    from reports.writing.terminal import acceptance_table, fidelity_table, split_table
    from reports.writing.validation import fidelity_page, write_validation

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
