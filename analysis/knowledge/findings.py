"""What the knowledge question found: one generalist against specialists of the same cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.common.bootstrap import Estimate
from analysis.common.records import Record
from analysis.routing.served import Price

Verdict = Literal["better", "worse", "cannot tell apart"]


@dataclass(frozen=True)
class Student:
    """A drafter and what it learned from; None where the manifest does not say.

    ``home`` is the domain of a specialist, None for the generalist. ``texts`` are distinct texts, ``tokens`` those
    trained on, repeats counted.
    """

    name: str
    home: str | None
    parameters: int | None
    texts: int | None
    tokens: int | None


@dataclass(frozen=True)
class PairedRow:
    """A specialist (None: each domain's own) against the generalist on the prompts of a domain (None: all homes).

    Tokens per round include the bonus token, over complete rounds of ``draft_tokens`` of the findings. ``p_value``:
    two-sided sign-flip permutation test over prompts, ``exact`` where all flips were played; ``p_adjusted``: Holm
    1979 within its family, home pairs (the question asked) or pairs away from home (what it costs).
    """

    specialist: str | None
    domain: str | None
    home: bool
    specialist_tokens: Estimate
    generalist_tokens: Estimate
    difference: Estimate
    p_value: float
    exact: bool
    p_adjusted: float
    verdict: Verdict


@dataclass(frozen=True)
class TransferCell:
    """Accepted tokens per round of a drafter on a domain over the generalist's there, the bonus token excluded.

    ``together``: with bounds that hold for all specialists and domains at once, whichever is picked.
    """

    drafter: str
    domain: str
    relative: Estimate
    together: Estimate


@dataclass(frozen=True)
class SpeedRow:
    """Simulated at batch 1: a specialist on its home domain (None: every specialist on its own home).

    ``ratio``: its throughput over the generalist's, paired by prompt; the speed-ups are over no speculation.
    """

    specialist: str | None
    domain: str | None
    generalist_speedup: Estimate
    specialist_speedup: Estimate
    ratio: Estimate


@dataclass(frozen=True)
class Level:
    """What one way to choose drafters comes to: tokens per round (bonus included), speed-up over no speculation."""

    choice: str
    tokens_per_round: Estimate
    speedup: Estimate


@dataclass(frozen=True)
class RouterPoint:
    """A router that is right with probability ``accuracy``; a miss goes to any other drafter with equal chance.

    ``speedup_careful``: its misses go to the generalist instead.
    """

    accuracy: float
    tokens_per_round: Estimate
    speedup: Estimate
    speedup_careful: Estimate


@dataclass(frozen=True)
class RouterValue:
    """The worth of knowing which drafter to ask, under one price list at batch 1.

    ``draft_tokens``: the length, of those tried, that is best for the generalist. ``break_even``: the accuracy above
    which the router beats the generalist; above 1 no router of this kind does. ``gain``: throughput of the true label
    over the generalist's. ``extrapolated``: the largest share of iterations of a run priced outside of what was
    measured.
    """

    price: Price
    extrapolated: float
    draft_tokens: int
    chance: float
    levels: tuple[Level, ...]
    curve: tuple[RouterPoint, ...]
    break_even: Estimate
    break_even_at_home: Estimate
    gain: Estimate
    speed: tuple[SpeedRow, ...]

    def level(self, choice: str) -> Level:
        """Give the level of one choice: generalist, label, oracle by request or oracle by round."""
        return next(level for level in self.levels if level.choice == choice)


@dataclass(frozen=True)
class PublishedRow:
    """A published comparison of a generic and a tuned drafter: facts of others, without intervals.

    ``measure`` is accepted over drafted tokens; ``drafted`` counts them where given.
    """

    source: str
    setting: str
    generic: float
    tuned: float
    drafted: int | None


@dataclass(frozen=True)
class KnowledgeFindings(Record):
    """Answers to: one generalist, or specialists and a router, at equal cost?"""

    traces: str
    verifier: str
    requests: dict[str, int]
    generalist: Student
    specialists: tuple[Student, ...]
    draft_tokens: int
    pooled: PairedRow
    paired: tuple[PairedRow, ...]
    transfer: tuple[TransferCell, ...]
    routers: tuple[RouterValue, ...]
    published: tuple[PublishedRow, ...]
    method: str
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return f"recorded: {self.traces}"
