"""More drawn TraceSets, for tests of the analysis: clustered requests, given runs, sampled acceptance, timings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from builders import manifest, run_lengths
from numpy.random import Generator

from calibration.traces import DrafterInfo, Manifest, TraceSet, make_table


def sequences_table(outputs: Sequence[int], domains: Sequence[str]) -> object:
    """Sequences named s0, s1, ... of the given output lengths and domains."""
    return make_table(
        "sequences",
        {
            "sequence_id": [f"s{i}" for i in range(len(outputs))],
            "domain": list(domains),
            "prompt_tokens": [10] * len(outputs),
            "output_tokens": list(outputs),
            "finish_reason": ["length"] * len(outputs),
        },
    )


def given_runs(
    runs: Sequence[Sequence[int]],
    *,
    proposals: Sequence[Sequence[int | None]] | None = None,
    domains: Sequence[str] | None = None,
    cap: int | None = None,
) -> TraceSet:
    """A greedy TraceSet of one drafter with these run lengths, one list a sequence."""
    rows = [(f"s{i}", t, n) for i, row in enumerate(runs) for t, n in enumerate(row)]
    columns: dict[str, object] = {
        "sequence_id": [r[0] for r in rows],
        "drafter": ["drafter"] * len(rows),
        "position": [r[1] for r in rows],
        "run_length": [r[2] for r in rows],
    }
    if proposals is not None:
        columns["proposal_length"] = [p for row in proposals for p in row]
    return TraceSet.build(
        manifest(max_draft_tokens=cap),
        {
            "sequences": sequences_table([len(row) for row in runs], domains or ["chat"] * len(runs)),
            "positions": make_table("positions", columns),
        },
    )


def sampled(probabilities: Sequence[Sequence[float]]) -> TraceSet:
    """A sampled TraceSet of one model drafter with these acceptance probabilities, one list a sequence."""
    rows = [(f"s{i}", t, a) for i, row in enumerate(probabilities) for t, a in enumerate(row)]
    return TraceSet.build(
        manifest(mode="sampled"),
        {
            "sequences": sequences_table([len(row) for row in probabilities], ["chat"] * len(probabilities)),
            "positions": make_table(
                "positions",
                {
                    "sequence_id": [r[0] for r in rows],
                    "drafter": ["drafter"] * len(rows),
                    "position": [r[1] for r in rows],
                    "accept_probability": [r[2] for r in rows],
                    "overlap": [r[2] for r in rows],
                },
            ),
        },
    )


def clustered(
    rng: Generator, *, sequences: int = 24, tokens: int = 80, drafters: Sequence[str] = ("slow", "lookup")
) -> TraceSet:
    """A greedy TraceSet in three domains whose requests differ in acceptance; the verifier and drafters are timed.

    A verify step of the timings takes 10 ms + 1 ms per token in the batch, a draft step of ``slow`` 8 ms, one of
    ``lookup`` 0.1 ms, so that only the latter can pay.
    """
    rows: dict[str, list[object]] = {k: [] for k in ("sequence_id", "drafter", "position", "run_length")}
    accept: list[float] = []
    for name in drafters:
        for i in range(sequences):
            match = rng.random(tokens) < rng.beta(4, 3)
            rows["sequence_id"] += [f"s{i}"] * tokens
            rows["drafter"] += [name] * tokens
            rows["position"] += list(range(tokens))
            rows["run_length"] += run_lengths(match).tolist()
            accept += match.astype(float).tolist()
    return TraceSet.build(
        described(drafters),
        {
            "sequences": sequences_table([tokens] * sequences, [f"domain-{i % 3}" for i in range(sequences)]),
            "positions": make_table("positions", {**rows, "accept_probability": accept}),
            "timings": _timings(drafters),
        },
    )


def partly(traces: TraceSet, drafter: str, requests: Sequence[str]) -> TraceSet:
    """The same TraceSet with `drafter` recorded on `requests` alone."""
    rows = traces.positions.to_pylist()
    kept = [row for row in rows if row["drafter"] != drafter or row["sequence_id"] in requests]
    names = ("sequence_id", "drafter", "position", "run_length", "accept_probability")
    positions = make_table("positions", {name: [row[name] for row in kept] for name in names})
    tables = {"sequences": traces.sequences, "positions": positions, "timings": traces.timings}
    return TraceSet.build(traces.manifest, tables)


def described(drafters: Sequence[str]) -> Manifest:
    """A manifest with the sizes of its models filled in."""
    plain = manifest(drafters=tuple(drafters))
    return plain.model_copy(
        update={
            "verifier": plain.verifier.model_copy(update={"parameters": 1_000_000, "layers": 10}),
            "drafters": tuple(
                DrafterInfo(name=name, paradigm="synthetic", deterministic=False, parameters=500_000, layers=5)
                for name in drafters
            ),
        }
    )


def _timings(drafters: Sequence[str]) -> object:
    steps = [
        ("verifier", "verify", batch, new, context, 0.010 + 0.001 * batch * new)
        for batch in (1, 2, 4)
        for new in (1, 2, 3, 5, 9)
        for context in (16, 128)
    ]
    steps += [("verifier", "prefill", batch, 16, 0, 0.020 * batch) for batch in (1, 2, 4)]
    for name in drafters:
        seconds = 0.0001 if name == "lookup" else 0.008
        steps += [(name, "draft", batch, 1, context, seconds) for batch in (1, 2, 4) for context in (16, 128)]
    model, operation, batch, new, context, seconds_column = zip(*steps, strict=True)
    return make_table(
        "timings",
        {
            "model": list(model),
            "operation": list(operation),
            "batch": list(batch),
            "new_tokens": list(new),
            "context_tokens": list(context),
            "repeat": [0] * len(steps),
            "seconds": list(seconds_column),
        },
    )


def played(runs: Sequence[int], k: int, proposals: Sequence[int | None] | None = None) -> list[dict[str, int]]:
    """Play one sequence round by round in plain Python: the slow and obvious replay to check the fast one against."""
    rounds, t, end = [], 1, len(runs)
    while t < end:
        offered = None if proposals is None else proposals[t]
        drafted = k if offered is None else min(k, offered)
        accepted = min(runs[t], drafted)
        rounds.append({"t": t, "left": end - t, "drafted": drafted, "accepted": accepted})
        t += accepted + 1
    return rounds


def drawn_runs(rng: Generator, tokens: int, longest: int = 6) -> list[int]:
    """Run lengths as a drafter with a state of its own gives them: neighbours need not agree with any bits."""
    return [int(min(rng.integers(0, longest + 1), tokens - t)) for t in range(tokens)]


def bits(match: Sequence[bool]) -> list[int]:
    """Run lengths of match bits."""
    return [int(n) for n in run_lengths(np.asarray(match))]
