"""What moves when a request is handed on, how long that takes, and how much of its prompt need not be computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simulator.cascade.settings import Handover, KvHandover, Stage


@dataclass(frozen=True)
class Transfer:
    """One hand-over: `seconds` on the link for `nbytes`; of the prompt, `carried_tokens` need not be computed."""

    seconds: float = 0.0
    nbytes: float = 0.0
    carried_tokens: int = 0


def transfer(how: Handover, sender: Stage, receiver: Stage, prompt_tokens: int) -> Transfer:
    """Give the hand-over of a prompt from one stage to another; see `KvHandover` for formula and exactness.

    At least one token is always computed anew: carried <= prompt_tokens - 1.
    """
    if not isinstance(how, KvHandover) or sender.kv is None or receiver.kv is None:
        return Transfer()
    shared = min(sender.kv.layers, receiver.kv.layers)
    per_token = min(sender.kv.bytes_per_token, receiver.kv.bytes_per_token)
    if shared < receiver.kv.layers:
        per_token += how.hidden_bytes_per_token or 0.0
    computed = max(1, math.ceil(prompt_tokens * (receiver.kv.layers - shared) / receiver.kv.layers))
    nbytes = prompt_tokens * per_token
    return Transfer(nbytes / (how.bandwidth_gb_s * 1e9) + how.latency_s, nbytes, prompt_tokens - computed)
