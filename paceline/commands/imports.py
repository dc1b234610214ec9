"""Commands that turn what others recorded, and what engines report, into TraceSets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paceline.terminal.progress import command_line, progress_bars, read_traces

if TYPE_CHECKING:
    from calibration import TraceSet
    from calibration.importers import Origin
    from calibration.traces.manifest import CostConstants

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(dir_okay=False)
_OUT = click.option("--out", required=True, help="Folder of the TraceSet to write.")


def _options(*several: Callable[[F], F]) -> Callable[[F], F]:
    """Put options together, in the order of --help."""

    def decorated(function: F) -> F:
        for option in reversed(several):
            function = option(function)
        return function

    return decorated


_COSTS = _options(
    click.option(
        "--verifier-cost", metavar="BASE,TOKEN,CONTEXT", help="Seconds of a verifier step: linear constants."
    ),
    click.option(
        "--drafter-cost",
        "drafter_costs",
        multiple=True,
        metavar="NAME=BASE,TOKEN,CONTEXT[,per_round]",
        help="Seconds of a draft step (or round); or NAME=FRACTION of verification; repeat.",
    ),
    click.option("--overhead", default=0.0, show_default=True, type=click.FloatRange(0), help="Host seconds a step."),
    click.option(
        "--cost-source", default="given on the command line", show_default=True, help="Where they come from."
    ),
)
_ORIGIN = _options(
    click.option("--verifier", default="unknown", help="Name of the verifier, where the report has none."),
    click.option("--drafter", default="drafter", show_default=True, help="What the TraceSet calls the drafter."),
    click.option("--paradigm", default="unknown", help="How it drafts: ngram, suffix, eagle3, draft_model, mtp ..."),
    click.option("--domain", help="Domain of all requests; default: the file's name."),
    click.option("--temperature", type=click.FloatRange(0), help="Of the run; 0 is greedy."),
    click.option("--device", default="unknown", help="What it ran on."),
    click.option(
        "--seed", default=0, show_default=True, type=int, help="Random seed of what the report does not tell."
    ),
    _COSTS,
)
_AGGREGATE = _options(
    click.option("--lengths", metavar="REQUESTS,PROMPT,OUTPUT", help="Requests, and their tokens in all."),
    click.option("--draft-tokens", type=click.IntRange(1), help="Draft length, where the report does not tell it."),
    click.option(
        "--request-std-tokens",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0),
        help="Spread of the mean accepted length between requests: an aggregate cannot tell it.",
    ),
)


@click.group("import")
def import_() -> None:
    """Turn others' recordings and engines' reports into TraceSets."""


@import_.command("specdecode-bench")
@click.argument("files", nargs=-1, required=True, type=_FILE)
@_OUT
@click.option(
    "--alignment",
    default="position",
    show_default=True,
    type=click.Choice(["position", "published"]),
    help="'published' reads the lists one place too early, as the published simulator does.",
)
@click.option("--domain", help="Domain of all files; default: each file's name.")
@_COSTS
def specdecode_bench(files: tuple[str, ...], out: str, alignment: Any, domain: str | None, **costs: Any) -> None:
    """Import FILES (JSON lines) of SpecDecode-Bench's simulator: EAGLE and n-gram on Llama-3.1-8B."""
    from calibration.importers import import_specdecode_bench

    constants = _constants(costs)
    with progress_bars() as progress:
        imported = import_specdecode_bench(
            files, alignment=alignment, domain=domain, costs=constants, command=command_line(), progress=progress
        )
    _write(imported, out)


@import_.command("vllm-requests")
@click.argument("files", nargs=-1, required=True, type=_FILE)
@_OUT
@_ORIGIN
def vllm_requests(files: tuple[str, ...], out: str, seed: int, **options: Any) -> None:
    """Import FILES (JSON lines) of vLLM's answers with `metrics.speculative_decoding`, best the detailed ones."""
    from calibration.importers import import_vllm_requests

    origin = _origin(options)
    with progress_bars() as progress:
        imported = import_vllm_requests(files, origin=origin, seed=seed, progress=progress)
    _write(imported, out)


@import_.command("vllm-counters")
@click.argument("after", type=_FILE)
@_OUT
@click.option("--before", type=_FILE, help="The same page, read before the run.")
@click.option("--requests", type=click.IntRange(1), help="Their number, where it is not counted (llama.cpp).")
@_AGGREGATE
@_ORIGIN
def vllm_counters(after: str, out: str, before: str | None, requests: int | None, seed: int, **options: Any) -> None:
    """Import the text of the /metrics of vLLM or llama.cpp, read AFTER a run: rates by position, from which run
    lengths are synthesised."""
    from calibration.importers import import_vllm_counters

    aggregate, origin = _aggregate(options), _origin(options)
    imported = import_vllm_counters(after, before=before, requests=requests, origin=origin, seed=seed, **aggregate)
    _write(imported, out)


@import_.command("vllm-log")
@click.argument("log", type=_FILE)
@_OUT
@_AGGREGATE
@_ORIGIN
def vllm_log(log: str, out: str, seed: int, **options: Any) -> None:
    """Import the "SpecDecoding metrics" lines of a vLLM LOG; --lengths must be given."""
    from calibration.importers import import_vllm_log

    if options["lengths"] is None:
        raise click.UsageError("--lengths must be given: the log does not say how many requests it is about")
    aggregate, origin = _aggregate(options), _origin(options)
    _write(import_vllm_log(log, origin=origin, seed=seed, **aggregate), out)


