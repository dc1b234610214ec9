"""What an engine, its policies and its placements share.

A decode round before and after it is played (`Round`, `Played`), what a stopping policy and a placement are, serial
placement, what-if step times for policies that weigh time, and the log that a run leaves: growing typed columns, a
row per iteration and a row per request that ended.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from simulator.playback.replay import Replay
from simulator.pricing.costs import DraftFraction, DraftPerStep, Prices
from simulator.trees.trees import Tree


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


class StoppingPolicy(Protocol):
    """Chooses draft lengths. A policy sees only what an engine would know; `OraclePolicy` is the one exception.

    `longest_draft`: the most it ever asks for, None for an oracle alone. `needs_signals`: whether it reads
    `Round.signals`. `drafts_ahead`: every slot drafts so many tokens before the policy chooses how many of them are
    verified; None where what is drafted is verified. `tree`: drafted in place of chains, if any. `always_drafts`:
    the drafter runs (and a drafter charged by the round is paid) even in a round that asks nothing of any slot.
    """

    longest_draft: int | None
    needs_signals: bool
    drafts_ahead: int | None
    tree: Tree | None
    always_drafts: bool

    def opened(self, slots: Ints) -> None:
        """Hear that `slots` now hold other requests: forget what was known of the old ones."""
        ...

    def draft_tokens(self, round_: Round) -> Ints:
        """Give how many drafted tokens of each active slot are to be verified (shape: active)."""
        ...

    def observe(self, round_: Round, played: Played) -> None:
        """Hear what came of a round, before its requests move on."""
        ...


class Policy:
    """A policy that looks at nothing but the round, to build others on."""

    longest_draft: int | None = None
    needs_signals: bool = False
    drafts_ahead: int | None = None
    tree: Tree | None = None
    always_drafts: bool = False

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def observe(self, round_: Round, played: Played) -> None:
        """Nothing to learn."""


class OraclePolicy(Policy):
    """A policy that knows what will be accepted. No engine can do this, it bounds what can; results say so.

    It is asked by `foreseen_tokens` in place of `draft_tokens`.
    """

    def draft_tokens(self, round_: Round) -> Ints:
        """Refuse: an oracle that is not told the future is no oracle."""
        raise TypeError("an oracle is asked by foreseen_tokens")

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Give the draft lengths (shape: active); `run_length` tokens of each slot's next draft will be accepted."""
        raise NotImplementedError


def ask(policy: StoppingPolicy, round_: Round, run_length: Ints) -> Ints:
    """Give the draft lengths that `policy` chooses; only an oracle is told the `run_length` to come."""
    if isinstance(policy, OraclePolicy):
        return policy.foreseen_tokens(round_, run_length)
    return policy.draft_tokens(round_)


def first_stop(stop: NDArray[np.bool_]) -> Ints:
    """Give draft lengths: up to and with the first step where `stop` (slots, steps) is true, else all steps."""
    return np.asarray(np.where(stop.any(axis=1), stop.argmax(axis=1) + 1, stop.shape[1]), dtype=np.int64)


