"""RunResult: what a simulation gives, in memory and as a folder of files.

The stretch of a run that is measured: warm-up removal.

A run that starts empty (or with a burst) is not in its steady state at first, and what ends then would bias means and
tails. The first requests *in order of their ends* are left out; throughputs are counted from the end of the last one
left out. Time shares, acceptance counts and the tables of a run always cover the whole of it.

What the replicas of a run noted, put together: its two tables, and the gaps between emissions.
"""

from __future__ import annotations

import json
import os
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calibration.common.arrays import Floats, Ints
from calibration.common.errors import ConvergenceWarning, ScenarioError
from calibration.common.files import file_sha256, fresh_folder, sha256
from simulator.playback.replay import SequenceTable
from simulator.rounds.protocols import PREFILL, Counters, RunLog
from simulator.scenario.scenario import Measurement, Scenario
from simulator.scenario.workload import ClosedLoop, Workload

BATCH = 5
"""Requests in a batch of MSER-5."""


@dataclass(frozen=True)
class Window:
    """What is measured: counted requests that ended after `began_s`, until `ended_s`, the last of their ends.

    `removed` counted requests ended before. Without a ``[measure]`` section everything is measured, from the first
    arrival on, and `method` is None.
    """

    request_ids: Ints
    began_s: float
    ended_s: float
    removed: int
    method: str | None
    warmup_s: float = 0.0

    def keeps(self, request_ids: Ints) -> Any:
        """Give a mask: which requests are measured."""
        return np.isin(request_ids, self.request_ids)

    def describe(self) -> dict[str, Any]:
        """Give what was left out, for the summary; nothing where everything is measured."""
        if self.method is None:
            return {}
        return {
            "warmup_method": self.method,
            "warmup_requests_removed": self.removed,
            "warmup_removed_s": self.warmup_s,
        }


def measured_window(measure: Measurement | None, requests: pa.Table) -> Window:
    """Give the part of `requests` (the table of a run) that `measure` keeps.

    Raises `ScenarioError` where nothing would be left; warns with `ConvergenceWarning` where MSER-5 finds its
    minimum only at the middle of the run, the last place it may look at.
    """
    counted = requests.filter(requests["counted"])
    ids, arrival, finish = (counted[name].to_numpy() for name in ("request_id", "arrival_s", "finish_s"))
    first, last = float(arrival.min()), float(finish.max())
    if measure is None:
        return Window(ids, first, last, 0, None)
    order = np.lexsort((ids, finish))
    ends = finish[order]
    method, place, began = "requests", "warmup_requests", first
    if measure.warmup_s is not None:
        method, place, began = "seconds", "warmup_s", first + measure.warmup_s
        removed = int(np.searchsorted(ends, began, side="right"))
    elif measure.warmup_requests is not None:
        removed = measure.warmup_requests
    else:
        method, place = "MSER-5", "warmup"
        removed = _automatic((finish - arrival)[order])
    if method != "seconds" and 0 < removed <= len(ends):
        began = float(ends[removed - 1])
    if removed >= len(ends) or last <= began:
        given = getattr(measure, place)
        raise ScenarioError(
            f"scenario: measure.{place}: must leave some of the {len(ends)} counted requests, which end within "
            f"{last - first:.6g} s, got {given!r}"
        )
    return Window(ids[order][removed:], began, last, removed, method, began - first)


def without_startup(load: Workload, window: Window, requests: pa.Table) -> tuple[Window, dict[str, int]]:
    """Give what latencies are measured over, and for the summary how many requests of the start-up they leave out.

    The first request of each client of a closed loop meets an engine that is filling up. It is left out where as many
    others are measured, unless the scenario includes the start-up, chooses what is measured itself, or stands for an
    engine in full swing. Nothing is left out of an open loop, and nothing said.
    """
    if not isinstance(load, ClosedLoop) or load.include_startup or load.in_full_swing or window.method is not None:
        return window, {}
    first = window.request_ids < load.concurrency
    left = int(np.count_nonzero(first))
    if len(first) - left < left:
        return window, {"startup_requests": 0}
    return replace(window, request_ids=window.request_ids[~first]), {"startup_requests": left}


def _automatic(latency: Floats) -> int:
    if len(latency) < 2 * BATCH:
        raise ScenarioError(
            f"scenario: measure.warmup: 'auto' needs at least {2 * BATCH} counted requests, got {len(latency)}"
        )
    removed = mser(latency)
    if removed == len(latency) // BATCH // 2 * BATCH:
        warnings.warn(
            f"measure.warmup: MSER-5 finds no steady state in the first half of {len(latency)} requests and left out "
            "all of that half; simulate more requests, or see whether the load is above what the engine can serve",
            ConvergenceWarning,
            stacklevel=2,
        )
    return removed


