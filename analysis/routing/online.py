"""Draft lengths adjusted online, when the mix of domains changes in mid-run: against a length tuned beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.fidelity.public.runs import subset
from analysis.routing.compare import Contest, bounds_together, with_bounds
from analysis.routing.findings import Online, OnlineRow
from analysis.routing.served import Priced, Server
from calibration.common.arrays import Floats
from calibration.traces import TraceSet


def online(
    traces: TraceSet,
    drafter: str,
    priced: Priced,
    phases: tuple[Sequence[str], Sequence[str]],
    lengths: Sequence[int],
    bootstrap_seed: int,
    *,
    batch: int,
    draws: int,
) -> Online:
    """Serve the prompts of the first domains, then of the later ones, each once, with one drafter at `batch`.

    The fixed length that is best on the first half is the baseline; adaptive policies start as their engines do and
    hear what live metrics say. Requests of the two halves share a batch for a moment around the change.
    """
    domains = np.asarray(traces.sequences["domain"].to_pylist(), dtype=object)
    ids = np.asarray(traces.sequences["sequence_id"].to_pylist(), dtype=object)
    rows = [np.flatnonzero(np.isin(domains, np.array(phase, dtype=object))) for phase in phases]
    order = np.concatenate([np.random.default_rng(bootstrap_seed).permutation(mine) for mine in rows])
    server = Server(subset(traces, ids[order].tolist()), (drafter,), priced)
    later = np.isin(np.asarray(server.domains, dtype=object), np.array(phases[1], dtype=object))
    rule = {"policy": "static", "drafter": drafter}
    fixed = {k: server.serve(rule, k, batch=batch, in_order=True).seconds for k in (0, *lengths)}
    adaptive: dict[str, dict[str, Any]] = {
        "moving_average": {"policy": "moving_average"},
        "goodput": {"policy": "goodput", "max_draft_tokens": max(lengths)},
        "per_request": {"policy": "per_request", "max_draft_tokens": max(lengths)},
    }
    tuned, best = (min(fixed, key=lambda k: float(fixed[k][part].sum())) for part in (~later, later))
    served = {f"fixed {best}, best in hindsight": fixed[best]}
    for name, policy in adaptive.items():
        served[name] = server.serve(rule, policy, batch=batch, in_order=True).seconds
    halves = ["later" if is_later else "first" for is_later in later.tolist()]
    bootstrap = ClusterBootstrap(halves, np.random.default_rng(bootstrap_seed), draws=draws)
    every = {**{f"fixed {k}": own for k, own in fixed.items() if k != tuned}, **served}
    together = bounds_together([Contest(every, [fixed[tuned]], half) for half in ("first", "later")], bootstrap)
    found = []
    for name, own in served.items():
        ratios = [_ratio(bootstrap, fixed[tuned], own, half) for half in ("first", "later")]
        bounded = [with_bounds(ratio, bounds[name]) for ratio, bounds in zip(ratios, together, strict=True)]
        found.append(OnlineRow(name, *ratios, *bounded))
    return Online(drafter, batch, tuple(phases[0]), tuple(phases[1]), tuned, best, tuple(found))


def _ratio(bootstrap: ClusterBootstrap, base: Floats, own: Floats, half: str) -> Estimate:
    (ratio,) = bootstrap.estimates(lambda s: s[..., :1] / s[..., 1:], np.column_stack([base, own]), half)
    return ratio
