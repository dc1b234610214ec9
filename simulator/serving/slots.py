"""The requests that decode, as columns of one table, so that a round is a dozen numpy calls on slices.

A request on its way through an engine: what the engine remembers of it, whichever replica serves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from calibration.common.arrays import Ints
from simulator.workload import Request


@dataclass(slots=True, eq=False)
class Job:
    """A request in service. It waits, is prefilled, decodes, and ends; preempted or requeued it waits again.

    `emitted` output tokens are out, whatever happens to its memory. `computed` tokens of its context are in memory
    while it is prefilled, and `lost` ones were, before it was preempted. It holds `blocks` KV blocks, the first
    `shared` of them under `keys`, the keys of its first full blocks of `key_tokens` tokens.
    """

    request: Request
    rank: float = 0.0
    emitted: int = 0
    computed: int = 0
    lost: int = 0
    swapped: bool = False
    blocks: int = 0
    shared: int = 0
    keys: list[int] = field(default_factory=list)
    key_tokens: int = 0
    start_s: float = math.nan
    first_token_s: float = math.nan
    previous_s: float = math.nan
    """When it last emitted before its present stretch of rounds; see `RunLog.stints`."""
    began_s: float = math.nan
    first_round: int = 0
    prefill_share_s: float = 0.0
    replay_start: int = -1
    """Start of its stretch in the replay arrays; -1 while it has none."""
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    requeues: int = 0
    cached_tokens: int = 0

    @property
    def context(self) -> int:
        """Tokens of prompt and output so far: what a prefill has to compute."""
        return self.request.prompt_tokens + self.emitted


CURSOR, POSITION, CONTEXT, LEFT, DRAFTED, ACCEPTED, SLOT, BLOCKS = range(8)
"""Rows: place in the replay arrays; output tokens committed; prompt and committed tokens; output tokens to come;
tokens drafted and accepted since it entered; stable slot id; KV blocks held."""


class DecodeTable:
    """Requests that decode, in the order in which they began; a slot id stays with its request until it leaves.

    `table` has shape (rows, max_num_seqs); the first `len` columns are live.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.jobs: list[Job] = []
        self.table: Ints = np.zeros((8, max_num_seqs), dtype=np.int64)
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        """Give the number of requests that decode."""
        return len(self.jobs)

    @property
    def live(self) -> Ints:
        """The live columns: a view."""
        return self.table[:, : len(self.jobs)]

    def enter(self, job: Job) -> None:
        """Let `job`, all of whose context is computed, decode."""
        request, emitted = job.request, job.emitted
        self.table[:, len(self.jobs)] = (
            job.replay_start + emitted,
            emitted,
            request.prompt_tokens + emitted,
            request.output_tokens - emitted,
            0,
            0,
            self._free.pop(),
            job.blocks,
        )
        self.jobs.append(job)

    def leave(self, columns: list[int]) -> list[Job]:
        """Take the jobs at `columns` (ascending) out, with what they gained, and close the gaps."""
        gone = []
        for column in columns:
            job = self.jobs[column]
            _, job.emitted, _, _, drafted, accepted, slot, job.blocks = self.table[:, column].tolist()
            job.drafted += drafted
            job.accepted += accepted
            self._free.append(slot)
            gone.append(job)
        last = len(self.jobs)
        for column in reversed(columns):
            # NOTE: moving the tail by one costs 2 us; picking the columns that stay, 15 us.
            self.table[:, column : last - 1] = self.table[:, column + 1 : last]
            last -= 1
            del self.jobs[column]
        return gone

    def drop_last(self) -> Job:
        """Take the last job out."""
        return self.leave([len(self.jobs) - 1])[0]