def mser(values: Floats, batch: int = BATCH) -> int:
    """Give how many of the first `values` to leave out, by MSER with batches of `batch` (5: MSER-5).

    With batch means z_1 .. z_n, leaving out the first d of them has the score
    sum_{j>d} (z_j - mean of those)^2 / (n - d)^2, the squared standard error of what is left; the least score wins,
    d at most n/2. White 1997, "An effective truncation heuristic for bias reduction in simulation output"; batches
    of five: White, Cobb and Spratt 2000. A heuristic: it says where truncation costs more precision than it removes
    bias, not that the rest is stationary.
    """
    batches = len(values) // batch
    means = values[: batches * batch].reshape(batches, batch).mean(axis=1)
    means = means - means.mean()  # the sums below would lose digits to a large mean
    left = batches - np.arange(batches // 2 + 1)
    total, squares = (np.cumsum(z[::-1])[::-1][: len(left)] for z in (means, means**2))
    return int(np.argmin((squares - total**2 / left) / left**2)) * batch


SUMMARY = "summary.json"
FILES = ("scenario.toml", SUMMARY, "requests.parquet", "iterations.parquet")

DIGESTS = "files_sha256"
"""Key of summary.json, in the folder only: sha256 of the other files, and of the text of its other keys."""


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    `summary` has the keys of ``vllm bench serve`` where it has a name for the thing; `requests` and `iterations`
    are tables with a row per finished request and per engine iteration (units in their names).
    """

    scenario: Scenario
    summary: dict[str, Any]
    requests: pa.Table
    iterations: pa.Table

    def __repr__(self) -> str:
        """Return five lines: what ran, how many requests in what time, throughput, latencies, what it rests on."""
        told, speculates = self.summary, self.scenario.stopping
        policy = getattr(speculates, "name", None) or speculates.policy
        drafts = told.get("spec_decode_acceptance_length")
        length = "" if drafts is None else f", {drafts:.2f} tokens a round"
        slo = told.get("request_goodput")
        good = "" if slo is None else f", goodput {slo:.3g} requests/s"
        rests = told.get("provenance", {})
        return "\n".join(
            (
                f"RunResult of '{self.scenario.name}', seed {self.scenario.seed}, stopping policy {policy}{length}",
                f"  {told['completed']} requests, {self.iterations.num_rows} iterations in {told['duration']:.4g} s",
                f"  {told['output_throughput']:.4g} tokens/s, {told['request_throughput']:.3g} requests/s{good}",
                f"  mean TTFT {told['mean_ttft_ms']:.4g} ms, TPOT {told['mean_tpot_ms']:.4g} ms, "
                f"P99 {told['p99_ttft_ms']:.4g} and {told['p99_tpot_ms']:.4g} ms",
                f"  simulated: acceptance {rests.get('acceptance_grade')}, step times {rests.get('step_time_grade')}",
            )
        )

    @property
    def scenario_hash(self) -> str:
        """sha256 of the resolved scenario that was run."""
        return str(self.summary["scenario_hash"])

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the four files to `folder`, which appears whole or not at all; give its path.

        A folder that holds an older result is replaced; any other that is not empty is refused.
        """
        target = Path(folder)
        with fresh_folder(target, SUMMARY, error=ScenarioError) as scratch:
            (scratch / "scenario.toml").write_text(self.scenario.to_toml(target.absolute()), encoding="utf-8")
            for name in ("requests", "iterations"):
                pq.write_table(getattr(self, name), scratch / f"{name}.parquet", compression="zstd")
            digests = {name: file_sha256(scratch / name) for name in FILES if name != SUMMARY}
            digests[SUMMARY] = sha256(_text(self.summary).encode())
            (scratch / SUMMARY).write_text(_text({**self.summary, DIGESTS: digests}) + "\n", encoding="utf-8")
        return target

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunResult:
        """Read the result in `folder`; `ScenarioError` names a file that is missing, damaged or edited.

        Results of versions that stated no sha256 are read as they are.
        """
        root = Path(folder)
        for name in FILES:
            if not (root / name).is_file():
                raise ScenarioError(f"{root / name}: is missing; a result is a folder with {', '.join(FILES)}")
        place = root / SUMMARY
        try:
            text = place.read_bytes().decode()
            summary = json.loads(text)
            if DIGESTS in summary and text != _text(summary) + "\n":
                raise ValueError("edited since it was written")
            digests = summary.pop(DIGESTS, {})
            found = {name: (root / name).read_bytes() for name in FILES if name != SUMMARY}
            for name, data in {**found, SUMMARY: _text(summary).encode()}.items():
                place = root / name
                if name in digests and sha256(data) != digests[name]:
                    raise ValueError(f"edited, or not the one of this run: {SUMMARY} says another sha256")
            place = root / "scenario.toml"
            scenario = Scenario.model_validate(tomllib.loads(found["scenario.toml"].decode())).placed(root)
            tables = []
            for name in FILES[2:]:
                place = root / name
                tables.append(pq.read_table(pa.BufferReader(found[name])))
        except (ValueError, AttributeError, pa.ArrowException, OSError) as fault:
            raise ScenarioError(f"{place}: not readable, truncated or damaged ({fault})") from None
        return cls(scenario, summary, *tables)


def _text(summary: dict[str, Any]) -> str:
    return json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)


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
        spans = [log.spans.all() for log in logs]
        first = 0
        for log, columns in zip(logs, spans, strict=True):
            columns |= {name: columns[name] + first for name in ("first_round", "last_round")}
            first += log.rounds
        self.spans = _joined(spans)
        order = np.argsort(self.requests["request_id"], kind="stable")
        ids = self.requests["request_id"][order]
        at = np.searchsorted(ids, self.spans["request_id"])
        # Fillers may be cut off by the end of the run after they were preempted.
        ended = np.flatnonzero(ids.take(at, mode="clip") == self.spans["request_id"]) if len(ids) else at[:0]
        self.spans = {name: column[ended] for name, column in self.spans.items()}
        self.spans["request"] = order[at[ended]]
        decode = [_decode(log) for log in logs]
        start, duration, active = (np.concatenate(columns) for columns in zip(*decode, strict=True))
        self.round_ends: Floats = start + duration
        self.shares: Floats = np.concatenate(([0.0], np.cumsum(duration / active)))
        """Seconds that a request in all rounds would have, each round shared equally among its slots."""

    def per_request(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum `values`, one for each span, by request."""
        total = np.zeros(len(self.requests["request_id"]), dtype=values.dtype)
        np.add.at(total, self.spans["request"], values)
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
    kept, spans = record.requests, record.spans
    order = np.argsort(kept["request_id"], kind="stable")
    names = ("arrival_s", "start_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    sequence = kept["sequence"][order].tolist()
    first, last = spans["first_round"], spans["last_round"]
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

    The first gap of a span starts at its own last emission before; all others are the gaps between ends of
    neighbouring rounds, which their slots share. A request that was preempted has one more where its recomputation
    emitted.
    """
    spans = record.spans
    chosen = spans["counted"] == 1
    if window is not None:
        chosen &= window.keeps(spans["request_id"])
    first, last, began, previous = (
        spans[name][chosen] for name in ("first_round", "last_round", "began_s", "previous_s")
    )
    ends = record.round_ends
    some = last > first
    own = ends[first[some]] - began[some]
    # How many chosen spans were in rounds i-1 and i alike: +1 after the first round, -1 after the last one.
    change = np.zeros(len(ends) + 1, dtype=np.int64)
    np.add.at(change, first[some] + 1, 1)
    np.add.at(change, last[some], -1)
    shared = np.cumsum(change)[1 : len(ends)]
    anew = (began - previous)[~np.isnan(previous)]
    gaps = np.concatenate((own, np.diff(ends), anew))
    return gaps, np.concatenate((np.ones(len(own), dtype=np.int64), shared, np.ones(len(anew), dtype=np.int64)))


def longest_gaps(record: Record, request_ids: Ints) -> Floats:
    """Give the longest gap between two emissions of each of `request_ids`, in seconds; 0 where there is none."""
    spans, ends = record.spans, record.round_ends
    first, last = spans["first_round"], spans["last_round"]
    longest = np.nan_to_num(spans["began_s"] - spans["previous_s"])
    some = last > first
    longest[some] = np.maximum(longest[some], ends[first[some]] - spans["began_s"][some])
    several = last - first > 1
    if several.any():
        # Maximum over the gaps first .. last-2 of each span: every second stretch of a reduceat.
        gaps = np.append(np.diff(ends), 0.0)
        edges = np.stack((first[several], last[several] - 1), axis=1).ravel()
        longest[several] = np.maximum(longest[several], np.maximum.reduceat(gaps, edges)[::2])
    ids = record.requests["request_id"]
    by_request = np.zeros(len(ids))
    np.maximum.at(by_request, spans["request"], longest)
    order = np.argsort(ids)
    return by_request[order[np.searchsorted(ids, request_ids, sorter=order)]]
