"""A request on its way through an engine: what the engine remembers of it, whichever replica serves it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
