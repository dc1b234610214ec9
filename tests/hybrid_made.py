"""TraceSets with token ids whose text copies itself here and there, and scenarios that serve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from builders import manifest
from scenarios import LINEAR

from calibration.proposers.lookup import lookup_runs
from calibration.traces import TraceSet, make_table
from simulator import Scenario

MODEL = 2
"""Drafted tokens of the model that are accepted, wherever it drafts."""
LOOKUP = {"ngram_max": 7, "ngram_min": 3, "max_draft_tokens": 20}


def copied_text(rng: np.random.Generator, copying: float, length: int) -> tuple[list[int], list[int]]:
    """A prompt of 60 tokens, and an output of copies of 25 of them (in a share `copying`) among new tokens."""
    prompt = rng.integers(0, 5000, 60).tolist()
    output: list[int] = []
    while len(output) < length:
        start = int(rng.integers(0, 35))
        copied = rng.random() < copying
        output += prompt[start : start + 25] if copied else rng.integers(5000, 10_000, 25).tolist()
    return prompt, output[:length]


def hybrid_traces(
    *,
    sequences: int = 8,
    copying: float = 0.5,
    model: int = MODEL,
    length: int = 150,
    twins: bool = False,
    domains: Sequence[str] = ("chat",),
    other_model: Mapping[int, int] | None = None,
) -> TraceSet:
    """A greedy TraceSet of drafters ``model`` (the same run length everywhere) and ``lookup`` (an n-gram lookup).

    `twins`: the second half of the prompts repeats the first. `other_model`: other run lengths of some sequences.
    """
    half = sequences // 2 if twins else sequences
    texts = [copied_text(np.random.default_rng(100 + i % half), copying, length) for i in range(sequences)]
    rows: dict[str, list[Any]] = {}
    for i, (prompt, output) in enumerate(texts):
        found, proposed = lookup_runs(prompt, output, **LOOKUP)
        accepted = (other_model or {}).get(i, model)
        own = [min(accepted, length - t) for t in range(length)]
        for drafter, runs, limits in (("model", own, [None] * length), ("lookup", found, proposed)):
            for t in range(length):
                row = {"sequence_id": f"request-{i}", "drafter": drafter, "position": t, "run_length": runs[t]}
                row |= {"proposal_length": limits[t], "accept_probability": float(runs[t] > 0)}
                for key, value in row.items():
                    rows.setdefault(key, []).append(value)
    served = {
        "sequence_id": [f"request-{i}" for i in range(sequences)],
        "domain": [domains[i % len(domains)] for i in range(sequences)],
        "prompt_tokens": [60] * sequences,
        "output_tokens": [length] * sequences,
        "finish_reason": ["length"] * sequences,
        "prompt_token_ids": [prompt for prompt, _ in texts],
        "output_token_ids": [output for _, output in texts],
    }
    tables = {"sequences": make_table("sequences", served), "positions": make_table("positions", rows)}
    told = manifest(drafters=("model", "lookup"))
    drafters = (told.drafters[0], told.drafters[1].model_copy(update={"deterministic": True}))
    return TraceSet.build(told.model_copy(update={"drafters": drafters}), tables)


def hybrid_scenario(
    rule: Mapping[str, Any],
    *,
    batch: int = 1,
    longest: int = 20,
    requests: int | None = None,
    model_price: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Scenario:
    """A closed loop of `batch` clients, drafts of at most `longest` tokens."""
    price = {"kind": "linear", "base_s": 0.006, "charged": "per_round"} if model_price is None else dict(model_price)
    data: dict[str, Any] = {
        "routing": {"drafter": {"drafters": ["model", "lookup"], **rule}},
        "stopping": {"policy": "fixed", "draft_tokens": longest},
        "engine": {"max_num_seqs": batch},
        "workload": {"kind": "closed", "concurrency": batch} | ({} if requests is None else {"requests": requests}),
        "costs": {
            "overhead_s": 0.001,
            "verifier": LINEAR,
            "drafters": {"model": price, "lookup": {"kind": "fraction_of_verify", "fraction": 0.006}},
        },
        **settings,
    }
    return Scenario.model_validate(data)