class Placement(Protocol):
    """Plays decode rounds. Every slot emits at least one token in each of them."""

    def opened(self, slots: Ints) -> None:
        """Hear that `slots` now hold other requests: forget what was known of the old ones."""
        ...

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round; `left`: output tokens to come, shape (active,), beyond which nothing is emitted."""
        ...


class Serial:
    """Draft, then verify: a round takes draft_s + verify_s.

    drafted = min(what the policy asks for, what the drafter proposes); accepted = min(run length, drafted);
    emitted = min(accepted + 1, output tokens to come). Leviathan et al. 2023, Chen et al. 2023. As exact as the
    replay that answers it. Of a drafter that proposes trees, `drafted` is their depth, and all nodes down to it are
    verified; see `simulator.playback.draft_shapes`.

    A policy may have every slot draft ahead and verify a part only (`drafts_ahead`): drafting is priced in full, and
    `drafted` counts what is verified. With a `tree`, every slot drafts and verifies all its nodes. A round in which
    the policy asks nothing of any slot leaves the drafter idle. With `pad_drafts` a slot verifies as many tokens as
    the policy asked for, whatever its drafter proposed.
    """

    def __init__(self, pad_drafts: bool = False) -> None:
        self._pad_drafts = pad_drafts

    def opened(self, slots: Ints) -> None:
        """Nothing to forget."""

    def play(self, round_: Round, left: Ints, policy: StoppingPolicy, replay: Replay) -> Played:
        """Play one round."""
        if policy.tree is not None:
            return _play_tree(round_, left, policy.tree, replay)
        future = np.minimum(replay.run_length.take(round_.cursor), left)  # beyond the output a recording may go on
        asked, ahead = ask(policy, round_, future), policy.drafts_ahead
        runs = policy.always_drafts or bool(asked.any())
        proposals = None if replay.proposal_length is None else replay.proposal_length.take(round_.cursor)
        drafted = asked if proposals is None else np.minimum(asked, proposals)
        accepted = np.minimum(future, drafted)
        emitted = np.minimum(accepted + 1, left)
        shapes = replay.shapes
        places = None if shapes is None else replay.positions(round_.cursor)
        verified = drafted if shapes is None or places is None else shapes.verified(places, drafted)
        verified = np.maximum(verified, asked) if self._pad_drafts else verified
        tokens = round_.active + int(verified.sum())
        total_context = int(round_.context.sum())
        if ahead is None:
            share = None if shapes is None or places is None else shapes.shares(places, drafted)
            draft_s, verify_s = round_.prices.decode_s(
                drafted if runs else None, round_.context, total_context, verified, share
            )
            return Played(
                drafted=drafted,
                accepted=accepted,
                emitted=emitted,
                draft_s=draft_s,
                verify_s=verify_s,
                seconds=draft_s + verify_s,
                verified_tokens=tokens,
            )
        whole = np.full(round_.active, ahead, dtype=np.int64)
        whole = whole if proposals is None else np.minimum(whole, proposals)
        share = None if shapes is None or places is None else shapes.shares(places, whole)
        draft_s, verify_s = round_.prices.partly_verified_s(whole, verified, round_.context, total_context, share)
        extra = {"drafted_ahead": float(whole.sum())}
        return Played(
            drafted=drafted,
            accepted=accepted,
            emitted=emitted,
            draft_s=draft_s,
            verify_s=verify_s,
            seconds=draft_s + verify_s,
            verified_tokens=tokens,
            extra=extra,
        )


def _play_tree(round_: Round, left: Ints, tree: Tree, replay: Replay) -> Played:
    """Play a round in which every slot drafts and verifies `tree`; `drafted` counts nodes."""
    accepted = np.minimum(tree.accepted(replay.positions(round_.cursor)), left)
    emitted = np.minimum(accepted + 1, left)
    drafted = np.full(round_.active, tree.nodes, dtype=np.int64)
    draft_s, verify_s, outside = tree.seconds(round_.prices, round_.active, int(round_.context.sum()))
    round_.prices.extrapolated_iterations += outside
    tokens = round_.active * (tree.nodes + 1)
    return Played(
        drafted=drafted,
        accepted=accepted,
        emitted=emitted,
        draft_s=draft_s,
        verify_s=verify_s,
        seconds=draft_s + verify_s,
        verified_tokens=tokens,
    )


def verify_seconds(round_: Round, drafted_tokens: Ints) -> Floats:
    """Give overhead, prefill and verification, where `drafted_tokens` (any shape) are verified beside the batch.

    Padded to captured batch sizes as the engine pads; prefill chunks cost what `Prices.added_prefill_s` says.
    """
    prices, tokens = round_.prices, round_.active + drafted_tokens
    if prices.capture_sizes:
        sizes = np.array(prices.capture_sizes)
        place = np.searchsorted(sizes, tokens)
        tokens = np.where(place < len(sizes), sizes[np.minimum(place, len(sizes) - 1)], tokens)
    seconds = prices.verify.step_seconds(round_.active, tokens, int(round_.context.sum())) + prices.overhead_s
    if round_.batch_tokens:
        prefill = prices.prefill.step_seconds
        seconds = seconds + float(prefill(1, round_.batch_tokens, 0)) - float(prefill(1, 0, 0))
    return np.asarray(seconds, dtype=np.float64)


def draft_seconds(prices: Prices, context: Ints, lengths: Ints, verify_s: Floats) -> Floats:
    """Give the drafting of min(lengths, L) tokens per slot for L = 0, 1, .. max(lengths), in lock step.

    `verify_s` (as long): verification in each case, of which some drafters are said to take a fraction.
    """
    longest = int(lengths.max())
    draft = prices.draft
    if draft is None:
        return np.zeros(longest + 1)
    if isinstance(draft, DraftFraction):
        return np.asarray(draft.seconds(lengths, context, 1.0)[0] * verify_s * (np.arange(longest + 1) > 0))
    at_least = len(lengths) - np.bincount(lengths, minlength=longest + 1).cumsum()[:longest]
    if isinstance(draft, DraftPerStep):
        done = np.bincount(lengths, weights=context, minlength=longest + 1).cumsum()[:longest]
        cached = context.sum() - done + np.arange(longest) * at_least
        steps = draft.step.step_seconds(at_least, at_least, cached)
        return np.concatenate(([0.0], np.cumsum(steps)))
    new = np.concatenate(([0], np.cumsum(at_least))) if draft.tokens else np.full(longest + 1, len(lengths))
    seconds = np.asarray(draft.step.step_seconds(len(lengths), new, int(context.sum())), dtype=np.float64)
    return np.where(np.arange(longest + 1) > 0, seconds, 0.0)  # asked for nothing, the drafter does not run


def capped_seconds(round_: Round, lengths: Ints) -> Floats:
    """Give the seconds of this round if slot i drafted min(lengths_i, L) tokens, for L = 0, 1, .. max(lengths)."""
    longest = int(lengths.max())
    at_least = len(lengths) - np.bincount(lengths, minlength=longest + 1).cumsum()[:longest]
    verify_s = verify_seconds(round_, np.concatenate(([0], np.cumsum(at_least))))
    return verify_s + draft_seconds(round_.prices, round_.context, lengths, verify_s - round_.prices.overhead_s)


def even_seconds(round_: Round, longest: int) -> Floats:
    """Give the seconds of this round if every slot drafted k tokens, for k = 0 .. `longest`."""
    return capped_seconds(round_, np.full(round_.active, longest, dtype=np.int64))


_BLOCK = 1 << 15
"""Accepted lengths that are counted at once."""


class Columns:
    """Named columns that grow row by row.

    NOTE: `array.array`, not a numpy table or a list of rows: an append costs 40 ns and 8 bytes a value; assigning a
    row of a numpy table costs over a microsecond, and a row of Python objects takes ten times the memory.
    """

    def __init__(self, **types: str) -> None:
        self._arrays = {name: array(code) for name, code in types.items()}
        self._appends: dict[str, Callable[[Any], None]] = {name: c.append for name, c in self._arrays.items()}

    def add(self, **row: float) -> None:
        """Append one row: a value for every column."""
        if len(row) != len(self._appends):
            raise TypeError(f"a row must have the columns {', '.join(self._appends)}, got {', '.join(row)}")
        for name, value in row.items():
            self._appends[name](value)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Give one column as a numpy array: a view, so that no row may be added while it lives."""
        column = self._arrays[name]
        dtype = np.float64 if column.typecode == "d" else np.int64
        return np.frombuffer(column, dtype) if len(column) else np.zeros(0, dtype)

    def all(self) -> dict[str, NDArray[Any]]:
        """Give all columns."""
        return {name: self[name] for name in self._arrays}


