"""Stopping policies that read the drafter's confidence, against the best fixed length and the length oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap
from analysis.routing.served import PUBLISHED
from calibration.common.arrays import Floats
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants, LinearCost
from studies.hybrid.closed import as_one
from studies.hybrid.findings import Cell, PolicyResult
from studies.hybrid.gap import Question, alike, gap_statistic, margins
from studies.public.runs import serve

FIXED = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12)
LONGEST = 64
"""The most that a policy drafts: greedy text that runs in circles is accepted for long."""
WANTED = 0.40
"""Share of the gap from the best fixed length to the length oracle that a policy is to close."""
LEARNED = "learned"
TARGET = "share of the length gap"
POLICIES: dict[str, dict[str, Any]] = {
    LEARNED: {"policy": "learned", "max_draft_tokens": LONGEST},
    "specdec++ 0.3": {"policy": "specdec++", "threshold": 0.3, "min_draft_tokens": 1, "max_draft_tokens": LONGEST},
    "specdec++ 0.7": {"policy": "specdec++", "threshold": 0.7, "min_draft_tokens": 1, "max_draft_tokens": LONGEST},
    "confidence 0.4": {"policy": "confidence", "threshold": 0.4, "max_draft_tokens": LONGEST},
    "confidence 0.8": {"policy": "confidence", "threshold": 0.8, "max_draft_tokens": LONGEST},
    "adaedl": {"policy": "adaedl", "max_draft_tokens": LONGEST},
    "goodput": {"policy": "goodput", "max_draft_tokens": LONGEST},
}
ORACLE = {"policy": "oracle_cost"}


def step_prices(drafter: str, step_s: float = 2.135e-3 / 7) -> CostConstants:
    """Give the published constants of the verifier beside a drafter of `step_s` a lock-step draft step.

    By default the published price of an EAGLE draft over seven steps. On processors that the bundled traces were
    timed on hardly any draft pays, so that there is no gap to close.
    """
    published = PUBLISHED.drafters["eagle"]
    assert isinstance(published, LinearCost)
    step = published.model_copy(update={"base_s": step_s, "charged": "per_step"})
    return PUBLISHED.model_copy(update={"drafters": {drafter: step}})


def confidence_cell(
    name: str,
    traces: TraceSet,
    drafter: str,
    batch: int,
    *,
    prices: CostConstants | None = None,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    fixed: Sequence[int] = FIXED,
    seed: int = 0,
) -> tuple[Cell, list[Question]]:
    """Give one cell: requests of `traces` in closed batches of `batch` copies, drafted for by `drafter`.

    With it the target that `LEARNED` is asked for, where that policy is among `policies`.

    `oracle` is the length that brings this round most tokens per second, known beforehand (`OracleCost`). Policies
    that learn are fitted to other sequences; thresholds stand as they are named. Everything is simulated.
    """
    prices = as_one(prices if prices is not None else step_prices(drafter), batch)
    chosen = dict(policies) if policies is not None else dict(POLICIES)
    lengths = {k: _rates(traces, drafter, _fixed(k), prices, seed) for k in fixed}
    base = lengths[0] if 0 in lengths else _rates(traces, drafter, _fixed(0), prices, seed)
    best = max(lengths, key=lambda k: float(lengths[k].mean()))
    own = [_rates(traces, drafter, stopping, prices, seed) for stopping in (ORACLE, *chosen.values())]
    sums = np.stack([base, lengths[best], *own], axis=1)
    bootstrap = ClusterBootstrap(["all"] * len(base), np.random.default_rng(seed))
    found = bootstrap.estimates(gap_statistic, sums)
    cell = Cell(
        dataset=f"{name}, {drafter}",
        batch=batch,
        pricing="per step",
        requests=len(base),
        tokens=int(np.sum(traces.sequences["output_tokens"].to_numpy())),
        best_drafter=drafter,
        best_tokens=best,
        best=found[0],
        best_alike=alike(bootstrap, [f"{drafter} {k}" for k in lengths], list(lengths.values())),
        oracle=found[1],
        policies=tuple(PolicyResult(label, *found[2 + 3 * i : 5 + 3 * i]) for i, label in enumerate(chosen)),
    )
    asked = []
    for label, rates in zip(chosen, own[1:], strict=True):
        if label == LEARNED:
            beyond = margins(bootstrap, base, rates, own[0], list(lengths.values()), TARGET, WANTED)
            share = cell.policy(label).gap_share
            asked.append(Question(TARGET, cell.dataset, batch, cell.pricing, label, WANTED, share, beyond))
    return cell, asked


def _fixed(tokens: int) -> dict[str, Any]:
    return {"policy": "fixed", "draft_tokens": tokens} if tokens else {"policy": "none"}


def _rates(traces: TraceSet, drafter: str, stopping: Mapping[str, Any], prices: CostConstants, seed: int) -> Floats:
    scenario = {
        "name": f"{stopping['policy']}",
        "seed": seed,
        "drafter": {"name": drafter},
        "stopping": dict(stopping),
        "engine": {"max_num_seqs": 1},
        "workload": {"kind": "closed", "concurrency": 1},
        "costs": {
            "overhead_s": prices.overhead_s,
            "verifier": prices.verifier.model_dump(),
            "drafter": prices.drafters[drafter].model_dump(),
        },
    }
    served = serve(scenario, traces)
    return np.asarray(served.tokens / served.seconds, dtype=np.float64)
