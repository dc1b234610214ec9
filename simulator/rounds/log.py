"""What a run leaves behind: growing typed columns, a row per iteration and a row per request that ended."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Ints
from simulator.rounds.protocols import Played

_BLOCK = 1 << 15
"""Accepted lengths that are counted at once."""


class Columns:
    """Named columns that grow row by row.

    NOTE: `array.array`, not a numpy table or a list of rows: an append costs 40 ns and 8 bytes a value; assigning a
    row of a numpy table costs over a microsecond, and a row of Python objects takes ten times the memory.
    """

    def __init__(self, **types: str) -> None:
        self._arrays = {name: array(code) for name, code in types.items()}
        self._appends: tuple[Callable[[Any], None], ...] = tuple(c.append for c in self._arrays.values())

    def add(self, *row: float) -> None:
        """Append one row, in the order of the columns."""
        for append, value in zip(self._appends, row, strict=True):
            append(value)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Give one column as a numpy array: a view, so that no row may be added while it lives."""
        column = self._arrays[name]
        dtype = np.float64 if column.typecode == "d" else np.int64
        return np.frombuffer(column, dtype) if len(column) else np.zeros(0, dtype)

    def all(self) -> dict[str, NDArray[Any]]:
        """Give all columns."""
        return {name: self[name] for name in self._arrays}


class AcceptanceCounts:
    """How many rounds of a slot accepted 0, 1, 2 ... drafted tokens (bonus excluded), counted in blocks."""

    def __init__(self) -> None:
        self._counts: Ints = np.zeros(1, dtype=np.int64)
        self._blocks: list[Ints] = []
        self._pending = 0

    def add(self, accepted: Ints) -> None:
        """Count one round of each slot."""
        self._blocks.append(accepted)
        self._pending += len(accepted)
        if self._pending > _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._blocks:
            fresh = np.bincount(np.concatenate(self._blocks), minlength=len(self._counts))
            fresh[: len(self._counts)] += self._counts
            self._counts, self._blocks, self._pending = fresh, [], 0

    def by_length(self) -> Ints:
        """Give the number of rounds per accepted length."""
        self._flush()
        return self._counts


@dataclass(slots=True)
class Counters:
    """What a scheduler counts: preemptions, tokens computed again or swapped out, and prefix cache use in tokens.

    `prefix_queries` and `prefix_hits` count prompts when they are first admitted.
    """

    preemptions: int = 0
    recomputed_tokens: int = 0
    swapped_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


PREFILL, DECODE, MIXED = range(3)
"""Kinds of iterations."""


class RunLog:
    """Everything that one replica notes, in the order in which it happened."""

    def __init__(self) -> None:
        self.rounds = 0
        """Decode iterations so far."""
        self.drafts = 0
        """Rounds of a slot in which at least one token was drafted."""
        self.accepted = AcceptanceCounts()
        self.drafted_tokens = 0
        """Tokens that drafters wrote, with those that were never verified."""
        self.beside_s: dict[str, float] = {}
        """Seconds of rounds that are neither drafting nor verification (a link, say), by name."""
        self.iterations = Columns(
            kind="q",
            start_s="d",
            duration_s="d",
            active="q",
            waiting="q",
            drafted_tokens="q",
            accepted_tokens="q",
            emitted_tokens="q",
            context_tokens="q",
            draft_s="d",
            verify_s="d",
            prefill_s="d",
            prefill_tokens="q",
            swap_s="d",
            kv_blocks="q",
        )
        self.stints = Columns(
            request_id="q",
            counted="q",
            first_round="q",
            last_round="q",
            previous_s="d",
            began_s="d",
        )
        """Stretches of rounds without a gap in which a request decoded; one for a request that is never preempted.

        `began_s`: its emission before the first of these rounds; `previous_s`: the one before that where it lies
        in another stretch, else missing.
        """
        self.requests = Columns(
            request_id="q",
            sequence="q",
            counted="q",
            arrival_s="d",
            start_s="d",
            first_token_s="d",
            finish_s="d",
            prompt_tokens="q",
            output_tokens="q",
            drafted_tokens="q",
            accepted_tokens="q",
            prefill_share_s="d",
            preemptions="q",
            requeues="q",
            cached_tokens="q",
        )

    def beside(self, played: Played, verified_drafts: int) -> None:
        """Note what a placement did beside drafting and verifying `verified_drafts` drafted tokens."""
        self.drafted_tokens += int(played.extra.get("drafted_ahead", verified_drafts))
        for name, value in played.extra.items():
            if name.endswith("_s"):
                self.beside_s[name] = self.beside_s.get(name, 0.0) + value

    def acceptance(self, drafted: Ints, accepted: Ints) -> None:
        """Note how many tokens each slot drafted and got accepted in a round."""
        tried = int(np.count_nonzero(drafted))
        if tried:
            self.drafts += tried
            self.accepted.add(accepted)