class AcceptanceCounts:
    """How many rounds of a slot accepted 0, 1, 2 ... drafted tokens (bonus excluded), counted in blocks."""

    def __init__(self) -> None:
        self._counts: Ints = np.zeros(1, dtype=np.int64)
        self._blocks: list[Ints] = []
        self._pending = 0

    def add(self, accepted: Ints) -> None:
        """Count one round of each slot."""
        self._blocks.append(accepted)
        self._pending += len(accepted)
        if self._pending > _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._blocks:
            fresh = np.bincount(np.concatenate(self._blocks), minlength=len(self._counts))
            fresh[: len(self._counts)] += self._counts
            self._counts, self._blocks, self._pending = fresh, [], 0

    def by_length(self) -> Ints:
        """Give the number of rounds per accepted length."""
        self._flush()
        return self._counts


@dataclass(slots=True)
class Counters:
    """What a scheduler counts: preemptions, tokens computed again or swapped out, and prefix cache use in tokens.

    `prefix_queries` and `prefix_hits` count prompts when they are first admitted.
    """

    preemptions: int = 0
    recomputed_tokens: int = 0
    swapped_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


PREFILL, DECODE, MIXED = range(3)
"""Kinds of iterations."""


class RunLog:
    """Everything that one replica notes, in the order in which it happened."""

    def __init__(self) -> None:
        self.rounds = 0
        """Decode iterations so far."""
        self.drafts = 0
        """Rounds of a slot in which at least one token was drafted."""
        self.accepted = AcceptanceCounts()
        self.drafted_tokens = 0
        """Tokens that drafters wrote, with those that were never verified."""
        self.beside_s: dict[str, float] = {}
        """Seconds of rounds that are neither drafting nor verification (a link, say), by name."""
        self.iterations = Columns(
            kind="q",
            start_s="d",
            duration_s="d",
            active="q",
            waiting="q",
            drafted_tokens="q",
            accepted_tokens="q",
            emitted_tokens="q",
            context_tokens="q",
            draft_s="d",
            verify_s="d",
            prefill_s="d",
            prefill_tokens="q",
            swap_s="d",
            kv_blocks="q",
        )
        self.spans = Columns(
            request_id="q",
            counted="q",
            first_round="q",
            last_round="q",
            previous_s="d",
            began_s="d",
        )
        """Stretches of rounds without a gap in which a request decoded; one for a request that is never preempted.

        `began_s`: its emission before the first of these rounds; `previous_s`: the one before that where it lies
        in another stretch, else missing.
        """
        self.requests = Columns(
            request_id="q",
            sequence="q",
            counted="q",
            arrival_s="d",
            start_s="d",
            first_token_s="d",
            finish_s="d",
            prompt_tokens="q",
            output_tokens="q",
            drafted_tokens="q",
            accepted_tokens="q",
            prefill_share_s="d",
            preemptions="q",
            requeues="q",
            cached_tokens="q",
        )

    def beside(self, played: Played, verified_drafts: int) -> None:
        """Note what a placement did beside drafting and verifying `verified_drafts` drafted tokens."""
        self.drafted_tokens += int(played.extra.get("drafted_ahead", verified_drafts))
        for name, value in played.extra.items():
            if name.endswith("_s"):
                self.beside_s[name] = self.beside_s.get(name, 0.0) + value

    def acceptance(self, drafted: Ints, accepted: Ints) -> None:
        """Note how many tokens each slot drafted and got accepted in a round."""
        tried = int(np.count_nonzero(drafted))
        if tried:
            self.drafts += tried
            self.accepted.add(accepted)
