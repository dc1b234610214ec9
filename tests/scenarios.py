"""TraceSets from explicit acceptance and scenarios from a few words, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from builders import manifest

from calibration.traces import TraceSet, make_table
from simulator import Scenario

LINEAR = {"kind": "linear", "base_s": 0.02, "per_token_s": 0.001, "per_context_token_s": 0.00001}
DRAFT = {"kind": "linear", "base_s": 0.003, "per_token_s": 0.0002, "per_context_token_s": 0.000002}


def traces_of(
    runs: Sequence[Sequence[int]],
    *,
    prompts: Sequence[int] | None = None,
    proposals: Sequence[Sequence[int]] | None = None,
    probabilities: Sequence[Sequence[float]] | None = None,
    domains: Sequence[str] = ("chat",),
    first: int = 0,
    timings: pa.Table | None = None,
    **settings: Any,
) -> TraceSet:
    """A TraceSet with one sequence for each list of run lengths (one per output position, from `first` on).

    With `probabilities` the decoding is sampled and run lengths are missing (`runs` then only gives lengths).
    """
    lengths = [len(run) for run in runs]
    ids = [f"request-{i}" for i in range(len(runs))]
    sampled = probabilities is not None
    rows: dict[str, list[Any]] = {"sequence_id": [], "drafter": [], "position": []}
    for name, length in zip(ids, lengths, strict=True):
        rows["sequence_id"] += [name] * (length - first)
        rows["drafter"] += ["drafter"] * (length - first)
        rows["position"] += range(first, length)
    if probabilities is None:
        rows["run_length"] = [n for run in runs for n in run[first:]]
    else:
        rows["accept_probability"] = [a for row in probabilities for a in row[first:]]
    if proposals is not None:
        rows["proposal_length"] = [n for row in proposals for n in row[first:]]
    sequences = {
        "sequence_id": ids,
        "domain": [domains[i % len(domains)] for i in range(len(ids))],
        "prompt_tokens": list(prompts) if prompts is not None else [7 + i for i in range(len(ids))],
        "output_tokens": lengths,
        "finish_reason": ["length"] * len(ids),
    }
    tables = {"sequences": make_table("sequences", sequences), "positions": make_table("positions", rows)}
    if timings is not None:
        tables["timings"] = timings
    return TraceSet.build(manifest(mode="sampled" if sampled else "greedy", **settings), tables)


def random_runs(rng: np.random.Generator, length: int, *, alpha: float = 0.6, own_state: bool = False) -> list[int]:
    """Run lengths of one sequence: from match bits, or at random as a drafter with a state of its own gives them."""
    if own_state:
        return [int(min(rng.geometric(1 - alpha) - 1, length - t)) for t in range(length)]
    match = rng.random(length) < alpha
    return [next((j for j in range(length - t) if not match[t + j]), length - t) for t in range(length)]


def timing_table(rows: Sequence[tuple[str, str, int, int, int, float]], repeats: int = 1) -> pa.Table:
    """A table of timings from (model, operation, batch, new tokens, context, seconds)."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("model", "operation", "batch", "new_tokens", "context_tokens", "repeat", "seconds")
    }
    for model, operation, batch, new, context, seconds in rows:
        for repeat in range(repeats):
            values = (model, operation, batch, new, context, repeat, seconds)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    return make_table("timings", columns)


def scenario(
    draft_tokens: int | str | None = None,
    *,
    batch: int = 4,
    workload: Mapping[str, Any] | None = None,
    costs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Scenario:
    """A scenario: no speculation (None), a fixed draft length, or the oracle (``"oracle"``).

    A `workload` without kind is added to a closed loop of `batch` clients.
    """
    stopping: dict[str, Any] = {"policy": "none"}
    if isinstance(draft_tokens, int):
        stopping = {"policy": "fixed", "draft_tokens": draft_tokens}
    elif draft_tokens is not None:
        stopping = {"policy": draft_tokens}
    closed = {"kind": "closed", "concurrency": batch, "stagger_s": 0.0, **(workload or {})}
    data = {
        "drafter": {"name": "drafter"},
        "stopping": stopping,
        "engine": {"max_num_seqs": batch},
        "workload": workload if workload and "kind" in workload else closed,
        "costs": costs if costs is not None else {"overhead_s": 0.002, "verifier": LINEAR, "drafter": DRAFT},
        **settings,
    }
    return Scenario.model_validate(data)
