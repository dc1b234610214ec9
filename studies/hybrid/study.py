"""Every question about hybrid drafts and learned lengths that the public and the bundled traces can answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from calibration.common.progress import StageProgress
from calibration.traces import TraceSet, bundled
from studies.hybrid.confidence import confidence_cell
from studies.hybrid.evaluate import evaluate_hybrid, public_traces
from studies.hybrid.findings import Cell, HybridFindings, TargetResult
from studies.hybrid.gap import Question, judged

STEPS = (3, 7)
"""Draft steps that the published price of an EAGLE draft is spread over, where it is charged by the step."""
STEP_BATCHES = (1, 32)
OWN = (
    ("smollm2-135m-cpu-greedy", "exit-28"),
    ("smollm2-135m-cpu-greedy", "skip-13-17"),
    ("smollm2-135m-cpu-sampled", "exit-28"),
    ("smollm2-135m-cpu-distilled", "size-20"),
)
"""Bundled TraceSets and drafters whose confidence is read."""


@dataclass(frozen=True)
class PolicyStudy:
    """Hybrid drafts on public traces, priced by the round (as published) and by the step; learned lengths on ours."""

    per_round: HybridFindings
    per_step: HybridFindings
    lengths: tuple[Cell, ...]
    length_targets: tuple[TargetResult, ...]


def study_policies(data: Path, progress: StageProgress | None = None) -> PolicyStudy:
    """Evaluate everything, with the folder `data` of public measurements: about a quarter of an hour."""
    traces = public_traces(data)
    per_round = evaluate_hybrid(traces, progress=progress)
    per_step = evaluate_hybrid(traces, batches=STEP_BATCHES, steps=STEPS, progress=progress)
    return PolicyStudy(per_round, per_step, *study_lengths(progress=progress))


def study_lengths(
    own: Iterable[tuple[str, str]] = OWN, batches: Iterable[int] = STEP_BATCHES, progress: StageProgress | None = None
) -> tuple[tuple[Cell, ...], tuple[TargetResult, ...]]:
    """Evaluate the policies that read confidence, on bundled traces."""
    work = [(name, drafter, batch) for name, drafter in own for batch in batches]
    read: dict[str, TraceSet] = {}
    cells: list[Cell] = []
    questions: list[Question] = []
    for done, (name, drafter, batch) in enumerate(work):
        if progress:
            progress(f"{name}, {drafter}, batch {batch}", done, len(work))
        traces = read.setdefault(name, bundled(name))
        cell, asked = confidence_cell(name, traces, drafter, batch)
        cells.append(cell)
        questions += asked
    return tuple(cells), judged(questions)
