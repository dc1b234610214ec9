"""Choosing one drafter for a request when it begins to decode: the protocol, and rules that do not learn.

A choice holds until the request ends (or its replica fails). A policy sees the prompt, its label and what came of
earlier requests; an oracle says that it is one.

Signals of several drafters: each slot feels what the drafter at its cursor feels.

Replay for several drafters of one TraceSet at once.

The flat arrays hold *rows*: row g of a trajectory answers for drafter g, and all rows of a trajectory are equally
long and lie one behind the other. So a cursor says both where a request is and who drafts for it, and the same
position of another drafter is a fixed stride away. A last row, the *joint* one, holds the longest run of any drafter;
requests whose drafter is chosen anew in every round stand there.

Bandits: which drafter, learned from the tokens per second of the requests that have ended.

A bandit that forgets: UCB over a sliding window, for traffic whose mix changes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet
from simulator.playback.draft_shapes import DraftShapes
from simulator.playback.replay import UNLIMITED, RecordedRuns, Replay, SequenceTable, Stretches, compile_replay
from simulator.playback.signals import RecordedSignals
from simulator.workload.lengths import stream


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


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A request that needs a drafter. `sequence`: which recorded prompt it is; `number`: its id.

    `start` and `tokens` are where its trajectory begins in the replay and how long it is: for oracles alone.
    """

    number: int
    sequence: int
    start: int
    tokens: int


class Choice(Protocol):
    """Chooses a drafter for each request."""

    def choose(self, newcomer: Newcomer) -> int:
        """Give the index of the drafter."""
        ...

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Hear what a request came to that `drafter` drafted for, when it has ended."""
        ...

    def describe(self) -> dict[str, Any]:
        """Give what is worth knowing of it after a run."""
        ...


class Table:
    """One drafter for each sequence, fixed before the run: see `StaticDrafter`, `ByDomain` and `ByClassifier`."""

    def __init__(self, drafter_of: Sequence[int], told: dict[str, Any] | None = None) -> None:
        self._drafter_of, self._told = drafter_of, told or {}

    def choose(self, newcomer: Newcomer) -> int:
        """Give the drafter of its sequence."""
        return self._drafter_of[newcomer.sequence]

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Nothing to learn."""

    def describe(self) -> dict[str, Any]:
        """Give what was known beforehand."""
        return self._told


