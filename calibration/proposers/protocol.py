"""What a training-free drafter is: it grows with committed tokens and proposes what may follow them.

A proposal must be a function of the committed tokens alone, together with a corpus or datastore fixed at
construction: never of where earlier rounds began, of how long their drafts were, or of chance. Whatever the schedule,
the proposal at a position is then the one recorded there, and its acceptance, a comparison of given tokens with the
text, is what was recorded too: replay is exact for every schedule, in greedy and in sampled decoding alike. A
proposer that learns from success therefore asks itself at *every* committed position what it would have proposed, and
not only where a round happened to begin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Proposer(Protocol):
    """Grows with the committed tokens of one request and proposes continuations; knows tokens alone."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens, the prompt first."""

    def propose(self, draft_tokens: int) -> Draft:
        """Give a draft at most `draft_tokens` deep, empty where nothing is known; the state stays as it is.

        The draft for fewer tokens is the one for more, cut at their depth.
        """


@dataclass(frozen=True)
class Draft:
    """Proposed tokens: a chain where `parents` is None, else a tree.

    Node i of a tree hangs on node parents[i] < i, or on the committed text (-1). Nodes of one depth stand together in
    order of depth (breadth first), so that cutting a tree at depth d keeps a prefix of it; siblings have distinct
    tokens. `calibration.proposers.draft_trees` builds, checks, cuts, prunes and fuses drafts.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None
