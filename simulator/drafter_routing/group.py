"""The drafters of one replica: how a request is given one, and what a round of drafting costs.

Playing decode rounds with several drafters on one device.

Each drafter drafts in lock step for its own slots, one drafter after the other; one verification for all follows. A
stopping policy is asked for the whole batch; where it weighs prices it takes those of the drafter with most slots.

Oracles: they know which drafted tokens will be accepted. No engine can do this; they bound what a router can.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.choice import Choice, ManyRuns, Newcomer
from simulator.playback.draft_shapes import DraftShapes
from simulator.playback.replay import Replay
from simulator.pricing.costs import DraftCost, DraftFraction, DraftPerStep, Prices
from simulator.rounds.protocols import Played, Round
from simulator.stopping import OraclePolicy, StoppingPolicy, ask


class Foresight:
    """What every round of a request would come to, for each drafter; the draft length is the policy's longest.

    `costs` None: a round costs 1, so that rounds are counted; else its seconds at batch 1.
    """

    def __init__(
        self, replay: ManyRuns, longest_draft: int | None, prices: Prices, costs: Sequence[DraftCost] | None
    ) -> None:
        self._replay, self._longest, self._prices, self._costs = replay, longest_draft, prices, costs

    def rounds(self, start: int, tokens: int, prompt_tokens: int) -> tuple[Ints, Floats]:
        """Give (where a round from each position ends, what it costs), shape (drafters, positions).

        `start`: of any row of the trajectory, `tokens` long.
        """
        ends, costs = [], []
        position = np.arange(tokens)
        for drafter in range(self._replay.joint):
            first = int(self._replay.at(start, drafter))
            runs = np.minimum(self._replay.run_length[first : first + tokens], tokens - position)
            drafted = runs if self._longest is None else np.full(tokens, self._longest)
            if self._replay.proposal_length is not None:
                drafted = np.minimum(drafted, self._replay.proposal_length[first : first + tokens])
            ends.append(np.minimum(position + np.minimum(runs, drafted) + 1, tokens))
            if self._costs is None:
                costs.append(np.ones(tokens))
            else:
                costs.append(alone_seconds(self._prices, self._costs[drafter], prompt_tokens + position, drafted))
        return np.stack(ends), np.stack(costs)

    def best_ways(self, start: int, tokens: int, prompt_tokens: int) -> list[int]:
        """Give for each position the drafter to draft there; see `best_ways`."""
        return best_ways(*self.rounds(start, tokens, prompt_tokens))


class BestAlone:
    """See `OracleRequest`: an oracle."""

    def __init__(self, foresight: Foresight, prompt_tokens: Sequence[int]) -> None:
        self._foresight, self._prompt_tokens = foresight, prompt_tokens

    def choose(self, newcomer: Newcomer) -> int:
        """Give the drafter that costs least to the end; of equals the first."""
        prompt = self._prompt_tokens[newcomer.sequence]
        ends, costs = self._foresight.rounds(newcomer.start, newcomer.tokens, prompt)
        return int(np.argmin([way_cost(*row) for row in zip(ends, costs, strict=True)]))

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Nothing to learn."""

    def describe(self) -> dict[str, Any]:
        """Say that it is an oracle."""
        return {"oracle": True}


def way_cost(ends: Ints, costs: Floats) -> float:
    """Give the cost of the rounds from position 1, the first after prefill, to the end."""
    after, each = ends.tolist(), costs.tolist()
    position, total = 1, 0.0
    while position < len(after):
        total += each[position]
        position = after[position]
    return total


def best_ways(ends: Ints, costs: Floats) -> list[int]:
    """Give for each position the drafter whose round there begins a way to the end that costs least.

    V(t) = min over g of cost_g(t) + V(end_g(t)), V = 0 at the end (Bellman); of equals the first.
    """
    tokens = ends.shape[1]
    after, each = ends.T.tolist(), costs.T.tolist()
    togo, best = [0.0] * (tokens + 1), [0] * tokens
    for position in range(tokens - 1, -1, -1):
        ways = [cost + togo[end] for cost, end in zip(each[position], after[position], strict=True)]
        togo[position] = least = min(ways)
        best[position] = ways.index(least)
    return best


