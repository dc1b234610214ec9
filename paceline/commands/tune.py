"""The command that tunes: the best drafter, policy and settings for a scenario."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from paceline.terminal.progress import progress_bars, say

if TYPE_CHECKING:
    from analysis.tuning import TuneFindings


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Give the whole numbers in ``1,2,4``."""
    from calibration.common.errors import ScenarioError

    try:
        return tuple(int(piece) for piece in text.split(",")) if text else ()
    except ValueError:
        raise ScenarioError(f"{option}: must be whole numbers like 1,2,4, got '{text}'") from None


@click.command("tune")
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.option("--objective", default="throughput", show_default=True, help="throughput, goodput, cost or energy.")
@click.option(
    "--slo", help="Limits in ms, e.g. ttft_ms=500,tpot_ms=50 (also itl_ms, e2el_ms); beside the scenario's."
)
@click.option("--attainment", default=0.99, show_default=True, help="Share of requests that must keep the limits.")
@click.option("--price-per-hour", type=float, help="Of one replica, for --objective cost.")
@click.option("--drafters", help="Names, e.g. eagle,ngram; default: those of the scenario, else all.")
@click.option("--draft-tokens", default="1,2,4,8", show_default=True, help="Draft lengths, without the bonus token.")
@click.option("--token-budgets", help="Values of engine.max_num_batched_tokens to try with the best.")
@click.option("--max-num-seqs", help="Values of engine.max_num_seqs to try with the best.")
@click.option(
    "--out", default="paceline-tune", show_default=True, help="Folder for the findings, best.toml, exports."
)
@click.option("--export", "engines", multiple=True, help="vllm, sglang or tensorrt-llm; may be given several times.")
@click.option("--drafter-model", "models", multiple=True, help="NAME=PATH of a drafter's weights, for exports.")
@click.option("--budget-s", default=100.0, show_default=True, help="Seconds that the search may take, about.")
@click.option(
    "--replications",
    type=click.IntRange(2),
    help="Of the final stage of successive halving; then no clock decides anything.",
)
@click.option("--store", type=click.Path(dir_okay=False), help="sqlite file that keeps runs: go on where it stopped.")
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes; results do not depend on it."
)
def tune(scenario: str, out: str, engines: tuple[str, ...], models: tuple[str, ...], **options: Any) -> None:
    """Find the best drafter, draft length, policy and budget for SCENARIO (a TOML file).

    Its own drafter and stopping policy are not used; traces, workload, engine and costs are. All candidates run on
    common random numbers, most of them briefly; the winner is judged on seeds that did not choose it. With an open
    loop, goodput means the rate that is sustained within the SLO, as a capacity plan finds it.
    """
    import dataclasses

    from analysis.tuning import TuneSettings, parse_slo
    from analysis.tuning import tune as search
    from analysis.tuning.export import check_exports, export, parse_models
    from analysis.tuning.space import chosen_drafters
    from analysis.tuning.write import check_folder, write_findings
    from reports.questions.tuning_figures import figure_files
    from simulator import load_scenario
    from simulator.running.run import read_traces

    settings = TuneSettings(
        objective=options["objective"],
        slo=parse_slo(options["slo"]) if options["slo"] else {},
        attainment=options["attainment"],
        price_per_hour=options["price_per_hour"],
        drafters=tuple(name.strip() for name in options["drafters"].split(",")) if options["drafters"] else None,
        draft_tokens=_numbers("--draft-tokens", options["draft_tokens"]),
        token_budgets=_numbers("--token-budgets", options["token_budgets"]),
        max_num_seqs=_numbers("--max-num-seqs", options["max_num_seqs"]),
        replications=options["replications"],
        budget_s=options["budget_s"],
        workers=options["workers"],
    )
    check_folder(out)
    loaded = load_scenario(scenario)
    manifest = read_traces(loaded).manifest
    names = chosen_drafters(loaded, manifest.drafter_names, settings.drafters)
    drafters = [info for info in manifest.drafters if info.name in names]
    places = parse_models(models, drafters)
    check_exports(engines, drafters, places)
    with progress_bars() as progress:
        findings = search(loaded, settings, store=options["store"], progress=progress)
    max_num_seqs = loaded.engine.max_num_seqs
    exports = tuple(export(findings, engine, drafters, places, max_num_seqs) for engine in dict.fromkeys(engines))
    findings = dataclasses.replace(findings, exports=exports)
    path = write_findings(findings, loaded, out, figure_files(findings))
    say(_table(findings))
    for line in _lines(findings):
        click.echo(line)
    click.echo(f"{path}")


def _table(findings: TuneFindings) -> Any:
    """The best, what cannot be told apart from it, and what it is compared with."""
    from rich.markup import escape
    from rich.table import Table

    goal = findings.goal
    shown = Table(
        title=f"{goal.objective} in the search [simulated; {findings.best.replications} seeds, which chose the best]",
        title_justify="left",
    )
    for column, justify in (("", "left"), ("candidate", "left"), (goal.unit, "right"), ("behind the best", "right")):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = [("best", findings.best), *(("as good", one) for one in findings.runners_up)]
    seen = {one.name for _, one in rows}
    others = (("best fixed length", findings.best_fixed), ("no speculation", findings.baseline))
    rows += [(label, one) for label, one in others if one.name not in seen]
    for label, one in rows:
        gap = one.behind
        text = "" if one.name == findings.best.name or gap.value is None else f"{100 * gap.value:+.1f}%"
        if text and gap.low is not None and gap.high is not None:
            text += f" ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
        shown.add_row(label, escape(one.name), escape(one.value.text), text)
    return shown


def _judged(findings: TuneFindings) -> str:
    """The result: how the winner does on runs that did not choose it."""
    judged = findings.judged
    text = f"judged by {judged.how}: {judged.best.text} {judged.unit}"
    if findings.best.name == findings.baseline.name:
        return f"{text}; no speculation is the best found"
    word = "better than" if judged.pays else "not shown to be better than"
    return f"{text}, {judged.over_baseline.text} times as good as no speculation ({judged.baseline.text}): {word} it"


def _lines(findings: TuneFindings) -> list[str]:
    """What else there is to know: the oracle, exports, cuts and notes."""
    from reports.page.document import evidence_line

    lines = [_judged(findings)]
    lines += [] if findings.evidence is None else [f"stands on: {evidence_line([('', findings.evidence)])}"]
    lines += [f"searched under {findings.searched}"] if findings.searched else []
    for gap in findings.oracles:
        if gap.reached.value is not None:
            # An oracle of the length alone is no bound for a policy that also chooses the drafter.
            if gap.reached.value <= 1:
                lines.append(f"{gap.name}: the best reaches {100 * gap.reached.value:.0f}% of it")
            else:
                lines.append(f"{gap.name}: no bound for the best, which chooses more than it does")
    for one in findings.exports:
        lines.append(f"{one.engine}: {' '.join(one.arguments) or one.notes[0]}")
        lines += [f"  note: {note}" for note in one.notes if one.arguments]
    plan = findings.plan
    if plan.chosen_by == "clock":
        seeds = plan.rungs[-1].replications
        short = any("shortened" in why for why in plan.changed.values())
        again = "" if plan.cuts or short else f"; --replications {seeds} repeats it on any machine"
        lines.append(f"plan: {seeds} seeds, chosen by a first timing{again}")
        lines += [f"  {key} = {why}" for key, why in plan.changed.items() if "shortened" in why]
    lines += [f"stopped by the time budget: {cut}" for cut in plan.cuts]
    return lines + [f"note: {note}" for note in findings.notes]
