"""The study of one TraceSet: acceptance by replay, speed-up by simulation, and the answer drawn from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap, describe, number
from analysis.common.rounds import recording
from analysis.common.threads import one_thread
from analysis.speedup.acceptance import AcceptanceRow, DepthPoint, acceptance_rows, depth_points, replay_all
from analysis.speedup.costfit import CostDraws, CostFit, cost_fits
from analysis.speedup.findings import (
    Answer,
    CostSource,
    Findings,
    ModelFact,
    Provenance,
    RunShare,
    Sizes,
    StudySettings,
)
from analysis.speedup.grid import Cell, CellRun, baselines, cell_scenario, grid_cells, requests_of, run_grid
from analysis.speedup.speedup import BestLength, Crossover, best_length, compare_lengths, crossovers, schedules
from calibration.common.errors import CostError, ReplayError
from calibration.common.progress import Progress
from calibration.proposers.lookup import lookup_runs
from calibration.traces import DrafterInfo, Manifest, ModelInfo, TraceSet
from simulator import Scenario
from simulator.results.evidence import served
from simulator.running.run import evidence_of

REFERENCE_DRAFT_TOKENS = 4
"""Draft length that tables quote where one must be chosen, or the longest shorter one on the grid."""


@one_thread
def study(
    traces: TraceSet,
    *,
    settings: StudySettings | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Findings:
    """Study the acceptance and the simulated speed-up of every drafter of `traces`.

    The result does not depend on `workers` (processes; 1 simulates in this one). `progress` is called with (steps
    done, steps in all). Raises `CostError` when nothing prices a step: no timings and no `settings.costs`.
    """
    chosen = settings or StudySettings()
    source = _cost_source(traces, chosen)
    reference = _reference(traces.manifest, chosen.draft_tokens)
    bootstrap = ClusterBootstrap(
        traces.sequences["domain"].to_pylist(), np.random.default_rng(chosen.seed), draws=chosen.draws
    )
    domains: tuple[str | None, ...] = (None, *bootstrap.domains)
    acceptance, depth = _acceptance(traces, chosen, bootstrap, domains)
    grid = grid_cells(traces, chosen.draft_tokens, chosen.batches)
    runs = run_grid(traces, grid, costs=chosen.costs, seed=chosen.seed, workers=workers, progress=progress)
    baseline = baselines(traces)
    fits = cost_fits(traces) if source == "fitted" else ()
    # A stream of its own: draws of costs must not follow those of requests.
    costs = CostDraws(traces, np.random.default_rng([chosen.seed, 1]), draws=chosen.draws) if fits else None
    compared = compare_lengths(runs, baseline, bootstrap, domains, costs)
    best = [best_length(lengths) for lengths in compared]
    cells = tuple(cell for lengths in compared for cell in lengths.cells)
    crossing = crossovers(best)
    return Findings(
        settings=chosen,
        provenance=_provenance(
            traces, [cell_scenario(cell, chosen.costs or {}, chosen.seed) for cell in _one_each(grid)]
        ),
        sizes=_sizes(traces),
        method=describe(chosen.draws),
        reference_draft_tokens=reference,
        acceptance=acceptance,
        depth=depth,
        speedup=cells,
        best=tuple(best),
        crossovers=tuple(crossing),
        schedules=tuple(schedules(best, cells)),
        runs=tuple(_share(run, fits) for run in runs),
        cost_source=source,
        cost_fits=fits,
        warnings=tuple(sorted({text for run in runs for text in run.warnings})),
        answer=_answer(best, crossing),
    )


def _cost_source(traces: TraceSet, settings: StudySettings) -> CostSource:
    """Where prices come from: the settings, else the timings, else the constants of an import."""
    if settings.costs is not None:
        return "assumed"
    if traces.timings.num_rows:
        return "fitted"
    if traces.manifest.costs is not None:
        return "stated"
    raise CostError(
        "timings.parquet: holds no timings and manifest.json states no costs, so nothing tells what a step costs; "
        "give the costs table of a scenario (verifier and drafter, kind = 'linear')"
    )


def _acceptance(
    traces: TraceSet, settings: StudySettings, bootstrap: ClusterBootstrap, domains: Sequence[str | None]
) -> tuple[tuple[AcceptanceRow, ...], tuple[DepthPoint, ...]]:
    """Replay every drafter at every draft length; depth curves come from the longest rounds."""
    rows: list[AcceptanceRow] = []
    points: list[DepthPoint] = []
    for name in traces.manifest.drafter_names:
        recorded = recording(traces, name)
        replays = replay_all(recorded, settings.draft_tokens)
        for rounds in replays.values():
            rows += acceptance_rows(recorded, rounds, bootstrap, domains)
        points += depth_points(recorded, replays[max(replays)], bootstrap, domains)
    return tuple(rows), tuple(points)


def _reference(manifest: Manifest, draft_tokens: Sequence[int]) -> int:
    """The draft length on the grid nearest below `REFERENCE_DRAFT_TOKENS` that every drafter can replay."""
    caps = [info.max_draft_tokens for info in manifest.drafters if info.max_draft_tokens is not None]
    limit = min([REFERENCE_DRAFT_TOKENS, *caps])
    allowed = [k for k in draft_tokens if k <= limit]
    for info in manifest.drafters:
        if info.max_draft_tokens is not None and info.max_draft_tokens < draft_tokens[0]:
            raise ReplayError(
                f"drafter '{info.name}': recorded for drafts of at most {info.max_draft_tokens} tokens; "
                f"the study needs a draft length that short, got {list(draft_tokens)}"
            )
    return max(allowed, default=draft_tokens[0])


def _answer(best: Sequence[BestLength], crossing: Sequence[Crossover]) -> Answer:
    """Pick the headline at the smallest batch size, all domains: a drafter that pays before one that does not."""
    smallest = min(row.batch for row in best)
    here = [row for row in best if row.batch == smallest and row.domain is None]
    headline = max(here, key=lambda row: (row.pays, row.speedup.value or 0.0))
    return Answer(
        headline=headline,
        crossover=next(c for c in crossing if c.drafter == headline.drafter and c.domain is None),
        paying=tuple(dict.fromkeys(row.drafter for row in best if row.domain is None and row.pays)),
        paying_domains=tuple(
            (row.drafter, row.domain) for row in best if row.domain is not None and row.pays and row.batch == smallest
        ),
    )


def _one_each(cells: Sequence[Cell]) -> list[Cell]:
    """Give one speculating cell of every drafter: prices and recordings are the same at other lengths and batches."""
    return list({cell.drafter: cell for cell in cells if cell.draft_tokens}.values())


def _provenance(traces: TraceSet, scenarios: Sequence[Scenario]) -> Provenance:
    manifest = traces.manifest
    decoding = manifest.decoding
    named = served(scenarios[0], manifest)
    how = "greedy"
    if decoding.mode == "sampled":
        how = f"sampled, temperature {decoding.temperature:g}, top-p {decoding.top_p:g}"
    if decoding.max_new_tokens is not None:
        how += f", at most {decoding.max_new_tokens} new tokens"
    prompts: dict[str, int] = {}
    for source in manifest.prompts:
        prompts[source.name] = prompts.get(source.name, 0) + source.prompts
    return Provenance(
        kind=manifest.kind,
        created=manifest.created,
        command=manifest.command,
        paceline_version=manifest.paceline_version,
        seed=manifest.seed,
        decoding=how,
        models=(
            replace(_model(manifest.verifier), name=named["verifier"]),
            *(_model(info) for info in manifest.drafters),
        ),
        device=named["device"],
        device_kind=manifest.device.kind,
        threads=manifest.device.threads,
        memory_bytes=manifest.device.memory_bytes,
        software=dict(manifest.software),
        prompts=prompts,
        import_format=manifest.import_format,
        unknown=manifest.unknown,
        notes=manifest.notes,
        evidence=evidence_of(scenarios, traces),
    )


def _model(info: ModelInfo) -> ModelFact:
    return ModelFact(
        name=info.name,
        role=info.paradigm if isinstance(info, DrafterInfo) else "verifier",
        parameters=info.parameters,
        parameters_non_embedding=info.parameters_non_embedding,
        layers=info.layers,
        dtype=info.dtype,
    )


def _sizes(traces: TraceSet) -> Sizes:
    requests: dict[str, int] = {}
    tokens: dict[str, int] = {}
    columns = (traces.sequences[name].to_pylist() for name in ("domain", "output_tokens"))
    for domain, count in sorted(zip(*columns, strict=True)):
        requests[domain] = requests.get(domain, 0) + 1
        tokens[domain] = tokens.get(domain, 0) + count
    recorded = {name: len(requests_of(traces, name)) for name in traces.manifest.drafter_names}
    timed = traces.timings.num_rows
    return Sizes(requests, recorded, tokens, traces.positions.num_rows, timed, _repetition(traces))


def _repetition(traces: TraceSet) -> float | None:
    """Share of output tokens that follow the same 16 tokens as once before: the text runs in circles."""
    repeated = total = 0
    for ids in traces.sequences["output_token_ids"].to_pylist():
        if ids is None:
            return None
        runs, _ = lookup_runs([], ids, ngram_max=16, ngram_min=16, max_draft_tokens=1)
        repeated, total = repeated + sum(runs), total + len(ids)
    return number(repeated / total)


def _share(run: CellRun, fits: Sequence[CostFit]) -> RunShare:
    return RunShare(
        run.drafter,
        run.draft_tokens,
        run.batch,
        tokens_per_second=number(run.throughput) or 0.0,
        prefill_s=number(run.prefill_s) or 0.0,
        draft_s=number(run.draft_s) or 0.0,
        verify_s=number(run.verify_s) or 0.0,
        overhead_s=number(run.overhead_s) or 0.0,
        extrapolated_share=number(run.extrapolated_share) or 0.0,
        cost_error=_cost_error(run, fits),
    )


def _cost_error(run: CellRun, fits: Sequence[CostFit]) -> float | None:
    """Held-out errors of the costs of a run, weighted by their shares of its time."""
    seconds = {"prefill": run.prefill_s, "verify": run.verify_s, "draft": run.draft_s}
    errors = {f.operation: f.held_out_error for f in fits if f.operation != "draft" or f.model == run.drafter}
    total = 0.0
    for operation, spent in seconds.items():
        error = errors.get(operation)
        if spent > 0 and error is None:
            return None
        total += spent * (error or 0.0)
    return number(total / (sum(seconds.values()) + run.overhead_s))
