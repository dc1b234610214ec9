"""The drafters of one replica: how a request is given one, and what a round of drafting costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.common.arrays import Ints
from simulator.drafter_routing.choice import Choice, Newcomer
from simulator.drafter_routing.replay import ManyRuns
from simulator.playback.draft_shapes import DraftShapes
from simulator.pricing.costs import DraftCost, Prices
from simulator.rounds.round import Round


class Door:
    """The replay as an engine sees it: a request that comes in is given its drafter.

    With a `choice` it stands in the row of the drafter chosen, without one in the joint row.
    """

    def __init__(self, many: ManyRuns, table_tokens: Sequence[int], choice: Choice | None) -> None:
        self.many, self._recorded, self._choice = many, table_tokens, choice
        self.shapes: DraftShapes | None = None
        self.sequence_at: dict[int, int] = {}
        """The sequence of the trajectory that begins there; of ended ones too, until the place is used again."""
        self._look()

    def _look(self) -> None:
        """Take over arrays that may have grown.

        NOTE: replicas share `many`. Arrays that grew for another one keep what is in them for this one.
        """
        self.run_length, self.proposal_length = self.many.run_length, self.many.proposal_length

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Give the start of the stretch that answers for `request`, in the row of its drafter."""
        start = self.many.open(sequence, request, output_tokens)
        tokens = output_tokens if output_tokens is not None else self._recorded[sequence]
        row = self.many.joint
        if self._choice is not None:
            row = self._choice.choose(Newcomer(request, sequence, start, tokens))
        start = int(self.many.at(start, row))
        self.sequence_at[start] = sequence
        self._look()
        return start

    def close(self, start: int) -> None:
        """Take the stretch back."""
        self.many.close(start)

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`."""
        return self.many.positions(cursors)


@dataclass(frozen=True, slots=True)
class Draft:
    """What `drafter` drafts in a round: tokens per slot, and the contexts and cursors of these slots."""

    drafter: int
    tokens: Ints
    context: Ints
    cursor: Ints


class Drafters:
    """The drafters of one replica: their replay, their prices, and a tally of what each of them did."""

    def __init__(self, many: ManyRuns, names: Sequence[str], costs: Sequence[DraftCost]) -> None:
        self.many, self.names = many, names
        self._costs = costs
        self._views: list[Prices] = []
        self.slots, self.drafted, self.accepted = (np.zeros(len(names), dtype=np.int64) for _ in range(3))
        """Slots and rounds that each one drafted for, tokens drafted, and tokens accepted."""

    def prices(self, prices: Prices, drafter: int) -> Prices:
        """Give the prices of a round that `drafter` drafts alone, for a policy to look at."""
        if not self._views:
            for cost in self._costs:
                view = copy.copy(prices)
                view.draft = cost
                self._views.append(view)
        return self._views[drafter]

    def see(self, round_: Round, cursor: Ints, drafter: int) -> Round:
        """Give the round as if its slots were at `cursor`, with the prices of `drafter`."""
        return replace(round_, cursor=cursor, prices=self.prices(round_.prices, drafter))

    def runs(self, cursor: Ints, left: Ints) -> Ints:
        """Give how many tokens of a draft at `cursor` will be accepted: for replay, and for oracles."""
        return np.minimum(self.many.run_length.take(cursor), left)

    def capped(self, cursor: Ints, tokens: Ints) -> Ints:
        """Give `tokens`, or fewer where fewer are proposed."""
        limits = self.many.proposal_length
        return tokens if limits is None else np.minimum(tokens, limits.take(cursor))

    def split(self, row: Ints, tokens: Ints, round_: Round) -> list[Draft]:
        """Give the drafts of the slots in each row."""
        context, cursor = round_.context, round_.cursor
        if int(row.min()) == int(row.max()):
            return [Draft(int(row[0]), tokens, context, cursor)]
        groups = [(drafter, row == drafter) for drafter in np.unique(row).tolist()]
        return [Draft(drafter, tokens[mine], context[mine], cursor[mine]) for drafter, mine in groups]

    def verified(self, row: Ints, cursor: Ints, tokens: Ints) -> Ints:
        """Give the tokens verified per slot, each drafted for by its `row`: nodes where drafts are trees."""
        found = tokens
        for drafter, part in enumerate(self.many.parts):
            if part.shapes is not None:
                found = np.where(row == drafter, self.many.verified(drafter, cursor, tokens), found)
        return found

    def seconds(self, round_: Round, drafts: Sequence[Draft], tokens: int) -> tuple[float, float]:
        """Give (draft seconds, verifier seconds): every drafter in turn, then `tokens` verified in all.

        A drafter that is said to take a fraction of the verification takes it whole, also for a part of the slots: an
        upper bound.
        """
        prices = round_.prices
        verify_s, outside = prices.verify_s(round_.active, tokens, int(round_.context.sum()))
        draft_s = 0.0
        for draft in drafts:
            shapes = self.many.parts[draft.drafter].shapes
            share = None if shapes is None else shapes.shares(self.many.positions(draft.cursor), draft.tokens)
            seconds, beyond = self._costs[draft.drafter].seconds(draft.tokens, draft.context, verify_s, share)
            draft_s += seconds
            outside = outside or beyond
            self.drafted[draft.drafter] += int(draft.tokens.sum())
        prices.extrapolated_iterations += outside
        return draft_s, verify_s

    def note(self, row: Ints, accepted: Ints) -> None:
        """Add to the tally the slots of each drafter, and what was accepted of it."""
        number = len(self.names)
        self.slots += np.bincount(row, minlength=number)
        self.accepted += np.bincount(row, weights=accepted, minlength=number).astype(np.int64)

    def describe(self) -> dict[str, Any]:
        """Give the tally by drafter; a slot in a round counts as one round."""
        tally = zip(self.names, self.slots.tolist(), self.drafted.tolist(), self.accepted.tolist(), strict=True)
        return {
            name: {"rounds": rounds, "drafted_tokens": drafted, "accepted_tokens": accepted}
            for name, rounds, drafted, accepted in tally
        }
