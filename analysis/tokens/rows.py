"""One row per drafted token that was compared: what the drafter felt, where it stood, and whether it was accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.random import Generator
from numpy.typing import NDArray

from analysis.common.rounds import Recording, recording
from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ReplayError, ReportError
from calibration.traces import TraceSet

NUMERIC = ("confidence", "entropy", "ln position", "depth")
"""Continuous features, in the order of `TokenRows.numeric`: probability of the drafter's most likely token; entropy
in nats; ln of the position in the output; depth in the draft, whose first token has depth 1."""


@dataclass(frozen=True)
class TokenRows:
    """Drafted tokens that were compared, that is whose predecessors in the draft had all been accepted.

    ``accepted`` (n); ``numeric`` (n, 4), columns as in `NUMERIC`; ``drafter``, ``prompt`` and ``domain`` (n) are
    indices into the names. ``position`` (n) is where in the output the token would stand. ``skipped`` tells of
    drafters without rows and why.
    """

    accepted: NDArray[np.bool_]
    numeric: Floats
    position: Ints
    drafter: Ints
    prompt: Ints
    domain: Ints
    drafters: tuple[str, ...]
    prompts: tuple[str, ...]
    domains: tuple[str, ...]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.accepted)

    def take(self, rows: NDArray[Any]) -> TokenRows:
        """Give some of the rows, by index or mask."""
        picked = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return TokenRows(**picked, **{name: getattr(self, name) for name in _NAMES})

    def thinned(self, most: int, rng: Generator) -> TokenRows:
        """Give at most `most` rows, the same share of every prompt's, drawn at random and in their order."""
        if len(self) <= most:
            return self
        order = rng.permutation(len(self))
        order = order[np.argsort(self.prompt[order], kind="stable")]
        counts = np.bincount(self.prompt)
        rank = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)
        share = rank < np.repeat(np.floor(counts * (most / len(self))), counts)
        return self.take(np.sort(order[share]))


_COLUMNS = ("accepted", "numeric", "position", "drafter", "prompt", "domain")
_NAMES = ("drafters", "prompts", "domains", "skipped")


def token_rows(traces: TraceSet, draft_tokens: int, *, seed: int = 0) -> TokenRows:
    """Give the drafted tokens of rounds that draft `draft_tokens` from position 1 on, for every drafter that feels.

    Exact for greedy traces; of sampled ones each token is accepted by a coin with its recorded probability (`seed`),
    exact in distribution. A drafter that sees tokens alone feels at depth j what is recorded at that position; one
    with a state of its own (its run lengths disagree) needs rollouts, and its rows are those of rounds that begin
    where one was recorded. Drafters without confidence are skipped. Raises `ReportError` where no row is left.
    """
    rng = np.random.default_rng(seed)
    found: list[dict[str, NDArray[Any]]] = []
    skipped = []
    for index, name in enumerate(traces.manifest.drafter_names):
        try:
            rows = _of_drafter(traces, name, draft_tokens, rng)
        except ReplayError as fault:
            skipped.append(f"{name}: {fault}")
            continue
        if len(rows["accepted"]) == 0:
            skipped.append(f"{name}: no confidence and entropy were recorded")
            continue
        rows["drafter"] = np.full(len(rows["accepted"]), index, dtype=np.int64)
        found.append(rows)
    if not found:
        raise ReportError("token regression: needs drafters with recorded confidence and entropy, got none")
    joined = {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}
    labels = traces.sequences["domain"].to_pylist()
    domains = tuple(sorted(set(labels)))
    place = np.array([domains.index(label) for label in labels], dtype=np.int64)
    return TokenRows(
        accepted=joined["accepted"],
        numeric=np.stack(
            [joined["confidence"], joined["entropy"], np.log(joined["position"]), joined["depth"]], axis=1
        ).astype(np.float64),
        position=joined["position"],
        drafter=joined["drafter"],
        prompt=joined["prompt"],
        domain=place[joined["prompt"]],
        drafters=tuple(traces.manifest.drafter_names),
        prompts=tuple(traces.sequences["sequence_id"].to_pylist()),
        domains=domains,
        skipped=tuple(skipped),
    )


