"""Goodput: how many requests kept all their service-level objectives, by the rules of ``vllm bench serve``."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from calibration.common.arrays import Floats
from simulator.scenario.scenario import Objectives


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
