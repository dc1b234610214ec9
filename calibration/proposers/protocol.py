"""What a training-free drafter is: it grows with committed tokens and proposes what may follow them.

A proposal must be a function of the committed tokens alone, together with a corpus or datastore fixed at
construction: never of where earlier rounds began, of how long their drafts were, or of chance. Whatever the schedule,
the proposal at a position is then the one recorded there, and its acceptance, a comparison of given tokens with the
text, is what was recorded too: replay is exact for every schedule, in greedy and in sampled decoding alike. A
proposer that learns from success therefore asks itself at *every* committed position what it would have proposed, and
not only where a round happened to begin.

Checks of settings: every fault in one error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from calibration.common.errors import CalibrationError


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


def refuse(where: str, *rules: tuple[bool, str]) -> None:
    """Raise one `CalibrationError` that names every broken rule; a rule is (is it kept, what to say where not)."""
    faults = [text for kept, text in rules if not kept]
    if faults:
        raise CalibrationError(f"{where}: {'; '.join(faults)}")


def whole(name: str, value: object, low: int = 1) -> tuple[bool, str]:
    """Give the rule that `value` is an integer of at least `low`."""
    kept = isinstance(value, int) and not isinstance(value, bool) and value >= low
    return kept, f"{name}: must be an integer >= {low}, got {value!r}"


def within(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> tuple[bool, str]:
    """Give the rule that `value` is a number in [low, high], or in (low, high] with `open_low`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kept = number and (low < value <= high if open_low else low <= value <= high)  # type: ignore[operator]
    return kept, f"{name}: must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}"


def one_of(name: str, value: object, choices: tuple[str, ...]) -> tuple[bool, str]:
    """Give the rule that `value` is one of `choices`."""
    return value in choices, f"{name}: must be one of {', '.join(choices)}, got {value!r}"
