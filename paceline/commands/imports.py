"""Commands that turn what others recorded into TraceSets."""

from __future__ import annotations

from typing import Any

import click

from paceline.terminal import command_line, progress_bars


@click.group("import")
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
    with progress_bars() as progress:
        imported = import_specdecode_bench(
            files, alignment=alignment, domain=domain, costs=costs, command=command_line(), progress=progress
        )
    imported.write(out)
    click.echo(out)
