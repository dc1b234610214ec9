"""TraceSets made to order for tests: their numbers are drawn, not measured, and their manifests say so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator

from calibration.traces import (
    TABLES,
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
        import_grain="position",
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


def felt_traces(
    rng: Generator,
    *,
    sequences: int = 6,
    output_tokens: int = 60,
    stride: int = 4,
    steps: int = 8,
    ranks: tuple[float, ...] = (0.6, 0.2, 0.1),
    own_state: bool = False,
) -> tuple[TraceSet, dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]]:
    """A greedy TraceSet with ranks, confidences, entropies and rollouts, and the drafter's path from every start.

    The text's token has rank r with probability ``ranks[r]``, further behind with what is left; rank 0 is a match.
    The paths (confidence and entropy of steps 1 .. `steps`, by sequence and start) are those of a drafter that sees
    tokens alone: all drafts that go wrong at one token feel the same behind it. Rollouts hold every `stride`-th of
    them. With `own_state` the run lengths, and what is felt behind them, are drawn anew at every start.
    """
    rows: dict[str, list[object]] = {}
    rollouts: dict[str, list[object]] = {}
    paths: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    names = [f"request-{i}" for i in range(sequences)]
    total = output_tokens

    def put(table: dict[str, list[object]], **columns: object) -> None:
        for key, value in columns.items():
            table.setdefault(key, []).append(value)

    for name in names:
        rank = rng.choice(len(ranks) + 1, p=[*ranks, 1 - sum(ranks)], size=total)
        runs = run_lengths(rank == 0)
        if own_state:
            runs = np.array([min(rng.geometric(0.4) - 1, total - t) for t in range(total)])
        felt = (
            np.where(rank == 0, rng.uniform(0.5, 1, total), rng.uniform(0.05, 0.7, total)),
            rng.uniform(0, 3, total),
        )
        behind = {m: (rng.uniform(0, 1, steps), rng.uniform(0, 4, steps)) for m in range(total + 1)}
        for t in range(total):
            put(rows, sequence_id=name, drafter="drafter", position=t, run_length=int(runs[t]))
            put(rows, accept_probability=float(runs[t] > 0), emitted_rank=int(rank[t]))
            put(rows, drafter_confidence=felt[0][t], drafter_entropy=felt[1][t])
            known = min(int(runs[t]) + 1, total - t)
            tail = (rng.uniform(0, 1, steps), rng.uniform(0, 4, steps)) if own_state else behind[t + int(runs[t])]
            path = [np.concatenate([felt[i][t : t + known], tail[i]])[:steps] for i in (0, 1)]
            paths[name, t] = (path[0], path[1])
            for j in range(steps if t % stride == 0 else 0):
                put(rollouts, sequence_id=name, drafter="drafter", position=t, step=j + 1)
                put(rollouts, drafter_confidence=path[0][j], drafter_entropy=path[1][j])
    served = {
        "sequence_id": names,
        "domain": ["chat"] * sequences,
        "prompt_tokens": [9] * sequences,
        "output_tokens": [total] * sequences,
        "finish_reason": ["length"] * sequences,
    }
    tables = {"sequences": make_table("sequences", served), "positions": make_table("positions", rows)}
    if rollouts:
        tables["rollouts"] = make_table("rollouts", rollouts)
    return TraceSet.build(manifest(), tables), paths


def restate(folder: Path, marker: str = "manifest.json") -> None:
    """State the sha256 of the tables in `folder` as they are now and leave all else, as a forger would."""
    told = json.loads((folder / marker).read_text())
    for name, info in told["tables"].items():
        info["sha256"] = hashlib.sha256((folder / f"{name}.parquet").read_bytes()).hexdigest()
    (folder / marker).write_text(json.dumps(told))


def damages(data: bytes, rng: np.random.Generator, number: int) -> Iterator[bytes]:
    """So many damaged copies: a flipped bit, a lost end, zeros over a stretch, another byte, bytes put in."""
    while number:
        place = int(rng.integers(len(data)))
        length = int(rng.integers(1, 65))
        match number % 5:
            case 0:
                found = data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]
            case 1:
                found = data[:place]
            case 2:
                found = data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
            case 3:
                found = data[:place] + rng.bytes(1) + data[place + 1 :]
            case _:
                found = data[:place] + rng.bytes(length) + data[place:]
        if found != data:
            number -= 1
            yield found


def text_traces(sequences: int = 3) -> TraceSet:
    """A drawn set with token ids of prompts, so that they can be sent to a server."""
    drawn = iid_traces(0.5, np.random.default_rng(0), sequences=sequences, output_tokens=6)
    columns = {name: drawn.sequences[name].to_pylist() for name in drawn.sequences.column_names}
    columns["prompt_token_ids"] = [list(range(100, 100 + n)) for n in columns["prompt_tokens"]]
    tables = {name: getattr(drawn, name) for name in TABLES} | {"sequences": make_table("sequences", columns)}
    return TraceSet.build(drawn.manifest, tables)
