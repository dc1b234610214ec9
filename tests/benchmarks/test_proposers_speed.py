"""What a proposer costs a token (extend by one, propose once), against prompt lookup. Run with --benchmark-enable."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from calibration.proposers import (
    Datastore,
    LookupSettings,
    MemorySettings,
    RetrievalSettings,
    Settings,
    SuffixSettings,
    TrigramSettings,
    make,
    maker,
    proposals,
)

KINDS: dict[str, tuple[Settings, bool]] = {
    "lookup": (LookupSettings(), False),
    "suffix": (SuffixSettings(), False),
    "suffix-corpus": (SuffixSettings(), True),
    "retrieval-tree": (RetrievalSettings(min_match=1), True),
    "retrieval-chain": (RetrievalSettings(min_match=1, shape="chain"), True),
    "trigram-16": (TrigramSettings(nodes=16, simulations=32), True),
    "trigram-32": (TrigramSettings(nodes=32, simulations=64), True),
    "memory": (MemorySettings(), False),
    "memory-corpus": (MemorySettings(), True),
}


def text(tokens: int, seed: int) -> list[int]:
    """A text with Zipf frequencies and recurring pieces of 2 to 12 tokens."""
    rng = np.random.default_rng(seed)
    pieces = [rng.zipf(1.3, rng.integers(2, 13)) % 5000 for _ in range(tokens // 20)]
    words: list[int] = []
    while len(words) < tokens:
        words += pieces[int(rng.zipf(1.4)) % len(pieces)].tolist()
    return words[:tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token(benchmark: Any, kind: str) -> None:
    prompt, output = text(1000, 0)[:600], text(1000, 0)[600:]
    settings, takes = KINDS[kind]
    fresh = maker(settings, corpus=[text(2000, seed) for seed in range(5)] if takes else None)
    drafts = benchmark(lambda: proposals(fresh(), prompt, output, 8))
    assert len(drafts) == len(output)
    assert any(draft.tokens for draft in drafts)
    start = time.perf_counter()
    proposals(make(LookupSettings()), prompt, output, 8)
    lookup = time.perf_counter() - start
    if benchmark.stats is not None:
        benchmark.extra_info["microseconds a token"] = 1e6 * benchmark.stats.stats.min / len(output)
        benchmark.extra_info["times prompt lookup"] = benchmark.stats.stats.min / lookup


def test_building_a_datastore(benchmark: Any) -> None:
    corpus = [text(1000, seed) for seed in range(20)]
    store = benchmark(Datastore.build, corpus)
    assert len(store) == 20 * 1001
