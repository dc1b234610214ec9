"""Drawn trees, token texts and one proposer of every kind, for tests of `calibration.proposers`."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from calibration.proposers import (
    Draft,
    LookupSettings,
    MemorySettings,
    RetrievalSettings,
    Settings,
    SuffixSettings,
    TrigramSettings,
)

TEXT = st.lists(st.integers(0, 3), max_size=25)
CORPUS = st.lists(TEXT, max_size=4)

KINDS: dict[str, tuple[Settings, bool]] = {
    "lookup": (LookupSettings(), False),
    "suffix": (SuffixSettings(), False),
    "suffix-earliest": (SuffixSettings(occurrence="earliest", length_factor=2.0), False),
    "suffix-corpus": (SuffixSettings(min_probability=0.1), True),
    "retrieval-tree": (RetrievalSettings(nodes=9, max_draft_tokens=5), True),
    "retrieval-chain": (RetrievalSettings(shape="chain", min_match=1), True),
    "trigram": (TrigramSettings(nodes=10, simulations=20, max_draft_tokens=6, branching=3), False),
    "trigram-corpus": (TrigramSettings(nodes=6), True),
    "memory": (MemorySettings(warm_up=3), False),
    "memory-corpus": (MemorySettings(half_life=20.0, rate=0.3, warm_up=0), True),
}
"""Settings of every kind of proposer, and whether it is given a corpus."""


@st.composite
def listed_trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(tokens, parents) of up to ten nodes, parents first, siblings with equal tokens possible."""
    size = draw(st.integers(0, 10))
    tokens = [draw(st.integers(0, 3)) for _ in range(size)]
    return tokens, [draw(st.integers(-1, node - 1)) for node in range(size)]


def listed_paths(tokens: Sequence[int], parents: Sequence[int]) -> set[tuple[int, ...]]:
    """The tokens from the root to every node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


def paths(draft: Draft) -> set[tuple[int, ...]]:
    """The tokens from the root to every node of a draft."""
    chain = range(-1, len(draft.tokens) - 1)
    return listed_paths(draft.tokens, chain if draft.parents is None else draft.parents)
