"""Replay: answer, from a TraceSet, how many drafted tokens are accepted in a round started at a position.

A TraceSet is compiled once per drafter into flat arrays, so that a batch is answered by one `take`. A sequence owns
a stretch of the arrays; *cursor* = start of its stretch + t, where t is the number of output tokens known.

Outputs longer than their recording, continued by blocks of recorded positions.

A trajectory of T recorded positions that is wanted longer goes on with blocks of consecutive positions, drawn from
all sequences of the same domain that were recorded with the same drafter: the moving-block bootstrap (Kuensch 1989;
Liu and Singh 1992). Within a block, neighbouring positions stay together, so acceptance keeps its autocorrelation.

This is an **approximation**. At a seam between blocks

- a recorded run length is *kept*, also where it reaches over the seam: the tokens that it stands for were accepted
  after that very context. Cutting runs at seams would lower acceptance by one cut run a block; keeping them leaves
  the law of a single round as recorded. The next round starts inside the next block, as far in as the run reached.
- acceptance probabilities (sampled traces) are those of the positions, one by one, so a run goes on over the seam.

Only the end of the recording itself still cuts the run that reaches it, once a request. Blocks begin at t = 1 at the
earliest (prefill emits x_0) and have as many recorded positions again behind them where the domain has such
sequences, so that no run in them is cut by the end of a recording unless it is longer than a block.

Room for the trajectories of live requests: stretches of growing arrays, handed out and taken back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import DrafterInfo, TraceSet
from simulator.playback.draft_shapes import SHAPE_COLUMNS, DraftShapes, compile_shapes
from simulator.scenario.workload import BLOCK_TOKENS

_BLOCKS = 7
"""Top word of the Philox counter: keeps these draws apart from the luck of the same request."""


class BlockPool:
    """Blocks of recorded positions of one domain. `block` positions each; every possible start is equally likely.

    `starts` and `lengths` are the stretches of its sequences in the compiled arrays.
    """

    def __init__(self, domain: str, starts: Ints, lengths: Ints, block: int) -> None:
        self.block, room = _fit(lengths, block)
        if self.block < 1:
            raise ReplayError(
                f"traces: domain '{domain}': must have a sequence of at least 2 output tokens to continue longer "
                f"outputs with, got at most {int(lengths.max())}"
            )
        choices = np.maximum(lengths - room, 0)
        self._ends = np.cumsum(choices)
        # Choice c of sequence i is position 1 + c - (choices before i).
        self._shift = starts + 1 - (self._ends - choices)

    def positions(self, number: int, rng: np.random.Generator) -> Ints:
        """Give `number` positions (indices into the compiled arrays): blocks one after another, the last one cut."""
        blocks = -(-number // self.block)
        choice = rng.integers(0, self._ends[-1], blocks)
        first = choice + self._shift[np.searchsorted(self._ends, choice, side="right")]
        blocks_of: Ints = first[:, None] + np.arange(self.block)
        return blocks_of.ravel()[:number]


def _fit(lengths: Ints, block: int) -> tuple[int, int]:
    """Give (positions of a block, positions of a sequence that cannot be a start).

    A start t of a sequence of T positions needs t >= 1 and t + block + margin <= T.
    """
    longest = int(lengths.max())
    for margin in (block, 0):
        if longest >= 1 + block + margin:
            return block, block + margin
    return longest - 1, longest - 1


class Continuation:
    """Continues trajectories beyond their recording, by blocks of the same domain. See the module: an approximation.

    The positions depend on seed and request alone: policies that are compared share them.
    """

    def __init__(self, domains: Sequence[str], starts: Ints, lengths: Ints, block: int, seed: int) -> None:
        self._domains, self._starts, self._lengths = domains, starts, lengths
        self._block, self._seed = block, seed
        self._recorded: list[int] = lengths.tolist()
        self._pools: dict[str, BlockPool] = {}
        self.longest = max(self._recorded)

    def recorded(self, sequence: int) -> int:
        """Give how many output tokens of `sequence` are recorded."""
        return self._recorded[sequence]

    def trajectory(self, sequence: int, request: int, length: int) -> Ints:
        """Give the positions (indices into the compiled arrays) that answer for `length` output tokens."""
        start, recorded = int(self._starts[sequence]), self._recorded[sequence]
        if length <= recorded:
            return np.arange(start, start + length)
        key = np.array([self._seed, request], dtype=np.uint64)
        counter = np.array([0, 0, 0, _BLOCKS], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        more = self._pool(self._domains[sequence]).positions(length - recorded, rng)
        return np.concatenate((np.arange(start, start + recorded), more))

    def _pool(self, domain: str) -> BlockPool:
        if domain not in self._pools:
            own = np.flatnonzero([name == domain for name in self._domains])
            self._pools[domain] = BlockPool(domain, self._starts[own], self._lengths[own], self._block)
        return self._pools[domain]


class Stretches:
    """Hands out stretches from index `first` on, in sizes of 2^k, and reuses those given back.

    So memory follows the requests that are live at once, not those that have ended.
    """

    def __init__(self, first: int) -> None:
        self._first = self.end = first
        """`end`: how long an array must be to hold every stretch."""
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._taken: dict[int, int] = {}

    def take(self, length: int) -> int:
        """Give the start of a stretch of at least `length`."""
        size = 1 << (length - 1).bit_length()
        if self._free[size]:
            start = self._free[size].pop()
        else:
            start = self.end
            self.end += size
        self._taken[start] = size
        return start

    def give(self, start: int) -> None:
        """Take back the stretch at `start`; one before the first is nobody's to give."""
        if start >= self._first:
            self._free[self._taken.pop(start)].append(start)

    def fit(self, array: Ints) -> Ints:
        """Give `array`, or a longer one that begins with it, so that every stretch is in it."""
        if len(array) >= self.end:
            return array
        # NOTE: grown by half at least, so that copying stays linear in all.
        longer = np.zeros(max(self.end, len(array) * 3 // 2), dtype=np.int64)
        longer[: len(array)] = array
        return longer


COLUMNS = ("run_length", "accept_probability", "proposal_length")
"""What replay reads of positions.parquet."""
UNLIMITED = 2**31
"""Proposal length of a drafter that always proposes as many tokens as asked."""


@dataclass(frozen=True)
class SequenceTable:
    """The sequences that a simulation may serve, in the order of the TraceSet; counts in tokens."""

    ids: tuple[str, ...]
    domains: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]

    def __len__(self) -> int:
        """Give the number of sequences."""
        return len(self.ids)


def select_sequences(
    traces: TraceSet, *, domains: Sequence[str] | None = None, drafter: str | Sequence[str] | None = None
) -> SequenceTable:
    """Give the sequences of `domains` (default all) that were recorded with `drafter` (default: any or none).

    Of several drafters: recorded with each of them.

    Raises `ReplayError` where none is left.
    """
    table = traces.sequences
    keep = np.ones(table.num_rows, dtype=bool)
    if domains is not None:
        keep &= pc.is_in(table["domain"], value_set=pa.array(domains)).to_numpy(zero_copy_only=False)
    names = (drafter,) if isinstance(drafter, str) else tuple(drafter or ())
    for name in names:
        positions = traces.positions
        recorded = pc.unique(positions["sequence_id"].filter(pc.equal(positions["drafter"], name)))
        keep &= pc.is_in(table["sequence_id"], value_set=recorded).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(keep)
    if len(rows) == 0:
        wanted = f"domains {list(domains)}" if domains is not None else "any domain"
        recorders = " and ".join(f"'{name}'" for name in names) or "'None'"
        raise ReplayError(f"traces: no sequence of {wanted} was recorded with drafter {recorders}")
    chosen = table.take(rows)
    return SequenceTable(
        ids=tuple(chosen["sequence_id"].to_pylist()),
        domains=tuple(chosen["domain"].to_pylist()),
        prompt_tokens=tuple(chosen["prompt_tokens"].to_pylist()),
        output_tokens=tuple(chosen["output_tokens"].to_pylist()),
    )


class Replay(Protocol):
    """What the engine asks. `run_length` excludes the bonus token; both arrays are indexed by cursor.

    `proposal_length` is None where the drafter always proposes as many tokens as asked, `shapes` where its drafts are
    chains whose tokens all cost the same.
    """

    run_length: Ints
    proposal_length: Ints | None
    shapes: DraftShapes | None
    """NOTE: `open` may put longer arrays in their places; do not keep hold of one."""

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Give the start of the stretch that answers for `request`, which replays `sequence`.

        `output_tokens` beyond the recording are answered by blocks of its domain, an approximation: see
        `simulator.playback.replay`.
        """
        ...

    def close(self, start: int) -> None:
        """Say that the request whose stretch begins at `start` has ended."""
        ...

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions (indices into arrays compiled by sequence) that answer at `cursors`."""
        ...


class RecordedRuns:
    """Replay of recorded run lengths: exact, round by round, for any draft length, batch and schedule.

    A request that wants more tokens than recorded gets a stretch of its own for as long as it lives.
    """

    def __init__(
        self,
        starts: Ints,
        run_length: Ints,
        proposal_length: Ints | None,
        continuation: Continuation,
        shapes: DraftShapes | None = None,
    ) -> None:
        self._starts: list[int] = starts.tolist()
        self._continuation = continuation
        self._recorded = len(run_length)
        self._room = Stretches(self._recorded)
        self._origin = np.arange(self._recorded)
        self.run_length = run_length
        self.proposal_length = proposal_length
        self.shapes = shapes

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Give the stretch of `sequence`, which all its requests share, or one for a longer output."""
        if output_tokens is None or output_tokens <= self._continuation.recorded(sequence):
            return self._starts[sequence]
        where = self._continuation.trajectory(sequence, request, output_tokens)
        start = self._room.take(output_tokens)
        stretch = slice(start, start + output_tokens)
        self.run_length, self._origin = self._room.fit(self.run_length), self._room.fit(self._origin)
        self.run_length[stretch] = self.run_length[where]
        self._origin[stretch] = where
        if self.proposal_length is not None:
            self.proposal_length = self._room.fit(self.proposal_length)
            self.proposal_length[stretch] = self.proposal_length[where]
        return start

    def close(self, start: int) -> None:
        """Take a stretch of its own back."""
        self._room.give(start)

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`."""
        return self._origin[cursors]


class DrawnRuns:
    """Replay of recorded acceptance probabilities: exact in distribution for speculative sampling.

    Every request draws one uniform number u_i per output token i; a token drafted at i is accepted iff u_i < a_i,
    and a run goes on until the first that is not. A run consults each token at most once (the token after a
    rejection is emitted, not drafted), so the draws are the independent ones that the theory asks for. The numbers
    depend on seed and request alone: all policies share their random numbers.

    a_i = min(1, q_i(x_i) / p_i(x_i)); Leviathan et al. 2023 and Chen et al. 2023, conditioned on the emitted token.
    """

    def __init__(
        self,
        probability: Floats,
        proposal_length: Ints | None,
        continuation: Continuation,
        slots: int,
        seed: int,
        shapes: DraftShapes | None = None,
    ) -> None:
        self._probability, self._proposals = probability, proposal_length
        self._continuation, self._seed = continuation, seed
        self._room = Stretches(0)
        room = slots * continuation.longest
        self._origin = np.zeros(room, dtype=np.int64)
        self.run_length = np.zeros(room, dtype=np.int64)
        self.proposal_length = None if proposal_length is None else np.zeros(room, dtype=np.int64)
        self.shapes = shapes

    def open(self, sequence: int, request: int, output_tokens: int | None = None) -> int:
        """Draw the luck of `request` into a free stretch."""
        length = max(output_tokens or 0, self._continuation.recorded(sequence))
        where = self._continuation.trajectory(sequence, request, length)
        start = self._room.take(length)
        stretch = slice(start, start + length)
        self.run_length, self._origin = self._room.fit(self.run_length), self._room.fit(self._origin)
        # A counter-based generator: the numbers of a request do not depend on who else was served, or when.
        key = np.array([self._seed, request], dtype=np.uint64)
        luck = np.random.Generator(np.random.Philox(key=key)).random(length)
        runs = runs_of(luck < self._probability[where])
        if self.proposal_length is not None and self._proposals is not None:
            self.proposal_length = self._room.fit(self.proposal_length)
            self.proposal_length[stretch] = self._proposals[where]
            # Acceptance beyond what the drafter proposes there was never put to the test.
            np.minimum(runs, self._proposals[where], out=runs)
        self.run_length[stretch], self._origin[stretch] = runs, where
        return start

    def close(self, start: int) -> None:
        """Take the stretch back."""
        self._room.give(start)

    def positions(self, cursors: Ints) -> Ints:
        """Give the recorded positions that answer at `cursors`."""
        return self._origin[cursors]


def runs_of(match: NDArray[np.bool_]) -> Ints:
    """Give, for every position, how many true values follow from there on."""
    # The run at a position ends at the first miss from there on; the end of the text counts as one.
    index = np.arange(len(match))
    misses = np.append(np.flatnonzero(~match), len(match))
    return misses[np.searchsorted(misses, index)] - index


def compile_replay(
    traces: TraceSet,
    drafter: str,
    sequences: SequenceTable,
    *,
    slots: int,
    seed: int,
    longest_draft: int | None,
    block_tokens: int = BLOCK_TOKENS,
) -> Replay:
    """Compile the positions of `drafter` for `sequences`.

    `slots`: live requests that room is made for at first. `longest_draft`: the most tokens that the policy will ask
    for (None: only as many as will be accepted). `block_tokens`: positions of a block that continues an output.
    Raises `ReplayError`, with sequence and position, where a round could start (t = 1 .. T-1) and nothing was
    recorded, and where `longest_draft` goes beyond what the recording can tell.
    """
    info = traces.manifest.drafter(drafter)
    wanted = traces.positions.select(["sequence_id", "position", *COLUMNS, *SHAPE_COLUMNS])
    table = wanted.filter(pc.equal(traces.positions["drafter"], drafter))
    lengths = np.array(sequences.output_tokens, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    code = pc.index_in(table["sequence_id"], value_set=pa.array(sequences.ids))
    table = table.filter(pc.is_valid(code))
    owner = code.drop_null().to_numpy().astype(np.int64)
    cursor = starts[owner] + table["position"].to_numpy()

    def column(name: str) -> Floats:
        flat = np.full(int(lengths.sum()), np.nan)
        flat[cursor] = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        return flat

    runs, probability, proposals = (column(name) for name in COLUMNS)
    # Whole run lengths answer exactly; where one is missing, acceptance is drawn from probabilities for all alike.
    needed = np.ones(len(runs), dtype=bool)
    needed[starts] = False  # prefill emits the first token
    _check_cap(info, longest_draft, bool(np.isnan(proposals[needed]).any()))
    limits = None if np.isnan(proposals).all() else _whole(proposals, UNLIMITED)
    continuation = Continuation(sequences.domains, starts, lengths, block_tokens, seed)
    shapes = compile_shapes(info, table, cursor, len(runs))
    if not np.isnan(runs[needed]).any():
        return RecordedRuns(starts, _whole(runs, 0), limits, continuation, shapes)
    missing = needed & np.isnan(probability if traces.manifest.decoding.mode == "sampled" else runs)
    if missing.any():
        raise ReplayError(_hole(info, sequences, starts, int(np.argmax(missing)), traces.manifest.decoding.mode))
    return DrawnRuns(np.nan_to_num(probability), limits, continuation, slots, seed, shapes)


def _whole(values: Floats, missing: int) -> Ints:
    return np.where(np.isnan(values), missing, values).astype(np.int64)


def _check_cap(info: DrafterInfo, longest_draft: int | None, open_ended: bool) -> None:
    """Refuse draft lengths beyond a cap on run lengths, unless the drafter itself proposes no more than that."""
    cap = info.max_draft_tokens
    if cap is None or longest_draft is None or longest_draft <= cap or not open_ended:
        return
    raise ReplayError(
        f"stopping.draft_tokens: must be at most {cap}, where the run lengths of drafter '{info.name}' were cut, "
        f"got {longest_draft}"
    )


def _hole(info: DrafterInfo, sequences: SequenceTable, starts: Ints, cursor: int, mode: str) -> str:
    owner = int(np.searchsorted(starts, cursor, side="right")) - 1
    column = "accept_probability" if mode == "sampled" else "run_length"
    return (
        f"positions.parquet: column '{column}': must be recorded for drafter '{info.name}', sequence "
        f"'{sequences.ids[owner]}', position {cursor - int(starts[owner])}, where a draft can start; it is missing"
    )
