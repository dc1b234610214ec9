"""One decode round as policies and placements see it: what an engine knows before it, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from calibration.common.arrays import Floats, Ints

if TYPE_CHECKING:
    from simulator.pricing.costs import Prices


class Signals(Protocol):
    """What the drafter feels while it drafts, from recorded positions and rollouts.

    Arrays have shape (slots asked for, steps): step j = 1 is the first drafted token. A rule that stops at step j may
    read steps 1..j only. Along the trajectory the recorded positions are exact; beyond the first mismatch recorded
    rollouts are used where there are any, and one borrowed from a like draft elsewhere: an approximation, counted in
    ``estimated_steps``. See `simulator.playback.signals`.
    """

    estimated_steps: int

    def confidence(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's largest probability."""
        ...

    def entropy(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's entropy in nats."""
        ...


@dataclass(slots=True)
class Round:
    """What an engine knows before a decode round; what will be accepted is not here. Arrays have shape (active,).

    ``slots`` are stable small ids (0 .. max_num_seqs - 1): a policy keeps what it remembers of a request in arrays
    indexed by them, and forgets it when `StoppingPolicy.opened` names a slot. ``position`` counts committed output
    tokens, ``context`` cached tokens, ``batch_tokens`` the prefill tokens that share this step. ``prices`` is the
    engine's own profile of step times.
    """

    active: int
    slots: Ints
    position: Ints
    context: Ints
    cursor: Ints
    now_s: float
    prices: Prices
    signals: Signals | None = None
    batch_tokens: int = 0


@dataclass(slots=True)
class Played:
    """What came of a round. Arrays have shape (active,); the bonus token is in ``emitted`` only.

    ``draft_s`` and ``verify_s`` are busy times; ``seconds`` is how long the round took on the clock, overhead left
    out: their sum where drafting is serial, less where it overlaps.
    """

    drafted: Ints
    accepted: Ints
    emitted: Ints
    draft_s: float
    verify_s: float
    seconds: float
    verified_tokens: int = 0
    extra: dict[str, float] = field(default_factory=dict)
