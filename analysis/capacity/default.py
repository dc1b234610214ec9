"""The scenario that a capacity plan takes where a study of a TraceSet is all there is."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow.compute as pc

from analysis.speedup.findings import Findings
from calibration.traces import TraceSet
from simulator.scenario.scenario import Scenario


def study_scenarios(findings: Findings, traces: TraceSet) -> tuple[Scenario, ...]:
    """Give the policies that a study recommends: its headline, and the best length for each batch size.

    The headline's drafter at its draft length; then the same drafter by batch, as vLLM's schedule has it, where the
    best lengths differ and not all are 0. The engine has as many slots as the largest batch that was timed (where
    none was: studied). Requests arrive in Poisson manner, shuffled.
    """
    head = findings.answer.headline
    policies: list[tuple[str, dict[str, Any]]] = [
        (
            f"{head.drafter}, draft {head.speculative_tokens}",
            {"policy": "fixed", "draft_tokens": head.speculative_tokens},
        )
    ]
    table = _schedule(findings, head.drafter)
    lengths = {entry[2] for entry in table}
    if lengths not in ({0}, {head.speculative_tokens}):  # else it is no speculation, or the fixed length again
        policies.append((f"{head.drafter}, by batch", {"policy": "by_batch", "table": table}))
    return tuple(_scenario(findings, traces, name, stopping) for name, stopping in policies)


def _schedule(findings: Findings, drafter: str) -> list[list[int]]:
    """Give [first, last, K]: the best length of a studied batch size holds until the next one; 0 does not draft."""
    rows = sorted((r for r in findings.best if r.drafter == drafter and r.domain is None), key=lambda r: r.batch)
    ends = [after.batch - 1 for _, after in itertools.pairwise(rows)] + [rows[-1].batch]
    return [[1 if i == 0 else row.batch, ends[i], row.draft_tokens] for i, row in enumerate(rows)]


def _scenario(findings: Findings, traces: TraceSet, name: str, stopping: dict[str, Any]) -> Scenario:
    data: dict[str, Any] = {
        "name": name,
        "seed": findings.settings.seed,
        "traces": {"path": "."},
        "drafter": {"name": findings.answer.headline.drafter},
        "stopping": stopping,
        "engine": {"max_num_seqs": _slots(findings, traces)},
        "workload": {"kind": "poisson", "rate_rps": 1.0, "order": "shuffled"},
        "costs": findings.settings.costs or {},
    }
    return Scenario.model_validate(data)


def _slots(findings: Findings, traces: TraceSet) -> int:
    timed = traces.timings.filter(pc.equal(traces.timings["operation"], "verify"))
    return int(pc.max(timed["batch"]).as_py()) if timed.num_rows else findings.settings.batches[-1]
