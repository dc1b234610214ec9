"""TraceSets of drafters that differ in size alone, with acceptance, step times and thus speed-ups that are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from builders import manifest, run_lengths
from numpy.random import Generator

from calibration.traces import DrafterInfo, Manifest, TraceSet, make_table

VERIFY_S = 0.010
"""Seconds of a verifier step, whatever it verifies."""


def sized_traces(
    rng: Generator,
    rates: Sequence[float],
    draft_s: Sequence[float],
    *,
    shares: Sequence[float] = (0.01, 0.04, 0.16),
    sequences: int = 18,
    tokens: int = 200,
    timed: bool = True,
) -> TraceSet:
    """A greedy TraceSet in two domains: drafter d matches each token with probability ``rates[d]``, independently.

    A draft step takes ``draft_s[d]``, a verifier step `VERIFY_S`, a prompt no time to speak of.
    """
    names = [f"size-{i}" for i in range(len(rates))]
    rows: dict[str, list[object]] = {k: [] for k in ("sequence_id", "drafter", "position", "run_length")}
    accept: list[float] = []
    for name, rate in zip(names, rates, strict=True):
        for i in range(sequences):
            match = rng.random(tokens) < rate
            rows["sequence_id"] += [f"s{i}"] * tokens
            rows["drafter"] += [name] * tokens
            rows["position"] += list(range(tokens))
            rows["run_length"] += run_lengths(match).tolist()
            accept += match.astype(float).tolist()
    served = {
        "sequence_id": [f"s{i}" for i in range(sequences)],
        "domain": [("chat", "code")[i % 2] for i in range(sequences)],
        "prompt_tokens": [10] * sequences,
        "output_tokens": [tokens] * sequences,
        "finish_reason": ["length"] * sequences,
    }
    tables = {
        "sequences": make_table("sequences", served),
        "positions": make_table("positions", {**rows, "accept_probability": accept}),
    }
    if timed:
        tables["timings"] = _timings(names, draft_s)
    return TraceSet.build(sized_manifest(names, shares), tables)


def sized_manifest(names: Sequence[str], shares: Sequence[float]) -> Manifest:
    """A manifest in which each drafter has its share of the verifier's hundred million parameters."""
    plain = manifest(drafters=tuple(names))
    verifier = plain.verifier.model_copy(update={"parameters_non_embedding": 100_000_000, "layers": 10})
    drafters = tuple(
        DrafterInfo(
            name=name,
            paradigm="synthetic",
            deterministic=False,
            parameters_non_embedding=round(share * 1e8),
            layers=1 + i,
        )
        for i, (name, share) in enumerate(zip(names, shares, strict=True))
    )
    return plain.model_copy(update={"verifier": verifier, "drafters": drafters})


def known_speedup(rate: float, draft_s: float, longest: int) -> float:
    """The speed-up at the best draft length, by the constant-rate formula (Leviathan et al. 2023)."""
    tried = [sum(rate**i for i in range(k + 1)) * VERIFY_S / (VERIFY_S + k * draft_s) for k in range(1, longest + 1)]
    return float(max(tried))


def _timings(names: Sequence[str], draft_s: Sequence[float]) -> object:
    batches, contexts = (1, 2, 4), (16, 512)
    steps = [
        ("verifier", "verify", batch, new, context, VERIFY_S)
        for batch in batches
        for new in (1, 3, 9)
        for context in contexts
    ]
    steps += [("verifier", "prefill", batch, 16, 0, 1e-7) for batch in batches]
    for name, seconds in zip(names, draft_s, strict=True):
        steps += [(name, "draft", batch, 1, context, seconds) for batch in batches for context in contexts]
    columns = ("model", "operation", "batch", "new_tokens", "context_tokens", "seconds")
    values = {key: list(column) for key, column in zip(columns, zip(*steps, strict=True), strict=True)}
    return make_table("timings", {**values, "repeat": np.zeros(len(steps), dtype=int).tolist()})
