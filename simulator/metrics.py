"""From the log of a run to its tables and its summary, under the names and by the rules of ``vllm bench serve``.

Tokens accepted together carry one timestamp, so an inter-token latency (ITL) is the gap between two emissions of a
request, as a streaming client sees it. TPOT = (end-to-end - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from simulator.log import RunLog
from simulator.replay import FloatArray, IntArray, SequenceTable

PERCENTILES = (90, 95, 99)


def iterations_table(log: RunLog, overhead_s: float) -> pa.Table:
    """Give one row per engine iteration; token counts are sums over its slots, contexts those at its start."""
    kept = log.iterations
    prefill = kept["prefill"].astype(bool)
    return pa.table(
        {
            "iteration": np.arange(len(prefill)),
            "kind": pa.array(np.where(prefill, "prefill", "decode"), type=pa.string()),
            **{name: kept[name] for name in ("start_s", "duration_s", "active", "waiting")},
            **{f"{name}_tokens": kept[f"{name}_tokens"] for name in ("drafted", "accepted", "emitted", "context")},
            "draft_s": kept["draft_s"],
            "verify_s": kept["verify_s"],
            "overhead_s": np.full(len(prefill), overhead_s),
        }
    )


def requests_table(log: RunLog, sequences: SequenceTable) -> pa.Table:
    """Give one row per request that ended, in order of submission.

    ``engine_seconds``: every iteration's duration shared equally among the slots it worked on (a prefill works on
    the new ones only), so that the column sums to the busy time of the engine.
    """
    kept = log.requests
    order = np.argsort(kept["request_id"], kind="stable")
    columns = {name: kept[name][order] for name in ("request_id", "sequence", "first_round", "last_round")}
    names = ("arrival_s", "start_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    first, last = columns["first_round"], columns["last_round"]
    shares = np.concatenate(([0.0], np.cumsum(_decode(log, "duration_s") / _decode(log, "active"))))
    return pa.table(
        {
            "request_id": columns["request_id"],
            "sequence_id": pa.array([sequences.ids[i] for i in columns["sequence"].tolist()], type=pa.string()),
            "domain": pa.array([sequences.domains[i] for i in columns["sequence"].tolist()], type=pa.string()),
            "counted": kept["counted"][order].astype(bool),
            **{name: kept[name][order] for name in names},
            "rounds": last - first,
            "drafted_tokens": kept["drafted_tokens"][order],
            "accepted_tokens": kept["accepted_tokens"][order],
            "engine_seconds": kept["prefill_share_s"][order] + (shares[last] - shares[first]),
        }
    )


def _decode(log: RunLog, name: str) -> Any:
    return log.iterations[name][log.iterations["prefill"] == 0]


def inter_token_latencies(log: RunLog) -> tuple[FloatArray, IntArray]:
    """Give (gap in seconds, how often it occurred) between emissions of counted requests.

    A request takes part in a contiguous stretch of decode rounds. Its first gap starts at its own first token; all
    others are the gaps between ends of neighbouring rounds, which their slots share.
    """
    counted = log.requests["counted"] == 1
    first, last = log.requests["first_round"][counted], log.requests["last_round"][counted]
    token = log.requests["first_token_s"][counted]
    ends = _decode(log, "start_s") + _decode(log, "duration_s")
    some = last > first
    own = ends[first[some]] - token[some]
    # How many counted requests were in rounds i-1 and i alike: +1 after the first round, -1 after the last one.
    change = np.zeros(len(ends) + 1, dtype=np.int64)
    np.add.at(change, first[some] + 1, 1)
    np.add.at(change, last[some], -1)
    shared = np.cumsum(change)[1 : len(ends)]
    gaps = np.concatenate((own, np.diff(ends)))
    return gaps, np.concatenate((np.ones(len(own), dtype=np.int64), shared))


def spread(name: str, seconds: FloatArray) -> dict[str, float]:
    """Give mean, median, standard deviation and percentiles in ms; nothing where there is no value."""
    if len(seconds) == 0:
        return {}
    ms = seconds * 1000
    return {
        f"mean_{name}_ms": float(np.mean(ms)),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(np.std(ms)),
        **{f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES},
    }


def latencies(log: RunLog, requests: pa.Table) -> dict[str, float]:
    """Give TTFT, TPOT, ITL and end-to-end latency of the counted requests."""
    counted = requests.filter(requests["counted"])
    arrival, first, finish, tokens = (
        counted[name].to_numpy() for name in ("arrival_s", "first_token_s", "finish_s", "output_tokens")
    )
    several = tokens > 1
    gaps, number = inter_token_latencies(log)
    return {
        **spread("ttft", first - arrival),
        **spread("tpot", (finish - first)[several] / (tokens[several] - 1)),
        **spread("itl", np.repeat(gaps, number)),
        **spread("e2el", finish - arrival),
    }


def throughputs(requests: pa.Table, iterations: pa.Table) -> dict[str, float]:
    """Give vLLM's totals over the counted requests, from the first arrival to the last end.

    ``engine_output_throughput`` also counts what fillers got in that time.
    """
    counted = requests.filter(requests["counted"])
    began = float(counted["arrival_s"].to_numpy().min())
    duration = float(counted["finish_s"].to_numpy().max()) - began
    prompt, output = (int(counted[f"{name}_tokens"].to_numpy().sum()) for name in ("prompt", "output"))
    return {
        "duration": duration,
        "completed": counted.num_rows,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": counted.num_rows / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "engine_output_throughput": float(iterations["emitted_tokens"].to_numpy().sum()) / duration,
    }


def acceptance(log: RunLog) -> dict[str, Any]:
    """Give vLLM's counters of speculation over all rounds of the engine, fillers included.

    A draft is a round of a slot with at least one drafted token. Rates are absent where nothing was drafted; the
    acceptance rate is in per cent; the length includes the bonus token; rates by position are unconditional
    (position 2 counts all drafts, not those that reached it).
    """
    drafted, accepted = (int(log.iterations[f"{name}_tokens"].sum()) for name in ("drafted", "accepted"))
    counts = {
        "spec_decode_num_drafts": log.drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
    }
    if not log.drafts:
        return counts
    reached = np.cumsum(log.accepted.by_length()[::-1])[::-1][1:]
    return {
        **counts,
        "spec_decode_acceptance_rate": 100 * accepted / drafted,
        "spec_decode_acceptance_length": 1 + accepted / log.drafts,
        "spec_decode_per_position_acceptance_rates": (reached / log.drafts).tolist(),
    }


def where_time_went(iterations: pa.Table) -> dict[str, float]:
    """Divide the time since the first iteration among drafting, verifying, prefill, overhead and idling."""
    prefill = iterations["kind"].to_numpy(zero_copy_only=False) == "prefill"
    draft, verify, overhead = (iterations[f"{name}_s"].to_numpy() for name in ("draft", "verify", "overhead"))
    parts: Mapping[str, float] = {
        "draft_s": float(draft.sum()),
        "verify_s": float(verify[~prefill].sum()),
        "prefill_s": float(verify[prefill].sum()),
        "overhead_s": float(overhead.sum()),
    }
    start, length = (iterations[name].to_numpy() for name in ("start_s", "duration_s"))
    return {**parts, "idle_s": float((start[1:] - (start[:-1] + length[:-1])).sum())}
