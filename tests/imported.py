"""Imported TraceSets replayed by hand: rounds with a given draft length, counted without the simulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.traces import TraceSet


class Walked(NamedTuple):
    """One round of a replay; `whole`: its draft fits before the end of the output, which cuts nothing off."""

    sequence: str
    start: int
    drafted: int
    accepted: int
    whole: bool


def columns(traces: TraceSet) -> Iterator[tuple[str, int, list[int], list[int] | None]]:
    """Give (sequence, output tokens, run lengths, proposal lengths) by position; position 0 is filled with 0."""
    tokens = dict(
        zip(*(traces.sequences[name].to_pylist() for name in ("sequence_id", "output_tokens")), strict=True)
    )
    frame = traces.frame("positions")
    for name, rows in frame.groupby("sequence_id", sort=False):
        assert rows["position"].tolist() == list(range(1, tokens[name]))
        proposals = None if rows["proposal_length"].isna().any() else [0, *rows["proposal_length"].astype(int)]
        yield str(name), tokens[name], [0, *rows["run_length"].astype(int)], proposals


def walk(traces: TraceSet, draft_tokens: int, asked: Mapping[str, Sequence[int]] | None = None) -> list[Walked]:
    """Replay every sequence: drafts of `draft_tokens`, or of the lengths `asked` round by round (the rest: 0)."""
    rounds = []
    for name, total, runs, proposals in columns(traces):
        queue = list(asked[name]) if asked else []
        t = 1
        while t < total:
            drafted = (queue.pop(0) if queue else 0) if asked else draft_tokens
            if proposals is not None:
                drafted = min(drafted, proposals[t])
            accepted = min(runs[t], drafted)
            rounds.append(Walked(name, t, drafted, accepted, t + draft_tokens < total))
            t += accepted + 1
    return rounds


def acceptance(rounds: Sequence[Walked], draft_tokens: int) -> tuple[Any, int]:
    """Give unconditional acceptance by draft position over whole rounds that had a draft, and how many these are."""
    accepted = np.array([one.accepted for one in rounds if one.whole and one.drafted > 0])
    return np.array([(accepted >= j).mean() for j in range(1, draft_tokens + 1)]), len(accepted)


def near(measured: Any, stated: Any, number: int) -> bool:
    """Say whether `measured` shares of `number` draws lie within 4 standard errors of `stated`."""
    stated = np.asarray(stated, dtype=float)
    error = np.sqrt(np.maximum(stated * (1 - stated), 1.0 / number) / number)
    return bool((np.abs(np.asarray(measured) - stated) <= 4 * error).all())