def _of_drafter(traces: TraceSet, name: str, k: int, rng: Generator) -> dict[str, NDArray[Any]]:
    """Rows of one drafter; those without a recorded feeling are left out."""
    recorded = recording(traces, name)
    limit = recorded.max_draft_tokens
    runs = _run_lengths(recorded, rng)
    starts, prompts, depths, accepted = _rounds(recorded, runs, k if limit is None else min(k, limit))
    positions = starts + depths - 1
    if sees_tokens_alone(recorded):
        confidence, entropy = (
            _at_positions(traces, name, recorded, column)[positions, prompts]
            for column in ("drafter_confidence", "drafter_entropy")
        )
    else:
        confidence, entropy = _from_rollouts(traces, name, starts, prompts, depths)
    felt = np.isfinite(confidence) & np.isfinite(entropy)
    return {
        "accepted": accepted[felt],
        "confidence": confidence[felt],
        "entropy": entropy[felt],
        "position": positions[felt],
        "depth": depths[felt],
        "prompt": prompts[felt],
    }


def sees_tokens_alone(recorded: Recording) -> bool:
    """Tell whether the recorded run lengths are those of a drafter without a state of its own.

    Then a run of n from t leaves one of n - 1 from t + 1. Sampled recordings hold no run lengths and are taken to be.
    """
    runs = recorded.run_length
    if runs is None:
        return True
    limit = recorded.max_draft_tokens or np.iinfo(np.int32).max
    inside = recorded.startable[:-1] & recorded.startable[1:] & (runs[:-1] > 0) & (runs[:-1] < limit)
    return bool(np.all(runs[1:][inside] == runs[:-1][inside] - 1))


def _run_lengths(recorded: Recording, rng: Generator) -> NDArray[np.int32]:
    """Recorded run lengths, or runs of coins with the recorded probabilities: shape (positions, sequences)."""
    if recorded.run_length is not None:
        return recorded.run_length
    assert recorded.accept is not None
    hit = rng.random(recorded.accept.shape) < recorded.accept
    runs = np.zeros(hit.shape, dtype=np.int32)
    following = np.zeros(hit.shape[1], dtype=np.int32)
    for t in range(len(hit) - 1, -1, -1):
        following = np.where(hit[t], following + 1, 0).astype(np.int32)
        runs[t] = following
    return runs


def _rounds(recorded: Recording, runs: NDArray[np.int32], k: int) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
    """Start, sequence, depth and fate of every compared token; the end of the text cuts drafts short (censored)."""
    startable = recorded.startable
    starts, sequences, depths, fates = [], [], [], []
    for s in range(runs.shape[1]):
        t, end = int(recorded.first[s]), int(recorded.end[s])
        while t < end:
            if not startable[t, s]:
                break
            drafted = min(k, int(recorded.proposal[t, s]), int(recorded.output_tokens[s]) - t)
            taken = min(int(runs[t, s]), drafted)
            for depth in range(1, min(taken + 1, drafted) + 1):
                starts.append(t)
                sequences.append(s)
                depths.append(depth)
                fates.append(depth <= taken)
            t += taken + 1
    return (
        np.array(starts, dtype=np.int64),
        np.array(sequences, dtype=np.int64),
        np.array(depths, dtype=np.int64),
        np.array(fates, dtype=bool),
    )


def _at_positions(traces: TraceSet, name: str, recorded: Recording, column: str) -> Floats:
    """A column of the positions by (position, sequence), NaN where not recorded."""
    rows = traces.positions.filter(pc.equal(traces.positions["drafter"], name))
    out = np.full((recorded.proposal.shape[0] + 1, recorded.proposal.shape[1]), np.nan)
    out[_numbers(rows["position"]), _sequence_of(traces, rows)] = _numbers(rows[column], np.float64)
    return out


def _from_rollouts(traces: TraceSet, name: str, starts: Ints, prompts: Ints, depths: Ints) -> tuple[Floats, Floats]:
    """Confidence and entropy at each depth of the draft from each start, NaN where no rollout was recorded."""
    rows = traces.rollouts.filter(pc.equal(traces.rollouts["drafter"], name))
    if rows.num_rows == 0:
        return np.full(len(starts), np.nan), np.full(len(starts), np.nan)
    keys = zip(
        _sequence_of(traces, rows).tolist(),
        _numbers(rows["position"]).tolist(),
        _numbers(rows["step"]).tolist(),
        strict=True,
    )
    where = {key: i for i, key in enumerate(keys)}
    asked = zip(prompts.tolist(), starts.tolist(), depths.tolist(), strict=True)
    index = np.array([where.get(key, -1) for key in asked], dtype=np.int64)
    felt = [
        np.where(index >= 0, _numbers(rows[column], np.float64)[index], np.nan)
        for column in ("drafter_confidence", "drafter_entropy")
    ]
    return felt[0], felt[1]


def _sequence_of(traces: TraceSet, rows: Any) -> Ints:
    ids = traces.sequences["sequence_id"].combine_chunks()
    return _numbers(pc.index_in(rows["sequence_id"], value_set=ids))


def _numbers(column: Any, kind: type[Any] = np.int64) -> NDArray[Any]:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=kind)
