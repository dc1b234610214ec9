"""Rules between the keys of ``[workload]``, told before anything is run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def workload_faults(load: Mapping[str, Any], engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give (place, rule) for every rule between keys that the (maybe unchecked) workload `load` breaks."""
    kind = load.get("kind")
    faults = _bound_faults(load)
    if kind == "closed":
        faults += _closed_faults(load, engine)
    if kind == "piecewise":
        faults += _piecewise_faults(load)
    if kind == "clients" and load.get("requests") is None and load.get("duration_s") is None:
        faults.append(("workload", "must have requests or duration_s where kind is 'clients'"))
    if load.get("format") == "mooncake" and load.get("lengths") is not None:
        faults.append(("workload.lengths", "must be left out for format 'mooncake': prefix blocks belong to prompts"))
    return faults


def _closed_faults(load: Mapping[str, Any], engine: Mapping[str, Any]) -> list[tuple[str, str]]:
    faults = []
    if load.get("think_law") is not None and load.get("think_s") is None:
        faults.append(("workload.think_s", "must be given where think_law is"))
    copies = load.get("copies", 1)
    if not isinstance(copies, int) or copies < 2:
        return faults
    concurrency = load.get("concurrency", copies)
    if concurrency != copies:
        faults.append(("workload.concurrency", f"must equal copies = {copies}, got {concurrency}"))
    requests = load.get("requests")
    if isinstance(requests, int) and requests % copies:
        faults.append(("workload.requests", f"must be a multiple of copies = {copies}, got {requests}"))
    if load.get("keep_full"):
        faults.append(("workload.keep_full", "must be false where copies > 1, got true"))
    for key in ("think_s", "mix", "lengths"):
        if load.get(key) is not None:
            faults.append((f"workload.{key}", "must be left out where copies > 1"))
    slots = engine.get("max_num_seqs", copies)
    if isinstance(slots, int) and slots < copies:
        faults.append(("engine.max_num_seqs", f"must be at least workload.copies = {copies}, got {slots}"))
    return faults


def _bound_faults(load: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Check weights, which must not all be zero, and laws of lengths."""
    faults = []
    if _all_zero(mix.values() if isinstance(mix := load.get("mix"), Mapping) else ()):
        faults.append(("workload.mix", "must have a weight above zero"))
    classes = load.get("classes")
    shares = list(classes.values()) if isinstance(classes, Mapping) else []
    if _all_zero([share.get("weight", 1.0) if isinstance(share, Mapping) else 1.0 for share in shares]):
        faults.append(("workload.classes", "must have a weight above zero"))
    lengths = load.get("lengths")
    if not isinstance(lengths, Mapping) or lengths.get("kind") != "drawn":
        return faults
    laws = {key: law for key in ("prompt", "output") if isinstance(law := lengths.get(key), Mapping)}
    if not laws:
        faults.append(("workload.lengths", "must have prompt or output where kind is 'drawn'"))
    for key, law in laws.items():
        tokens, weights = law.get("tokens"), law.get("weights")
        if law.get("kind") != "pmf" or not isinstance(tokens, list | tuple) or not isinstance(weights, list | tuple):
            continue
        if len(tokens) != len(weights):
            rule = f"must be as many as tokens, {len(tokens)}, got {len(weights)}"
            faults.append((f"workload.lengths.{key}.weights", rule))
        elif _all_zero(weights):
            faults.append((f"workload.lengths.{key}.weights", "must have a weight above zero"))
    return faults


def _all_zero(weights: Any) -> bool:
    values = list(weights)
    return bool(values) and all(isinstance(value, int | float) and value == 0 for value in values)


def _piecewise_faults(load: Mapping[str, Any]) -> list[tuple[str, str]]:
    rates = load.get("rates")
    if not isinstance(rates, Sequence) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
        for pair in rates
    ):
        return []  # told by its type
    starts, rps, repeat = [pair[0] for pair in rates], [pair[1] for pair in rates], load.get("repeat_s")
    if not starts:
        return []
    faults = []
    if starts[0] != 0:
        faults.append(("workload.rates", f"must start at 0 seconds, got {starts[0]}"))
    if any(later <= sooner for sooner, later in itertools.pairwise(starts)):
        faults.append(("workload.rates", f"must have increasing starts, got {starts}"))
    if _all_zero(rps):
        faults.append(("workload.rates", "must have a rate above zero"))
    elif rps[-1] == 0 and repeat is None and load.get("duration_s") is None:
        faults.append(("workload.rates", "must end with a rate above zero, or have repeat_s or duration_s, got 0"))
    if isinstance(repeat, int | float) and repeat <= starts[-1]:
        faults.append(("workload.repeat_s", f"must be after the last start, {starts[-1]}, got {repeat}"))
    return faults