class ManySignals:
    """Signals by cursor; as exact as those of the drafter there."""

    def __init__(self, replay: ManyRuns, parts: Sequence[RecordedSignals]) -> None:
        self.steps = self.estimated_steps = 0
        self._replay, self._parts = replay, parts

    def confidence(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's largest probability, shape (slots, steps)."""
        return self._each(cursor, steps, lambda part: part.confidence)

    def entropy(self, cursor: Ints, steps: int) -> Floats:
        """Give the drafter's entropy in nats, shape (slots, steps)."""
        return self._each(cursor, steps, lambda part: part.entropy)

    def acceptance(self, cursor: Ints, steps: int) -> Floats:
        """Give the predicted probability of acceptance of each step's token, given those before it."""
        return self._each(cursor, steps, lambda part: part.acceptance)

    def _each(
        self,
        cursor: Ints,
        steps: int,
        feel: Callable[[RecordedSignals], Callable[[Ints, int], Floats]],
    ) -> Floats:
        row = self._replay.row[cursor]
        values = np.empty((len(cursor), steps))
        for drafter in np.unique(row).tolist():
            mine = np.flatnonzero(row == drafter)
            values[mine] = feel(self._parts[drafter])(cursor[mine], steps)
        self.steps = sum(part.steps for part in self._parts)
        self.estimated_steps = sum(part.estimated_steps for part in self._parts)
        return values


class Bandit:
    """Arms = drafters. Until every arm has `needed` rewards, the arm that was played least; then `pick`."""

    needed = 1

    def __init__(self, arms: int) -> None:
        self.played: Ints = np.zeros(arms, dtype=np.int64)
        """Requests routed to each arm, ended or not."""
        self.rewards: Ints = np.zeros(arms, dtype=np.int64)
        self.mean, self.squares = np.zeros(arms), np.zeros(arms)
        """Mean reward of each arm, and the sum of squared deviations from it (Welford 1962)."""
        self.largest = 0.0

    def choose(self, newcomer: Newcomer) -> int:
        """Give the arm to play."""
        unknown = int(self.rewards.min()) < self.needed
        arm = int(np.argmin(self.played)) if unknown else self.pick(newcomer)
        self.played[arm] += 1
        return arm

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm that promises most."""
        raise NotImplementedError

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Add a reward."""
        self.rewards[drafter] += 1
        off = tokens_per_second - self.mean[drafter]
        self.mean[drafter] += off / self.rewards[drafter]
        self.squares[drafter] += off * (tokens_per_second - self.mean[drafter])
        self.largest = max(self.largest, tokens_per_second)

    def describe(self) -> dict[str, Any]:
        """Give what it has learned."""
        return {"mean_tokens_per_second": self.mean.tolist(), "rewards": self.rewards.tolist()}


class Ucb1(Bandit):
    """See `Ucb`."""

    def __init__(self, arms: int, exploration: float) -> None:
        super().__init__(arms)
        self._exploration = exploration

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest upper bound."""
        bonus = self._exploration * np.sqrt(math.log(int(self.played.sum())) / self.played)
        return int(np.argmax(self.mean / self.largest + bonus))


class ThompsonSampling(Bandit):
    """See `Thompson`."""

    needed = 4

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms)
        self._seed = seed

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest mean drawn."""
        return int(np.argmax(self.means(newcomer.number)))

    def means(self, number: int) -> Floats:
        """Draw the mean of every arm for request `number`."""
        rng = stream(self._seed, "thompson", number)
        freedom = self.rewards - 3
        scale = np.sqrt(self.squares / (self.rewards * freedom))
        return np.asarray(self.mean + scale * rng.standard_t(freedom))


class KernelUcb(Bandit):
    """See `PakUcb`. `context_of[sequence]` indexes `gram`, the kernel of all contexts that there are.

    As the contexts are known and finite, mean and covariance of the regression are kept at all of them: adding a
    reward y at context j, with c = C[:, j] / (C[j, j] + a), gives m + c (y - m[j]) and C - c C[j, :]: the numbers of
    the closed form, in O(contexts^2) a reward.
    """

    def __init__(self, arms: int, context_of: Sequence[int], gram: Floats, ridge: float, eta: float) -> None:
        super().__init__(arms)
        self._context_of, self._ridge, self._eta = context_of, ridge, eta
        self._means = np.zeros((arms, len(gram)))
        self._covariances = np.repeat(gram[None], arms, axis=0)

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest upper bound at this prompt."""
        mean, deviation = self.estimate(self._context_of[newcomer.sequence])
        return int(np.argmax(mean / self.largest + self._eta * deviation))

    def estimate(self, context: int) -> tuple[Floats, Floats]:
        """Give (mu, sigma) of every arm; mu in tokens per second."""
        variance = np.maximum(self._covariances[:, context, context], 0.0)
        return self._means[:, context], np.sqrt(variance)

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Add a reward."""
        super().learn(drafter, sequence, tokens_per_second)
        context = self._context_of[sequence]
        mean, covariance = self._means[drafter], self._covariances[drafter]
        column = covariance[:, context] / (covariance[context, context] + self._ridge)
        mean += column * (tokens_per_second - mean[context])
        covariance -= np.outer(column, covariance[context])


def kernel_matrix(similarity: Floats, kernel: Literal["poly", "linear", "rbf"]) -> Floats:
    """Give the kernel of vectors of length 1 from their inner products; see `PakUcb`."""
    match kernel:
        case "poly":
            return np.asarray((similarity + 1) ** 3)
        case "linear":
            return similarity
        case "rbf":
            return np.asarray(np.exp(-2 * (1 - similarity)))


def default_eta(horizon: int, arms: int, delta: float) -> float:
    """Give sqrt(2 ln(2 T G / delta))."""
    return math.sqrt(2 * math.log(2 * horizon * arms / delta))


class SlidingUcb(Ucb1):
    """SW-UCB (Garivier and Moulines 2011): UCB1 that knows only the last `window` requests.

    Plays are counted over the last `window` requests routed, means (and the largest reward) over the last `window`
    rewards heard; the bound of an arm is mean + c sqrt(ln min(n, window) / n_g). An arm without a reward there counts
    as unknown, so every arm is tried at least about once in a window: the price of noticing a change.
    """

    def __init__(self, arms: int, exploration: float, window: int) -> None:
        super().__init__(arms, exploration)
        self._routed: deque[int] = deque(maxlen=window)
        self._heard: deque[tuple[int, float]] = deque(maxlen=window)

    def choose(self, newcomer: Newcomer) -> int:
        """Give the arm to play."""
        arm = super().choose(newcomer)
        if len(self._routed) == self._routed.maxlen:
            self.played[self._routed[0]] -= 1
        self._routed.append(arm)
        return arm

    def pick(self, newcomer: Newcomer) -> int:
        """Give the arm with the largest upper bound; its plays may have left the window before its reward came."""
        played = np.maximum(self.played, 1)
        bonus = self._exploration * np.sqrt(math.log(int(played.sum())) / played)
        return int(np.argmax(self.mean / self.largest + bonus))

    def learn(self, drafter: int, sequence: int, tokens_per_second: float) -> None:
        """Add a reward, and forget the one that leaves the window."""
        self._heard.append((drafter, tokens_per_second))
        arm: Ints = np.array([arm for arm, _ in self._heard], dtype=np.int64)
        reward: Floats = np.array([reward for _, reward in self._heard])
        arms = len(self.mean)
        self.rewards[:] = np.bincount(arm, minlength=arms)
        self.mean[:] = np.bincount(arm, weights=reward, minlength=arms) / np.maximum(self.rewards, 1)
        self.squares[:] = np.bincount(arm, weights=(reward - self.mean[arm]) ** 2, minlength=arms)
        self.largest = float(reward.max())
