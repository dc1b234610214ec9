"""Replay for several drafters of one TraceSet at once.

The flat arrays hold *rows*: row g of a trajectory answers for drafter g, and all rows of a trajectory are equally
long and lie one behind the other. So a cursor says both where a request is and who drafts for it, and the same
position of another drafter is a fixed stride away. A last row, the *joint* one, holds the longest run of any drafter;
requests whose drafter is chosen anew in every round stand there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibration.common.arrays import Ints
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.playback.draft_shapes import DraftShapes
from simulator.playback.replay import UNLIMITED, RecordedRuns, Replay, SequenceTable, Stretches, compile_replay


class ManyRuns:
    """Run lengths of several drafters; see the module. As exact as the replays it is made of.

    A request of a sampled trace has one luck, whoever drafts: token i is accepted iff u_i < a_i of that drafter. Each
    drafter's law is that of speculative sampling; that they share u_i is a coupling of our choice.
    """

    def __init__(self, parts: Sequence[Replay], table: SequenceTable) -> None:
        self.parts, self.joint = parts, len(parts)
        self._lengths = table.output_tokens
        self._shared = all(isinstance(part, RecordedRuns) for part in parts)
        recorded = sum(self._lengths) if self._shared else 0
        rows = self.joint + 1
        self._starts: list[int] = np.concatenate(([0], np.cumsum(self._lengths)[:-1])).tolist()
        self._room = Stretches(rows * recorded)
        self.run_length: Ints = np.zeros(rows * recorded, dtype=np.int64)
        self.shapes: DraftShapes | None = None
        """Several drafters have no one shape; ask `parts`."""
        limited = any(part.proposal_length is not None for part in parts)
        self.proposal_length: Ints | None = np.zeros_like(self.run_length) if limited else None
        self._origin, self._stride = np.zeros_like(self.run_length), np.zeros_like(self.run_length)
        self.row = np.zeros_like(self.run_length)
        """Who drafts at a cursor: the index of a drafter, or `joint`."""
        if recorded:
            self._fill(0, recorded, [0] * self.joint)

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Give the start of row 0 of the trajectory of `request`; rows follow each other at `stride`."""
        recorded = self._lengths[sequence]
        if self._shared and (output_tokens is None or output_tokens <= recorded):
            return self._starts[sequence]
        length = max(output_tokens or 0, recorded)
        start = self._room.take((self.joint + 1) * length)
        self.run_length, self.row = self._room.fit(self.run_length), self._room.fit(self.row)
        self._origin, self._stride = self._room.fit(self._origin), self._room.fit(self._stride)
        if self.proposal_length is not None:
            self.proposal_length = self._room.fit(self.proposal_length)
        places = [part.open(sequence, request, length) for part in self.parts]
        self._fill(start, length, places)
        for part, place in zip(self.parts, places, strict=True):
            part.close(place)
        return start

    def _fill(self, start: int, length: int, places: Sequence[int]) -> None:
        """Copy `length` positions of every part from `places` on into rows from `start` on."""
        rows = slice(start, start + (self.joint + 1) * length)
        self._stride[rows] = length
        self.row[rows] = np.repeat(np.arange(self.joint + 1), length)
        runs = [part.run_length[place : place + length] for part, place in zip(self.parts, places, strict=True)]
        self.run_length[rows] = np.concatenate((*runs, np.max(runs, axis=0)))
        where = self.parts[0].positions(np.arange(places[0], places[0] + length))
        self._origin[rows] = np.tile(where, self.joint + 1)
        if self.proposal_length is not None:
            limits = [
                np.full(length, UNLIMITED)
                if part.proposal_length is None
                else part.proposal_length[place : place + length]
                for part, place in zip(self.parts, places, strict=True)
            ]
            self.proposal_length[rows] = np.concatenate((*limits, np.max(limits, axis=0)))

    def close(self, start: int) -> None:
        """Take back the trajectory one of whose rows begins at `start`."""
        self._room.give(int(self.at(start, 0)))

    def at(self, cursor: Ints | int, drafter: Ints | int) -> Ints:
        """Give the cursors of the same positions for `drafter`; both may be arrays."""
        cursors: Ints = cursor + (drafter - self.row[cursor]) * self._stride[cursor]
        return cursors

    def verified(self, drafter: int, cursors: Ints, drafted: Ints) -> Ints:
        """Give the tokens verified for drafts of `drafter` that are `drafted` deep: nodes where they are trees."""
        shapes = self.parts[drafter].shapes
        return drafted if shapes is None else shapes.verified(self.positions(cursors), drafted)

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`, whoever drafts."""
        return self._origin[cursors]


def compile_drafters(
    traces: TraceSet,
    drafters: Sequence[str],
    sequences: SequenceTable,
    *,
    seed: int,
    longest_draft: int | None,
    block_tokens: int,
) -> ManyRuns:
    """Compile the positions of all `drafters`; see `simulator.playback.replay.compile_replay` for the rest."""
    parts = [
        compile_replay(
            traces, name, sequences, slots=1, seed=seed, longest_draft=longest_draft, block_tokens=block_tokens
        )
        for name in drafters
    ]
    return ManyRuns(parts, sequences)


def must_be_greedy(traces: TraceSet, policy: str) -> None:
    """Refuse sampled traces: `ReplayError`."""
    if traces.manifest.decoding.mode != "greedy":
        raise ReplayError(
            f"routing.drafter.policy: '{policy}' must have greedy traces (a union of sampled drafts is verified by "
            f"another rule), got decoding mode '{traces.manifest.decoding.mode}'"
        )
