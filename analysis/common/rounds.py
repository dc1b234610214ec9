"""Speculative rounds of one fixed draft length, replayed along recorded trajectories.

A request's first round starts at position 1 (prefill emits x_0); a round at t that drafts k accepts
min(n_t, proposal_t, k) tokens and the next one starts at t + accepted + 1. Greedy and one-hot drafters replay
exactly. Model drafters of sampled traces replay exactly in distribution: the token drafted at t + j is accepted
with probability a_{t+j}, independently, so the expectations over those draws are computed outright, by summing
over the positions where a round can start. The acceptance that a lone request sees depends on neither batch nor
cost, so no simulation is needed here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError
from calibration.traces import TraceSet

_UNLIMITED = 1 << 30
_BLOCK_ELEMENTS = 4_000_000
"""Sequences are replayed in blocks of about so many (draft depth, position, sequence) cells: 32 MB an array."""


@dataclass(frozen=True)
class Recording:
    """What one drafter did on every sequence: arrays of shape (positions, sequences), padded at the end.

    ``first`` and ``end`` bound the positions where a round may start. Either ``run_length`` or ``accept`` tells
    how drafts fare (see the module); ``match`` is P(a token drafted at t is accepted), 0 where nothing is
    proposed; ``overlap`` is NaN where not recorded. ``output_tokens`` is how far the text is known to drafts:
    its length, or the last recorded position where acceptance is recorded position by position.
    """

    drafter: str
    domains: tuple[str, ...]
    output_tokens: Ints
    first: Ints
    end: Ints
    run_length: NDArray[np.int32] | None
    accept: NDArray[np.float32] | None
    proposal: NDArray[np.int32]
    match: NDArray[np.float32]
    overlap: NDArray[np.float32]
    max_draft_tokens: int | None

    @property
    def startable(self) -> NDArray[np.bool_]:
        """Where a round may start."""
        t = np.arange(len(self.proposal))[:, None]
        return (t >= self.first) & (t < self.end)

    def part(self, columns: Ints) -> Recording:
        """Give some of the sequences, without the padding that they do not need."""
        rows = int(max(self.output_tokens[columns].max(), self.end[columns].max())) + 1
        trimmed: dict[str, Any] = {}
        for name in ("run_length", "accept", "proposal", "match", "overlap"):
            array = getattr(self, name)
            trimmed[name] = None if array is None else array[:rows, columns]
        return dataclasses.replace(
            self,
            domains=tuple(self.domains[i] for i in columns.tolist()),
            output_tokens=self.output_tokens[columns],
            first=self.first[columns],
            end=self.end[columns],
            **trimmed,
        )


@dataclass(frozen=True)
class RoundSums:
    """Sums over the rounds of draft length k, per sequence (expected sums for sampled model drafters).

    A round is complete when all k drafts and the bonus token fit before the end of the trajectory, whatever
    their fate (t + k < T); only complete rounds enter rates per round, because the end cuts the others short.
    ``at_risk`` and ``accepted_at`` (sequences, k) count, over all rounds, the drafts that were compared at
    depth i = 1..k and those accepted: a draft beyond the end is right-censored, not rejected.
    """

    draft_tokens: int
    rounds: Floats
    drafting_rounds: Floats
    drafted: Floats
    accepted: Floats
    accepted_by_position: Floats
    at_risk: Floats
    accepted_at: Floats


def recording(traces: TraceSet, drafter: str) -> Recording:
    """Arrange the positions of `drafter` by position and sequence.

    Raises `TraceError` for an unknown drafter, `ReplayError` where neither run lengths nor probabilities cover it.
    """
    info = traces.manifest.drafter(drafter)
    rows = traces.positions.filter(pc.equal(traces.positions["drafter"], drafter))
    ids = traces.sequences["sequence_id"]
    column = _ints(pc.index_in(rows["sequence_id"], value_set=ids.combine_chunks()))
    t = _ints(rows["position"])
    tokens = _ints(traces.sequences["output_tokens"])
    shape = (int(tokens.max()) + 1, len(tokens))

    def spread(name: str, missing: float, kind: type[np.generic]) -> NDArray[Any]:
        out = np.full(shape, missing, dtype=kind)
        out[t, column] = np.asarray(pc.fill_null(rows[name].cast(pa.float64()), missing))
        return out

    run_length = accept = None
    if rows["run_length"].null_count == 0:
        run_length = spread("run_length", 0, np.int32)
        match = (run_length > 0).astype(np.float32)
    elif rows["accept_probability"].null_count == 0:
        match = accept = spread("accept_probability", 0.0, np.float32)
    else:
        raise ReplayError(
            f"positions of drafter '{drafter}': every row must hold run_length, or every row accept_probability"
        )
    end = np.zeros(len(tokens), dtype=np.int64)
    np.maximum.at(end, column, t + 1)
    first = np.full(len(tokens), shape[0], dtype=np.int64)
    np.minimum.at(first, column, t)
    return Recording(
        drafter=drafter,
        domains=tuple(traces.sequences["domain"].to_pylist()),
        output_tokens=tokens if accept is None else np.minimum(tokens, end),
        first=np.maximum(first, 1),
        end=end,
        run_length=run_length,
        accept=accept,
        proposal=spread("proposal_length", _UNLIMITED, np.int32),
        match=match,
        overlap=spread("overlap", np.nan, np.float32),
        max_draft_tokens=info.max_draft_tokens,
    )


def replay_rounds(recorded: Recording, draft_tokens: int) -> RoundSums:
    """Replay every sequence in rounds that draft `draft_tokens` tokens, alone, from position 1.

    Raises `ReplayError` when the draft length exceeds what the drafter's run lengths were recorded for.
    """
    k = draft_tokens
    limit = recorded.max_draft_tokens
    if k < 1 or (limit is not None and k > limit):
        raise ReplayError(f"drafter '{recorded.drafter}': draft length must lie in [1, {limit or 'any'}], got {k}")
    # Sequences of like length together: padding to the longest of thousands would take gigabytes.
    order = np.argsort(recorded.output_tokens, kind="stable")
    blocks = np.array_split(order, math.ceil(recorded.proposal.size * (k + 1) / _BLOCK_ELEMENTS))
    parts = [(block, _replay(recorded.part(block), k)) for block in blocks if len(block)]
    gathered = {}
    for field in dataclasses.fields(RoundSums)[1:]:
        joined = np.concatenate([getattr(sums, field.name) for _, sums in parts])
        gathered[field.name] = np.empty_like(joined)
        gathered[field.name][order] = joined
    return RoundSums(k, **gathered)


def _replay(recorded: Recording, k: int) -> RoundSums:
    """Replay sequences that fit into memory together."""
    reach = _reach(recorded, k)
    visits = _visits(recorded, reach)
    t = np.arange(len(visits))[:, None]
    drafted = np.minimum(recorded.proposal, k)
    left = recorded.output_tokens - t
    complete = visits * (left > k)
    compared = np.minimum(drafted, left)
    depths = range(1, k + 1)
    return RoundSums(
        draft_tokens=k,
        rounds=complete.sum(axis=0),
        drafting_rounds=(complete * (drafted > 0)).sum(axis=0),
        drafted=(complete * drafted).sum(axis=0),
        accepted=sum(((complete * reach[i]).sum(axis=0) for i in depths), np.zeros(visits.shape[1])),
        accepted_by_position=np.stack([(complete * reach[i]).sum(axis=0) for i in depths], axis=1),
        at_risk=np.stack([(visits * reach[i - 1] * (compared >= i)).sum(axis=0) for i in depths], axis=1),
        accepted_at=np.stack([(visits * reach[i]).sum(axis=0) for i in depths], axis=1),
    )


def _reach(recorded: Recording, k: int) -> Floats:
    """P(a round at t accepts at least i drafts), i = 0..k: shape (k + 1, positions, sequences)."""
    shape = recorded.proposal.shape
    reach = np.zeros((k + 1, *shape))
    reach[0] = 1.0
    for i in range(1, k + 1):
        if recorded.run_length is not None:
            reach[i] = recorded.run_length >= i
        else:
            assert recorded.accept is not None
            reach[i, : shape[0] - i + 1] = reach[i - 1, : shape[0] - i + 1] * recorded.accept[i - 1 :]
        reach[i] *= recorded.proposal >= i
    return reach


def _visits(recorded: Recording, reach: Floats) -> Floats:
    """P(a round starts at t), shape (positions, sequences): 0 or 1 where the replay is exact."""
    positions, sequences = reach.shape[1:]
    k = len(reach) - 1
    accepts = np.moveaxis(reach - np.concatenate([reach[1:], np.zeros((1, positions, sequences))]), 0, 1).copy()
    visits = np.zeros((positions + k + 1, sequences))
    startable = recorded.startable
    has_start = recorded.first < recorded.end
    visits[recorded.first[has_start], np.flatnonzero(has_start)] = 1.0
    for t in range(positions):
        visits[t] *= startable[t]
        visits[t + 1 : t + k + 2] += visits[t] * accepts[t]
    return visits[:positions]


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)