def alone_seconds(prices: Prices, cost: DraftCost, context: Ints, drafted: Ints) -> Floats:
    """Give the seconds of rounds at batch 1, overhead included, in which one slot drafts `drafted` tokens."""
    tokens = 1 + drafted
    if prices.capture_sizes:
        sizes = np.array(prices.capture_sizes)
        place = np.searchsorted(sizes, tokens)
        tokens = np.where(place < len(sizes), sizes[np.minimum(place, len(sizes) - 1)], tokens)
    verify_s = np.asarray(prices.verify.step_seconds(1, tokens, context), dtype=np.float64)
    if isinstance(cost, DraftFraction):
        draft_s = np.asarray(cost.seconds(drafted, context, 1.0)[0] * verify_s)
    elif isinstance(cost, DraftPerStep):
        first, last = int(context.min()), int((context + drafted).max())
        steps = np.asarray(cost.step.step_seconds(1, 1, np.arange(first, last + 1)), dtype=np.float64)
        before = np.concatenate(([0.0], np.cumsum(np.broadcast_to(steps, last + 1 - first))))
        draft_s = before[context + drafted - first] - before[context - first]
    else:
        draft_s = np.asarray(cost.step.step_seconds(1, drafted if cost.tokens else 1, context), dtype=np.float64)
    return np.asarray(draft_s + verify_s + prices.overhead_s)


class RoutedReplay:
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


def _play(drafters: Drafters, round_: Round, left: Ints, policy: StoppingPolicy, row: Ints) -> Played:
    """Play a round in which each slot is at the cursor of its drafter, `row`."""
    many = int(row.min()) < int(row.max())
    seen = drafters.see(round_, round_.cursor, int(np.argmax(np.bincount(row))) if many else int(row[0]))
    runs = drafters.runs(round_.cursor, left)
    tokens = drafters.capped(round_.cursor, ask(policy, seen, runs))
    accepted = np.minimum(runs, tokens)
    emitted = np.minimum(accepted + 1, left)
    whole, extra = tokens, dict[str, float]()
    if policy.drafts_ahead is not None:
        whole = drafters.capped(round_.cursor, np.full(round_.active, policy.drafts_ahead, dtype=np.int64))
        extra = {"drafted_ahead": float(whole.sum())}
    verified = round_.active + int(drafters.verified(row, round_.cursor, tokens).sum())
    draft_s, verify_s = drafters.seconds(round_, drafters.split(row, whole, round_), verified)
    drafters.note(row, accepted)
    return Played(
        drafted=tokens,
        accepted=accepted,
        emitted=emitted,
        draft_s=draft_s,
        verify_s=verify_s,
        seconds=draft_s + verify_s,
        verified_tokens=verified,
        extra=extra,
    )


class ByRequest:
    """Each slot is drafted for by the drafter chosen when its request began.

    When a request ends, its tokens per second of its rounds (overhead included, prefill chunks of others not) go to
    the choice; where it was preempted, those of the rounds since. Of one drafter alone, `Serial` gives the same.
    """

    def __init__(self, drafters: Drafters, routed_replay: RoutedReplay, choice: Choice, max_num_seqs: int) -> None:
        self._drafters, self._door, self._choice = drafters, routed_replay, choice
        self._tokens, self._seconds = np.zeros(max_num_seqs, dtype=np.int64), np.zeros(max_num_seqs)

    def opened(self, slots: Ints) -> None:
        """Start these anew."""
        self._tokens[slots], self._seconds[slots] = 0, 0.0

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        row = self._drafters.many.row[round_.cursor]
        played = _play(self._drafters, round_, left, policy, row)
        self._tokens[round_.slots] += played.emitted
        self._seconds[round_.slots] += played.seconds + round_.prices.overhead_s
        for ended in np.flatnonzero(played.emitted == left).tolist():
            slot = int(round_.slots[ended])
            sequence = self._door.sequence_at[int(round_.cursor[ended] - round_.position[ended])]
            self._choice.learn(int(row[ended]), sequence, float(self._tokens[slot] / self._seconds[slot]))
        return played


class ByOracleRound:
    """See `OracleRound`: an oracle. `round_` is rewritten to the drafters chosen."""

    def __init__(self, drafters: Drafters, foresight: Foresight, max_num_seqs: int) -> None:
        self._drafters, self._foresight = drafters, foresight
        self._ways: list[list[int] | None] = [None] * max_num_seqs

    def opened(self, slots: Ints) -> None:
        """Forget the ways of these."""
        for slot in slots.tolist():
            self._ways[slot] = None

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        columns = (round_.slots, round_.cursor, round_.position, left, round_.context)
        row = np.zeros(round_.active, dtype=np.int64)
        places = zip(*(column.tolist() for column in columns), strict=True)
        for column, (slot, cursor, position, more, context) in enumerate(places):
            ways = self._ways[slot]
            if ways is None:
                start, tokens = cursor - position, position + more
                ways = self._ways[slot] = self._foresight.best_ways(start, tokens, context - position)
            row[column] = ways[position]
        round_.cursor = self._drafters.many.at(round_.cursor, row)
        return _play(self._drafters, round_, left, policy, row)