@import_.command("aiperf")
@click.argument("export", type=_FILE)
@_OUT
@click.option("--server-metrics", type=_FILE, help="AIPerf's export of the server's metrics.")
@click.option("--rates", metavar="R1,R2,...", help="Acceptance by position, where the export has none.")
@click.option(
    "--undrafted",
    metavar="SHARE",
    type=click.FloatRange(0, 1, max_open=True),
    help="With --rates: share of rounds in which a lookup found nothing.",
)
@click.option("--request-std-tokens", default=0.0, show_default=True, type=click.FloatRange(0))
@_ORIGIN
def aiperf(export: str, out: str, server_metrics: str | None, rates: str | None, seed: int, **options: Any) -> None:
    """Import an AIPerf EXPORT: profile_export.jsonl or profile_export_aiperf.json."""
    from calibration.importers import import_aiperf

    imported = import_aiperf(
        export,
        server_metrics=server_metrics,
        rates=None if rates is None else _numbers(rates, "--rates", float),
        undrafted=options.pop("undrafted"),
        request_std_tokens=options.pop("request_std_tokens"),
        origin=_origin(options),
        seed=seed,
    )
    _write(imported, out)


@import_.command("sglang")
@click.argument("report", type=_FILE)
@_OUT
@click.option("--run", type=click.IntRange(1), help="Which one, where a benchmark appended several to the file.")
@_AGGREGATE
@_ORIGIN
def sglang(report: str, out: str, run: int | None, seed: int, **options: Any) -> None:
    """Import an SGLang REPORT: answers, server info, benchmark output or log with accept lengths."""
    from calibration.importers import import_sglang

    aggregate, origin = _aggregate(options), _origin(options)
    _write(import_sglang(report, run=run, origin=origin, seed=seed, **aggregate), out)


@import_.command("measured-run")
@click.argument("folder", type=click.Path(file_okay=False))
@_OUT
@click.option("--prompts", required=True, help="TraceSet (folder or bundled name) whose prompts were served.")
@click.option("--ngram-max", default=3, show_default=True, type=click.IntRange(1), help="Of its prompt lookup.")
@click.option("--ngram-min", default=1, show_default=True, type=click.IntRange(1))
@click.option("--max-draft-tokens", default=20, show_default=True, type=click.IntRange(1))
def measured_run(folder: str, out: str, prompts: str, ngram_max: int, ngram_min: int, max_draft_tokens: int) -> None:
    """Import the text that an engine wrote without speculation (see `paceline observe`), with what prompt lookup
    would have drafted there."""
    from calibration.importers.measured_run import TokenDrafter, import_measured_run
    from calibration.measured import MeasuredRun
    from calibration.observe.prompts import recorded_prompts
    from calibration.proposers.lookup import LookupSettings

    known = read_traces(prompts)
    drafter = TokenDrafter("prompt-lookup", LookupSettings(ngram_max, ngram_min, max_draft_tokens))
    run = MeasuredRun.read(folder)
    imported = import_measured_run(
        run, recorded_prompts(known), (drafter,), sources=known.manifest.prompts, command=command_line()
    )
    _write(imported, out)


@import_.command("plugin")
@click.argument("name")
@click.argument("files", nargs=-1, required=True, type=_FILE)
@_OUT
@_ORIGIN
def plugin(name: str, files: tuple[str, ...], out: str, seed: int, **options: Any) -> None:
    """Import FILES with the importer NAME of another package (entry points of the group paceline.importers)."""
    from calibration.importers.evidence import import_from_outside

    _write(import_from_outside(name, files, origin=_origin(options), settings={"seed": seed}), out)


def _write(imported: TraceSet, out: str) -> None:
    imported.write(out)
    for line in imported.manifest.notes:
        click.echo(line, err=True)
    for line in imported.manifest.unknown:
        click.echo(f"not known: {line}", err=True)
    click.echo(out)


def _constants(options: dict[str, Any]) -> CostConstants | None:
    """Take the options of costs out of `options` and read them."""
    from calibration.importers.origin import cost_constants

    names = ("verifier_cost", "drafter_costs", "overhead", "cost_source")
    return cost_constants(*(options.pop(name) for name in names))


def _origin(options: dict[str, Any]) -> Origin:
    from calibration.importers import Origin

    costs = _constants(options)
    return Origin(**options, costs=costs, command=command_line())


def _aggregate(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of aggregates out of `options` and read them."""
    from calibration.importers.aggregates import even_lengths

    given = {name: options.pop(name) for name in ("lengths", "draft_tokens", "request_std_tokens")}
    if given["lengths"] is not None:
        numbers = _numbers(given["lengths"], "--lengths", int)
        if len(numbers) != 3:
            raise click.BadParameter(f"must be three numbers, got '{given['lengths']}'", param_hint="--lengths")
        requests, prompt, output = numbers
        given["lengths"] = even_lengths(requests, prompt, output, place="--lengths")
    return given


N = TypeVar("N", int, float)


def _numbers(text: str, option: str, kind: Callable[[str], N]) -> list[N]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"must be numbers with commas between them, got '{text}'", param_hint=option
        ) from None
