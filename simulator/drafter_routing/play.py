"""Playing decode rounds with several drafters on one device.

Each drafter drafts in lock step for its own slots, one drafter after the other; one verification for all follows. A
stopping policy is asked for the whole batch; where it weighs prices it takes those of the drafter with most slots.
"""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Floats, Ints
from simulator.drafter_routing.choice import Choice
from simulator.drafter_routing.group import Door, Draft, Drafters
from simulator.drafter_routing.oracle import Foresight
from simulator.playback.replay import Replay
from simulator.rounds.round import Played, Round
from simulator.stopping import OraclePolicy, StoppingPolicy, ask


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
    return Played(tokens, accepted, emitted, draft_s, verify_s, draft_s + verify_s, verified, extra)


class ByRequest:
    """Each slot is drafted for by the drafter chosen when its request began.

    When a request ends, its tokens per second of its rounds (overhead included, prefill chunks of others not) go to
    the choice; where it was preempted, those of the rounds since. Of one drafter alone, `Serial` gives the same.
    """

    def __init__(self, drafters: Drafters, door: Door, choice: Choice, max_num_seqs: int) -> None:
        self._drafters, self._door, self._choice = drafters, door, choice
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
        return Played(tokens, accepted, emitted, draft_s, verify_s, draft_s + verify_s, verified, extra)

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
        return Played(nodes, accepted, emitted, draft_s, verify_s, draft_s + verify_s, verified)


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
