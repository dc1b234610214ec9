"""TraceSets made to order for tests: their numbers are drawn, not measured, and their manifests say so."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from calibration.traces import (
    DecodingInfo,
    DeviceInfo,
    DrafterInfo,
    Manifest,
    ModelInfo,
    TraceSet,
    make_table,
)


def manifest(
    *,
    drafters: tuple[str, ...] = ("drafter",),
    mode: str = "greedy",
    deterministic: bool = False,
    max_draft_tokens: int | None = None,
) -> Manifest:
    """A manifest for drawn tables."""
    return Manifest(
        paceline_version="0",
        kind="imported",
        created="2026-01-01T00:00:00+00:00",
        command="tests",
        seed=0,
        verifier=ModelInfo(name="verifier"),
        drafters=tuple(
            DrafterInfo(
                name=name,
                paradigm="synthetic",
                deterministic=deterministic,
                max_draft_tokens=max_draft_tokens,
            )
            for name in drafters
        ),
        decoding=DecodingInfo(mode="greedy") if mode == "greedy" else DecodingInfo(mode="sampled", temperature=1.0),
        device=DeviceInfo(name="none", kind="unknown"),
        import_format="drawn for a test",
    )


def run_lengths(match: np.ndarray) -> np.ndarray:
    """Turn match bits into run lengths: how many ones follow from each position on."""
    runs = np.zeros(len(match), dtype=np.int32)
    length = 0
    for t in range(len(match) - 1, -1, -1):
        length = length + 1 if match[t] else 0
        runs[t] = length
    return runs


def iid_traces(
    alpha: float,
    rng: Generator,
    *,
    sequences: int = 20,
    output_tokens: int = 200,
    prompt_tokens: int = 50,
    domains: tuple[str, ...] = ("chat",),
    drafters: tuple[str, ...] = ("drafter",),
) -> TraceSet:
    """A greedy TraceSet whose drafters match each token independently with probability `alpha`."""
    names = [f"request-{i}" for i in range(sequences)]
    rows: dict[str, list[object]] = {k: [] for k in ("sequence_id", "drafter", "position", "run_length")}
    accept: list[float] = []
    for name in names:
        for drafter in drafters:
            match = rng.random(output_tokens) < alpha
            rows["sequence_id"] += [name] * output_tokens
            rows["drafter"] += [drafter] * output_tokens
            rows["position"] += list(range(output_tokens))
            rows["run_length"] += run_lengths(match).tolist()
            accept += match.astype(float).tolist()
    return TraceSet.build(
        manifest(drafters=drafters),
        {
            "sequences": make_table(
                "sequences",
                {
                    "sequence_id": names,
                    "domain": [domains[i % len(domains)] for i in range(sequences)],
                    "prompt_tokens": [prompt_tokens] * sequences,
                    "output_tokens": [output_tokens] * sequences,
                    "finish_reason": ["length"] * sequences,
                },
            ),
            "positions": make_table("positions", {**rows, "accept_probability": accept}),
        },
    )
