"""The rows of imported sequences and positions, collected sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from calibration.common.arrays import Ints
from calibration.traces import make_table


class Collected:
    """Rows of both tables; positions begin at 1, where the first round starts (prefill emits token 0)."""

    def __init__(self) -> None:
        self._sequences: dict[str, list[Any]] = {
            name: [] for name in ("sequence_id", "domain", "prompt_tokens", "output_tokens", "finish_reason")
        }
        self._ids: list[str] = []
        self._drafters: list[str] = []
        self._counts: list[int] = []
        self._runs: list[Ints] = []
        self._proposals: list[Ints | None] = []

    def sequence(self, name: str, domain: str, prompt_tokens: int, output_tokens: int, finish_reason: str) -> None:
        """Add a request."""
        row = (name, domain, prompt_tokens, output_tokens, finish_reason)
        for column, value in zip(self._sequences.values(), row, strict=True):
            column.append(value)

    def positions(self, name: str, drafter: str, runs: Ints, proposals: Ints | None) -> None:
        """Add run and proposal lengths at positions 1, 2, ... of request `name`."""
        self._ids.append(name)
        self._drafters.append(drafter)
        self._counts.append(len(runs))
        self._runs.append(runs)
        self._proposals.append(proposals)

    def tables(self) -> dict[str, pa.Table]:
        """Give the two tables."""
        counts = np.array(self._counts, dtype=np.int64)
        total = int(counts.sum())
        first = np.repeat(np.cumsum(counts) - counts, counts)
        runs = np.concatenate(self._runs) if self._runs else np.zeros(0, np.int64)
        columns: dict[str, Any] = {
            "sequence_id": np.repeat(np.array(self._ids, dtype=object), counts),
            "drafter": np.repeat(np.array(self._drafters, dtype=object), counts),
            "position": np.arange(total) - first + 1,
            "run_length": runs,
            "accept_probability": (runs > 0).astype(np.float32),
        }
        known = [one for one in self._proposals if one is not None]
        if len(known) == len(self._proposals) and known:
            columns["proposal_length"] = np.concatenate(known)
        return {
            "sequences": make_table("sequences", self._sequences),
            "positions": make_table("positions", columns),
        }
