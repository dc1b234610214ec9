"""Counters of a server, as Prometheus exposes them in text, and how far they went during a run."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from calibration.common.errors import CalibrationError, MissingExtraError

CUMULATIVE = ("counter", "histogram", "summary")
"""Types of metrics that only grow, so that a difference of two readings says what happened between them."""

SPECULATION = (
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
)
"""Counters of speculative decoding: drafts, drafted tokens, accepted tokens (bonus excluded), and accepted tokens by
draft position (label ``position``, from 0). vLLM writes ``vllm:`` before them, llama.cpp ``llamacpp:``."""


def parse_counters(text: str) -> dict[str, float]:
    """Give every cumulative sample of a Prometheus exposition: key ``name{label="v",...}``, labels sorted by name.

    Counters (with their ``_total``), and the sums and counts of histograms; untyped samples count where their name
    ends in ``_total``. Gauges are left out, see `parse_gauges`. `CalibrationError` where `text` is none.
    """
    found = {}
    for kind, sample in _samples(text):
        name = sample.name
        grows = kind in CUMULATIVE and not name.endswith(("_bucket", "_created")) and "quantile" not in sample.labels
        if grows or (kind in ("unknown", "untyped") and name.endswith("_total")):
            found[_key(name, sample.labels)] = float(sample.value)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def parse_gauges(text: str) -> dict[str, float]:
    """Give every gauge of a Prometheus exposition, with keys as `parse_counters` gives them."""
    found = {_key(s.name, s.labels): float(s.value) for kind, s in _samples(text) if kind == "gauge"}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Give how far every counter of `after` went; one that `before` does not have began at 0.

    `CalibrationError` where one went back: the server was restarted in between.
    """
    went = {key: value - before.get(key, 0.0) for key, value in after.items()}
    back = min(went, key=lambda key: went[key], default=None)
    if back is not None and went[back] < 0:
        raise CalibrationError(
            f"{back}: a counter must not go back, got {before[back]:g} and then {after[back]:g}; "
            "was the server restarted in between?"
        )
    return went


def counter_name(key: str) -> str:
    """Give the name in a key of `parse_counters`, its labels left out."""
    return key.split("{", 1)[0]


def bare(key: str) -> str:
    """Give the name in a key without the engine before its colon, ``vllm:`` for one."""
    return counter_name(key).split(":")[-1]


def total(counters: Mapping[str, float], name: str) -> float | None:
    """Give the sum of counter `name` over all its labels (engines, models); None where it was not exposed."""
    found = [value for key, value in counters.items() if counter_name(key) == name]
    return sum(found) if found else None


def by_position(counters: Mapping[str, float], name: str) -> list[float] | None:
    """Give counter `name` by its label ``position``, from 0, summed over other labels; None where not exposed."""
    found: dict[int, float] = {}
    for key, value in counters.items():
        position = label(key, "position")
        if counter_name(key) == name and position is not None and position.isdigit():
            found[int(position)] = found.get(int(position), 0.0) + value
    return [found.get(at, 0.0) for at in range(max(found) + 1)] if found else None


def label(key: str, name: str) -> str | None:
    """Give the value of label `name` in a key of `parse_counters`; None where it has none."""
    for part in key[key.find("{") + 1 : -1].split(","):
        label, _, value = part.partition("=")
        if label == name:
            return value.strip('"')
    return None


def _samples(text: str) -> Iterator[tuple[str, Any]]:
    """Give (type, sample) pairs."""
    try:
        parser = importlib.import_module("prometheus_client.parser")
    except ModuleNotFoundError:
        raise MissingExtraError("prometheus_client", "observe") from None
    try:
        for family in parser.text_string_to_metric_families(text):
            yield from ((family.type, sample) for sample in family.samples)
    except ValueError as fault:
        raise CalibrationError(f"metrics: must be Prometheus text, {fault}") from None


def _key(name: str, labels: Mapping[str, str]) -> str:
    if not labels:
        return name
    return name + "{" + ",".join(f'{label}="{_escaped(labels[label])}"' for label in sorted(labels)) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