class ByMeanConfidence:
    """See `ByConfidence`. `round_` is rewritten to the drafters chosen.

    A stopping policy that reads signals or knows the future is asked for each drafter, any other once for all.
    """

    def __init__(self, drafters: Drafters, probe_tokens: int | None) -> None:
        self._drafters, self._probe = drafters, probe_tokens

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        drafters, ahead = self._drafters, policy.drafts_ahead
        cursors, seen, runs, lengths = _wishes(drafters, round_, left, policy)
        drawn = lengths
        if ahead is not None:
            drawn = np.stack([drafters.capped(cursor, np.full_like(cursor, ahead)) for cursor in cursors])
        probed = drawn if self._probe is None else np.minimum(drawn, self._probe)
        row = np.argmax([self._mean(view, steps) for view, steps in zip(seen, probed, strict=True)], axis=0)
        slot = np.arange(round_.active)
        round_.cursor = cursors[row, slot]
        tokens = lengths[row, slot]
        accepted = np.minimum(runs[row, slot], tokens)
        # A drafter drafts in lock step for all slots: to the end where it is kept, the probe elsewhere.
        drafts = [
            Draft(drafter, np.where(row == drafter, drawn[drafter], steps), round_.context, round_.cursor)
            for drafter, steps in enumerate(probed)
        ]
        verified = round_.active + int(drafters.verified(row, round_.cursor, tokens).sum())
        draft_s, verify_s = drafters.seconds(round_, drafts, verified)
        drafters.note(row, accepted)
        extra = {"drafted_beside": float(sum(int(draft.tokens.sum()) for draft in drafts) - int(tokens.sum()))}
        emitted = np.minimum(accepted + 1, left)
        return Played(
            drafted=tokens,
            accepted=accepted,
            emitted=emitted,
            draft_s=draft_s,
            verify_s=verify_s,
            seconds=draft_s + verify_s,
            verified_tokens=verified,
            extra=extra,
        )

    def _mean(self, view: Round, steps: Ints) -> Floats:
        """Give the mean confidence over the first `steps`; -1 where there is none."""
        longest = int(steps.max())
        if longest == 0:
            return np.full(len(steps), -1.0)
        assert view.signals is not None
        confidence = view.signals.confidence(view.cursor, longest)
        inside = np.arange(longest) < steps[:, None]
        total = np.where(inside, confidence, 0.0).sum(axis=1)
        return np.asarray(np.where(steps > 0, total / np.maximum(steps, 1), -1.0))


class ByUnion:
    """See `Merged`. `drafted` counts the nodes of the union; a stopping policy is asked as by `ByMeanConfidence`."""

    def __init__(self, drafters: Drafters) -> None:
        self._drafters = drafters

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        drafters = self._drafters
        _, _, runs, lengths = _wishes(drafters, round_, left, policy)
        matched = np.minimum(runs, lengths)
        accepted = matched.max(axis=0)
        # Off the text every draft is taken to go its own way.
        drawn = [drafters.many.verified(d, round_.cursor, tokens) for d, tokens in enumerate(lengths)]
        nodes = (np.stack(drawn) - matched).sum(axis=0) + accepted
        emitted = np.minimum(accepted + 1, left)
        drafts = [Draft(drafter, tokens, round_.context, round_.cursor) for drafter, tokens in enumerate(lengths)]
        verified = round_.active + int(nodes.sum())
        draft_s, verify_s = drafters.seconds(round_, drafts, verified)
        drafters.note(np.argmax(matched, axis=0), accepted)
        return Played(
            drafted=nodes,
            accepted=accepted,
            emitted=emitted,
            draft_s=draft_s,
            verify_s=verify_s,
            seconds=draft_s + verify_s,
            verified_tokens=verified,
        )


def _wishes(
    drafters: Drafters, round_: Round, left: Ints, policy: StoppingPolicy
) -> tuple[Ints, list[Round], Ints, Ints]:
    """Give, for every drafter: cursors, the round as it sees it, the runs to come, and draft lengths.

    Arrays have shape (drafters, slots).
    """
    number = drafters.many.joint
    cursors = np.stack([drafters.many.at(round_.cursor, drafter) for drafter in range(number)])
    seen = [drafters.see(round_, cursors[drafter], drafter) for drafter in range(number)]
    runs = np.stack([drafters.runs(cursor, left) for cursor in cursors])
    if policy.needs_signals or isinstance(policy, OraclePolicy):
        asked = [ask(policy, view, run) for view, run in zip(seen, runs, strict=True)]
    else:
        asked = [policy.draft_tokens(seen[0])] * number
    lengths = np.stack([drafters.capped(cursor, k) for cursor, k in zip(cursors, asked, strict=True)])
    return cursors, seen, runs, lengths
