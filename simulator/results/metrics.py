"""From the log of a run to its tables and its summary, under the names and by the rules of ``vllm bench serve``.

Tokens accepted together carry one timestamp, so an inter-token latency (ITL) is the gap between two emissions of a
request, as a streaming client sees it. TPOT = (end-to-end - TTFT) / (output tokens - 1).

Goodput: how many requests kept all their service-level objectives, by the rules of ``vllm bench serve``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from calibration.common.arrays import Floats
from simulator.results.result import (
    Record,
    Window,
    inter_token_latencies,
    longest_gaps,
    measured_window,
    without_startup,
)
from simulator.scenario.scenario import Objectives, Scenario


def goodput(
    objectives: Objectives | None, requests: pa.Table, duration_s: float, longest_gap_s: Floats
) -> dict[str, float]:
    """Give the goodput of `requests` (the measured ones) over `duration_s`; nothing where no objective is stated.

    ``request_goodput``: requests a second that keep every stated objective (vLLM's name). ``slo_attainment``: their
    share; ``slo_attainment_<what>``: the share that keeps this one. A limit is kept by a value equal to it. The TPOT
    and the longest gap of a request with one output token are 0, as vLLM counts them. `longest_gap_s` has the shape
    of `requests`.
    """
    if objectives is None:
        return {}
    arrival, first, finish, tokens = (
        requests[name].to_numpy() for name in ("arrival_s", "first_token_s", "finish_s", "output_tokens")
    )
    seconds = {
        "ttft": first - arrival,
        "tpot": (finish - first) / np.maximum(tokens - 1, 1),
        "itl": longest_gap_s,
        "e2el": finish - arrival,
    }
    limits = {name: getattr(objectives, f"{name}_ms") for name in seconds}
    kept = {name: seconds[name] * 1000 <= limit for name, limit in limits.items() if limit is not None}
    good = np.logical_and.reduce(list(kept.values()))
    return {
        "request_goodput": float(good.sum()) / duration_s,
        "slo_attainment": float(good.mean()),
        **{f"slo_attainment_{name}": float(mask.mean()) for name, mask in kept.items()},
    }


def money(usd_per_hour: float | None, output_tokens_per_s: float) -> dict[str, float]:
    """Give ``usd_per_million_output_tokens``; nothing where no price an hour is stated or no token came out."""
    if usd_per_hour is None or output_tokens_per_s <= 0:
        return {}
    return {"usd_per_million_output_tokens": usd_per_hour / 3600 / output_tokens_per_s * 1e6}


PERCENTILES = (90, 95, 99)


def spread(name: str, seconds: Floats) -> dict[str, float]:
    """Give mean, median, standard deviation and percentiles in ms; nothing where there is no value."""
    return _spread_ms(name, seconds * 1000)


def _spread_ms(name: str, ms: Floats) -> dict[str, float]:
    if len(ms) == 0:
        return {}
    return {
        f"mean_{name}_ms": float(np.mean(ms)),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(np.std(ms)),
        **{f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES},
    }


def measured(requests: pa.Table, window: Window | None) -> pa.Table:
    """Give the counted requests, those of `window` only."""
    counted = requests.filter(requests["counted"])
    return counted if window is None else counted.filter(pa.array(window.keeps(counted["request_id"].to_numpy())))


def latencies(record: Record, requests: pa.Table, window: Window | None = None) -> dict[str, float]:
    """Give TTFT, TPOT, ITL and end-to-end latency of the counted requests, those of `window` only."""
    ttft, tpot, e2el = request_latencies(measured(requests, window))
    gaps, number = inter_token_latencies(record, window)
    return {
        **spread("ttft", ttft),
        **spread("tpot", tpot),
        **_spread_ms("itl", np.repeat(gaps * 1000, number)),
        **spread("e2el", e2el),
    }


def request_latencies(counted: pa.Table) -> tuple[Floats, Floats, Floats]:
    """Give (TTFT, TPOT, end-to-end latency) of each request, in seconds; no TPOT for those of one token."""
    arrival, first, finish, tokens = (
        counted[name].to_numpy() for name in ("arrival_s", "first_token_s", "finish_s", "output_tokens")
    )
    several = tokens > 1
    return first - arrival, (finish - first)[several] / (tokens[several] - 1), finish - arrival


def throughputs(requests: pa.Table, iterations: pa.Table, window: Window | None = None) -> dict[str, float]:
    """Give vLLM's totals over the counted requests, from the first arrival (where `window` begins) to the last end.

    ``engine_output_throughput`` counts every token that the engine emitted in that time, also to fillers.
    """
    counted = measured(requests, window)
    emitted = iterations["emitted_tokens"].to_numpy()
    began = float(counted["arrival_s"].to_numpy().min())
    if window is not None and window.method is not None:
        began = window.began_s
        emitted = emitted[iterations["start_s"].to_numpy() + iterations["duration_s"].to_numpy() > began]
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
        "engine_output_throughput": float(emitted.sum()) / duration,
    }


def latency_growth(requests: pa.Table, window: Window | None = None) -> dict[str, float]:
    """Give how fast end-to-end latency grows with arrival time, in seconds per second: a least-squares slope.

    Near 0 where an engine keeps up with an open loop; (arrival rate / service rate) - 1 where it does not and its
    queue grows. For open loops only: a closed one waits for its engine. Nothing where all requests arrive at once.
    """
    counted = measured(requests, window)
    arrival, finish = (counted[name].to_numpy() for name in ("arrival_s", "finish_s"))
    centred = arrival - arrival.mean()
    spread_s2 = float(centred @ centred)
    return {"latency_growth": float(centred @ (finish - arrival)) / spread_s2} if spread_s2 > 0 else {}


def rounds(requests: pa.Table) -> dict[str, float]:
    """Give what a round of a request emitted (bonus included) and drafted, rounds without a draft too.

    Over all requests that ended; nothing where none had a round. The first token of each is prefill's.
    """
    total = int(requests["rounds"].to_numpy().sum())
    if not total:
        return {}
    emitted = int(requests["output_tokens"].to_numpy().sum()) - requests.num_rows
    drafted = int(requests["drafted_tokens"].to_numpy().sum())
    return {"tokens_per_round": emitted / total, "drafted_tokens_per_round": drafted / total}


def acceptance(record: Record) -> dict[str, Any]:
    """Give vLLM's counters of speculation over all rounds of all replicas, fillers included.

    A draft is a round of a slot with at least one drafted token. Rates are absent where nothing was drafted; the
    acceptance rate is in per cent; the length includes the bonus token; rates by position are unconditional
    (position 2 counts all drafts, not those that reached it). Wasted are the tokens that were drafted and not
    accepted, with those that a placement or policy drafted ahead and never had verified.
    """
    logs = [member.log for member in record.members]
    drafted, accepted = (
        sum(int(log.iterations[f"{name}_tokens"].sum()) for log in logs) for name in ("drafted", "accepted")
    )
    counts = {
        "spec_decode_num_drafts": record.drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "wasted_draft_tokens": sum(log.drafted_tokens for log in logs) - accepted,
    }
    if not record.drafts:
        return counts
    reached = np.cumsum(record.accepted_by_length()[::-1])[::-1][1:]
    return {
        **counts,
        "spec_decode_acceptance_rate": 100 * accepted / drafted,
        "spec_decode_acceptance_length": 1 + accepted / record.drafts,
        "spec_decode_per_position_acceptance_rates": (reached / record.drafts).tolist(),
    }


def beside(record: Record) -> dict[str, float]:
    """Give the time of rounds spent beside drafting and verification, by name; nothing where there is none.

    ``link_s``: on the way between devices; ``calibration_s``: repairing the KV cache of a layer-parallel drafter.
    """
    names = dict.fromkeys(name for member in record.members for name in member.log.beside_s)
    return {name: sum(member.log.beside_s.get(name, 0.0) for member in record.members) for name in names}


def where_time_went(iterations: pa.Table) -> dict[str, float]:
    """Divide the time of all replicas, from the first iteration to the last, among what they did.

    Drafting, verifying, prefill, overhead, swapping (only where it occurred) and idling, down times included. Where
    drafting overlaps verification, the parts add up to more than the time.
    """
    pure = iterations["kind"].to_numpy(zero_copy_only=False) == "prefill"
    draft, verify, overhead, prefill = (
        iterations[f"{name}_s"].to_numpy() for name in ("draft", "verify", "overhead", "prefill")
    )
    parts: dict[str, float] = {
        "draft_s": float(draft.sum()),
        "verify_s": float((verify[~pure] - prefill[~pure]).sum()),
        "prefill_s": float(prefill[pure].sum()) + float(prefill[~pure].sum()),
        "overhead_s": float(overhead.sum()),
    }
    if "swap_s" in iterations.column_names:
        parts["swap_s"] = float(iterations["swap_s"].to_numpy().sum())
    start, length = (iterations[name].to_numpy() for name in ("start_s", "duration_s"))
    replica = iterations["replica"].to_numpy(zero_copy_only=False)
    idle = 0.0
    for name in dict.fromkeys(replica):
        began, ended = start[replica == name], (start + length)[replica == name]
        idle += float((began[1:] - ended[:-1]).sum()) + (began[0] - start[0]) + ((start + length).max() - ended[-1])
    return {**parts, "idle_s": float(idle)}


def memory(record: Record, iterations: pa.Table) -> dict[str, Any]:
    """Give use of KV memory, preemptions and prefix caching, each only where it can occur.

    Usage is the share of all KV blocks of the fleet that requests hold, its mean over the busy time of each replica.
    Prefix cache queries and hits are tokens of prompts when they first start (vLLM's names).
    """
    limited = {member.name: member.num_blocks for member in record.members if member.num_blocks is not None}
    counters = [member.counters for member in record.members]
    found: dict[str, Any] = {}
    if limited:
        rows = np.isin(iterations["replica"].to_numpy(zero_copy_only=False), list(limited))
        names = iterations["replica"].to_numpy(zero_copy_only=False)[rows]
        total = np.array([limited[name] for name in names])
        share = iterations["kv_blocks"].to_numpy(zero_copy_only=False)[rows] / total
        length = iterations["duration_s"].to_numpy()[rows]
        found |= {
            "num_gpu_blocks": sum(limited.values()),
            "mean_kv_cache_usage": float((share * length).sum() / length.sum()),
            "peak_kv_cache_usage": float(share.max()),
            "num_preemptions": sum(counter.preemptions for counter in counters),
            "recomputed_tokens": sum(counter.recomputed_tokens for counter in counters),
        }
        if any(counter.swapped_tokens for counter in counters):
            found["swapped_tokens"] = sum(counter.swapped_tokens for counter in counters)
    queries, hits = (sum(getattr(counter, f"prefix_{name}") for counter in counters) for name in ("queries", "hits"))
    if queries:
        found |= {"prefix_cache_queries": queries, "prefix_cache_hits": hits, "prefix_cache_hit_rate": hits / queries}
    return found


def by_replica(record: Record, requests: pa.Table, iterations: pa.Table) -> dict[str, dict[str, Any]]:
    """Give for every replica what it did: requests that ended there, its tokens, its busy time and its rounds."""
    ended = requests["replica"].to_numpy(zero_copy_only=False)
    rows = iterations["replica"].to_numpy(zero_copy_only=False)
    found: dict[str, dict[str, Any]] = {}
    for member in record.members:
        mine = iterations.filter(pa.array(rows == member.name))
        emitted = int(mine["emitted_tokens"].to_numpy().sum())
        found[member.name] = {
            "completed": int((ended == member.name).sum()),
            "emitted_tokens": emitted,
            "busy_s": float(mine["duration_s"].to_numpy().sum()),
            "iterations": mine.num_rows,
            "rounds": member.log.rounds,
            "num_preemptions": member.counters.preemptions,
        }
    return found


def service(record: Record, requests: pa.Table, iterations: pa.Table, scenario: Scenario) -> dict[str, Any]:
    """Give throughputs, latencies, goodput and the price of tokens of what ``[measure]`` keeps of a run."""
    window = measured_window(scenario.measure, requests)
    totals = throughputs(requests, iterations, window)
    kept = measured(requests, window)
    gaps = longest_gaps(record, kept["request_id"].to_numpy()) if scenario.slo is not None else np.zeros(0)
    steady, left_out = without_startup(scenario.workload, window, kept)
    return {
        **totals,
        **window.describe(),
        **left_out,
        **latencies(record, requests, steady),
        **({} if scenario.workload.kind == "closed" else latency_growth(requests, window)),
        **goodput(scenario.slo, kept, totals["duration"], gaps),
        **money(scenario.costs.usd_per_hour, totals["engine_output_throughput"]),
    }
