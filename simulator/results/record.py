"""What the replicas of a run noted, put together: its two tables, and the gaps between emissions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from simulator.playback.replay import SequenceTable
from simulator.results.result import Window
from simulator.rounds.log import PREFILL, Counters, RunLog

KINDS = ("prefill", "decode", "mixed")


class Member(NamedTuple):
    """What one replica of a run leaves behind."""

    name: str
    log: RunLog
    overhead_s: float
    counters: Counters
    num_blocks: int | None = None
    paged: bool = False


class Record:
    """The logs of all replicas of a run. Rounds are numbered on from replica to replica."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        logs = [member.log for member in members]
        self.drafts = sum(log.drafts for log in logs)
        self.requests = _joined([log.requests.all() for log in logs])
        """Columns of the requests that ended, and `member`."""
        stints = [log.stints.all() for log in logs]
        first = 0
        for log, columns in zip(logs, stints, strict=True):
            columns |= {name: columns[name] + first for name in ("first_round", "last_round")}
            first += log.rounds
        self.stints = _joined(stints)
        order = np.argsort(self.requests["request_id"], kind="stable")
        ids = self.requests["request_id"][order]
        at = np.searchsorted(ids, self.stints["request_id"])
        # Fillers may be cut off by the end of the run after they were preempted.
        ended = np.flatnonzero(ids.take(at, mode="clip") == self.stints["request_id"]) if len(ids) else at[:0]
        self.stints = {name: column[ended] for name, column in self.stints.items()}
        self.stints["request"] = order[at[ended]]
        decode = [_decode(log) for log in logs]
        start, duration, active = (np.concatenate(columns) for columns in zip(*decode, strict=True))
        self.round_ends: Floats = start + duration
        self.shares: Floats = np.concatenate(([0.0], np.cumsum(duration / active)))
        """Seconds that a request in all rounds would have, each round shared equally among its slots."""

    def per_request(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum `values`, one for each stint, by request."""
        total = np.zeros(len(self.requests["request_id"]), dtype=values.dtype)
        np.add.at(total, self.stints["request"], values)
        return total

    def accepted_by_length(self) -> Ints:
        """Give the number of rounds of a slot per accepted length."""
        counts = [member.log.accepted.by_length() for member in self.members]
        total = np.zeros(max(len(count) for count in counts), dtype=np.int64)
        for count in counts:
            total[: len(count)] += count
        return total


def _joined(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    sizes = [len(part["request_id"]) for part in parts]
    return joined | {"member": np.repeat(np.arange(len(parts)), sizes)}


def _decode(log: RunLog) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rounds = log.iterations["kind"] != PREFILL
    start, duration, active = (log.iterations[name][rounds] for name in ("start_s", "duration_s", "active"))
    return start, duration, active


def iterations_table(record: Record) -> pa.Table:
    """Give one row per engine iteration, in order of their starts.

    Token counts are sums over the requests in it, contexts those at its start; `prefill_tokens` were computed in
    it, and `prefill_s` of `verify_s` went into them. A kind is prefill, decode, or mixed (both in one step).
    `kv_blocks` are held during it: missing where memory is not paged. `swap_s`: only where requests are swapped.
    """
    parts = []
    for member in record.members:
        kept = member.log.iterations
        rows = len(kept["kind"])
        columns: dict[str, Any] = {
            "kind": pa.array(np.array(KINDS)[kept["kind"]], type=pa.string()),
            **{name: kept[name] for name in ("start_s", "duration_s", "active", "waiting")},
            **{f"{name}_tokens": kept[f"{name}_tokens"] for name in ("drafted", "accepted", "emitted", "context")},
            "draft_s": kept["draft_s"],
            "verify_s": kept["verify_s"],
            "overhead_s": np.full(rows, member.overhead_s),
            "replica": pa.array([member.name] * rows, type=pa.string()),
            "prefill_tokens": kept["prefill_tokens"],
            "prefill_s": kept["prefill_s"],
            "kv_blocks": kept["kv_blocks"] if member.paged else pa.nulls(rows, pa.int64()),
        }
        if any(other.counters.swapped_tokens for other in record.members):
            columns["swap_s"] = kept["swap_s"]
        parts.append(pa.table(columns))
    table = pa.concat_tables(parts)
    if len(parts) > 1:
        table = table.take(np.argsort(table["start_s"].to_numpy(), kind="stable"))
    return table.add_column(0, "iteration", pa.array(np.arange(table.num_rows)))


def requests_table(record: Record, sequences: SequenceTable) -> pa.Table:
    """Give one row per request that ended, in order of submission.

    ``engine_seconds``: every iteration's duration shared equally among the requests it worked on (a prefill works on
    the new ones only), so that the column sums to the busy time of the engines. ``replica`` is where it ended;
    ``cached_tokens`` of its prompt were not computed when it first started.
    """
    kept, stints = record.requests, record.stints
    order = np.argsort(kept["request_id"], kind="stable")
    names = ("arrival_s", "start_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    sequence = kept["sequence"][order].tolist()
    first, last = stints["first_round"], stints["last_round"]
    seconds = kept["prefill_share_s"] + record.per_request(record.shares[last] - record.shares[first])
    replicas = np.array([member.name for member in record.members])
    return pa.table(
        {
            "request_id": kept["request_id"][order],
            "sequence_id": pa.array([sequences.ids[i] for i in sequence], type=pa.string()),
            "domain": pa.array([sequences.domains[i] for i in sequence], type=pa.string()),
            "counted": kept["counted"][order].astype(bool),
            **{name: kept[name][order] for name in names},
            "rounds": record.per_request(last - first)[order],
            "drafted_tokens": kept["drafted_tokens"][order],
            "accepted_tokens": kept["accepted_tokens"][order],
            "engine_seconds": seconds[order],
            "replica": pa.array(replicas[kept["member"][order]], type=pa.string()),
            "preemptions": kept["preemptions"][order],
            "requeues": kept["requeues"][order],
            "cached_tokens": kept["cached_tokens"][order],
        }
    )


def inter_token_latencies(record: Record, window: Window | None = None) -> tuple[Floats, Ints]:
    """Give (gap in seconds, how often it occurred) between emissions of counted requests, those of `window` only.

    The first gap of a stint starts at its own last emission before; all others are the gaps between ends of
    neighbouring rounds, which their slots share. A request that was preempted has one more where its recomputation
    emitted.
    """
    stints = record.stints
    chosen = stints["counted"] == 1
    if window is not None:
        chosen &= window.keeps(stints["request_id"])
    first, last, began, previous = (
        stints[name][chosen] for name in ("first_round", "last_round", "began_s", "previous_s")
    )
    ends = record.round_ends
    some = last > first
    own = ends[first[some]] - began[some]
    # How many chosen stints were in rounds i-1 and i alike: +1 after the first round, -1 after the last one.
    change = np.zeros(len(ends) + 1, dtype=np.int64)
    np.add.at(change, first[some] + 1, 1)
    np.add.at(change, last[some], -1)
    shared = np.cumsum(change)[1 : len(ends)]
    anew = (began - previous)[~np.isnan(previous)]
    gaps = np.concatenate((own, np.diff(ends), anew))
    return gaps, np.concatenate((np.ones(len(own), dtype=np.int64), shared, np.ones(len(anew), dtype=np.int64)))


def longest_gaps(record: Record, request_ids: Ints) -> Floats:
    """Give the longest gap between two emissions of each of `request_ids`, in seconds; 0 where there is none."""
    stints, ends = record.stints, record.round_ends
    first, last = stints["first_round"], stints["last_round"]
    longest = np.nan_to_num(stints["began_s"] - stints["previous_s"])
    some = last > first
    longest[some] = np.maximum(longest[some], ends[first[some]] - stints["began_s"][some])
    several = last - first > 1
    if several.any():
        # Maximum over the gaps first .. last-2 of each stint: every second stretch of a reduceat.
        gaps = np.append(np.diff(ends), 0.0)
        edges = np.stack((first[several], last[several] - 1), axis=1).ravel()
        longest[several] = np.maximum(longest[several], np.maximum.reduceat(gaps, edges)[::2])
    ids = record.requests["request_id"]
    by_request = np.zeros(len(ids))
    np.maximum.at(by_request, stints["request"], longest)
    order = np.argsort(ids)
    return by_request[order[np.searchsorted(ids, request_ids, sorter=order)]]
