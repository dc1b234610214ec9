"""TraceSets with several drafters, and scenarios that route to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from builders import manifest
from scenarios import DRAFT, LINEAR

from calibration.traces import TraceSet, make_table
from simulator import Scenario

COSTS = {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT}


def several(
    runs: Mapping[str, Sequence[Sequence[int]]],
    *,
    proposals: Mapping[str, Sequence[Sequence[int]]] | None = None,
    probabilities: Mapping[str, Sequence[Sequence[float]]] | None = None,
    domains: Sequence[str] = ("chat",),
    prompts: Sequence[Sequence[int]] | None = None,
    felt: Mapping[str, float | Sequence[float]] | None = None,
) -> TraceSet:
    """A TraceSet of the drafters named in `runs`, with a list of run lengths for each sequence.

    With `probabilities` decoding is sampled (those drafters lack run lengths). `prompts`: token ids. `felt`: each
    drafter's confidence, the same wherever it drafts or one for each sequence, with entropy 1 and rollouts of twelve
    steps at position 1.
    """
    lengths = [len(run) for run in next(iter(runs.values()))]
    ids = [f"request-{i}" for i in range(len(lengths))]
    rows: list[dict[str, Any]] = []
    rollouts: list[dict[str, Any]] = []
    for drafter, sequences in runs.items():
        sure = np.broadcast_to(0.0 if felt is None else felt[drafter], len(ids)).tolist()
        for i, (name, row) in enumerate(zip(ids, sequences, strict=True)):
            for t, n in enumerate(row):
                drawn = probabilities is not None and drafter in probabilities
                cell: dict[str, Any] = {"sequence_id": name, "drafter": drafter, "position": t}
                cell["run_length"] = None if drawn else n
                cell["accept_probability"] = probabilities[drafter][i][t] if drawn and probabilities else float(n > 0)
                cell["proposal_length"] = proposals[drafter][i][t] if proposals and drafter in proposals else None
                if felt is not None:
                    cell |= {"drafter_confidence": sure[i], "drafter_entropy": 1.0}
                rows.append(cell)
            for step in range(1, 13 if felt is not None and len(row) > 1 else 1):
                value = {"drafter_confidence": sure[i], "drafter_entropy": 1.0}
                rollouts.append({"sequence_id": name, "drafter": drafter, "position": 1, "step": step, **value})
    served = {
        "sequence_id": ids,
        "domain": [domains[i % len(domains)] for i in range(len(ids))],
        "prompt_tokens": [7 + i for i in range(len(ids))] if prompts is None else [len(prompt) for prompt in prompts],
        "output_tokens": lengths,
        "finish_reason": ["length"] * len(ids),
        "prompt_token_ids": None if prompts is None else [list(prompt) for prompt in prompts],
    }
    tables = {
        "sequences": make_table("sequences", {k: v for k, v in served.items() if v is not None}),
        "positions": make_table("positions", {key: [row.get(key) for row in rows] for key in rows[0] if rows}),
    }
    if rollouts:
        tables["rollouts"] = make_table("rollouts", {key: [row[key] for row in rollouts] for key in rollouts[0]})
    mode = "sampled" if probabilities is not None else "greedy"
    return TraceSet.build(manifest(drafters=tuple(runs), mode=mode), tables)


def routed(
    rule: Mapping[str, Any] | None,
    draft_tokens: int | str | Mapping[str, Any] | None = 3,
    *,
    drafters: Sequence[str] = ("a", "b"),
    batch: int = 4,
    workload: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Scenario:
    """A scenario with ``[routing] drafter``, or, where `rule` is None, with the one drafter in `drafters`."""
    stopping: dict[str, Any] = {"policy": "none"}
    if isinstance(draft_tokens, int):
        stopping = {"policy": "fixed", "draft_tokens": draft_tokens}
    elif isinstance(draft_tokens, str):
        stopping = {"policy": draft_tokens}
    elif draft_tokens is not None:
        stopping = dict(draft_tokens)
    data: dict[str, Any] = {
        "stopping": stopping,
        "engine": {"max_num_seqs": batch},
        "workload": workload
        if workload and "kind" in workload
        else {"kind": "closed", "concurrency": batch, "stagger_s": 0.0} | dict(workload or {}),
        "costs": COSTS,
        **settings,
    }
    if rule is None:
        data["drafter"] = {"name": drafters[0]}
    else:
        data["routing"] = {"drafter": {"drafters": list(drafters), **rule}, **settings.get("routing", {})}
    return Scenario.model_validate(data)
