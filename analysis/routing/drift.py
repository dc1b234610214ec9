"""Routers when the mix of domains changes in mid-run, at batch 1.

Draft lengths adjusted online, when the mix of domains changes in mid-run: against a length tuned beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from analysis.common.bootstrap import ClusterBootstrap, Estimate
from analysis.routing.classifier import Guesses, cheapest, fit_predict, seconds_per_token
from analysis.routing.compare import (
    ALWAYS,
    CALIBRATED,
    LABEL,
    Contest,
    bandits,
    bounds_together,
    over_orders,
    play,
    with_bounds,
)
from analysis.routing.findings import Drift, DriftPoint, MeanOverOrders, Online, OnlineRow
from analysis.routing.served import Priced, RequestTable, Server
from calibration.common.arrays import Floats, Ints
from calibration.traces import TraceSet
from calibration.traces.traceset import subset

BIN = 25
"""Requests in a point of the curve."""
UNSEEN = "classifier of the first phase"


def widest_phases(table: RequestTable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide the domains into two halves between which the best two drafters differ most.

    The best single drafter and the runner-up by what the oracle by request gives them; domains in the order of the
    ratio of their seconds there. A drift chosen to be hard, not a typical one.
    """
    domains = sorted(set(table.domains))
    labels = np.asarray(table.domains, dtype=object)
    first = int(table.seconds.sum(axis=0).argmin())
    wins = np.bincount(table.seconds.argmin(axis=1), minlength=len(table.drafters)).astype(float)
    wins[first] = -1.0
    second = int(wins.argmax())
    sums = {d: table.seconds[labels == d].sum(axis=0) for d in domains}
    order = sorted(domains, key=lambda d: float(sums[d][first] / sums[d][second]))
    half = (len(order) + 1) // 2
    return tuple(order[:half]), tuple(order[half:])


def drift(
    table: RequestTable,
    guesses: Guesses | None,
    counts: csr_matrix | None,
    groups: Ints | None,
    phases: tuple[Sequence[str], Sequence[str]],
    *,
    requests: int,
    window: int,
    orders: int,
    seed: int,
) -> Drift:
    """Serve `requests` requests of the domains of phase one, then as many of phase two, in `orders` random orders.

    Policies: the drafter that is best alone in phase one; the bandits, one of which forgets; the true label and the
    calibrated classifier (both know all domains beforehand), and a classifier that learned from phase one alone.
    """
    labels = np.asarray(table.domains, dtype=object)
    rows = [np.flatnonzero(np.isin(labels, np.array(phase, dtype=object))) for phase in phases]
    streams = [
        np.concatenate([rng.choice(mine, size=requests) for mine in rows])
        for rng in (np.random.default_rng([seed, 2, index]) for index in range(orders))
    ]
    best = table.seconds.min(axis=1)
    paid: dict[str, Floats] = {}
    for name, chosen in _fixed(table, guesses, counts, groups, rows, seed).items():
        paid[name] = np.stack([table.seconds[order, chosen[order]] for order in streams])
    for name, make in bandits(table, window).items():
        arms = [play(make(i), table, order.tolist()) for i, order in enumerate(streams)]
        paid[name] = np.stack([table.seconds[order, arm] for order, arm in zip(streams, arms, strict=True)])
    ideal = np.stack([best[order] for order in streams])
    span = min(2 * BIN, requests)
    marks = range(BIN, 2 * requests + 1, BIN)
    return Drift(
        tuple(phases[0]),
        tuple(phases[1]),
        requests,
        window,
        before=_each(paid, ideal, requests - span, requests),
        after=_each(paid, ideal, requests, requests + span),
        settled=_each(paid, ideal, 2 * requests - span, 2 * requests),
        curve=tuple(
            DriftPoint(name, mark, efficiency)
            for mark in marks
            for name, efficiency in _each(paid, ideal, mark - BIN, mark).items()
        ),
    )


def _fixed(
    table: RequestTable,
    guesses: Guesses | None,
    counts: csr_matrix | None,
    groups: Ints | None,
    rows: Sequence[Ints],
    seed: int,
) -> dict[str, Ints]:
    """Give the choices that do not learn while they serve, for every request of the table."""
    tuned = int(table.seconds[rows[0]].sum(axis=0).argmin())
    found: dict[str, Ints] = {f"{ALWAYS}{table.drafters[tuned]}": np.full(len(table.ids), tuned, dtype=np.int64)}
    if guesses is None:
        return found
    found[LABEL] = cheapest(guesses, table.seconds, table.output_tokens, certain=True)
    found[CALIBRATED] = cheapest(guesses, table.seconds, table.output_tokens)
    if counts is not None and groups is not None:
        found[UNSEEN] = _first_phase_only(
            table=table, guesses=guesses, counts=counts, groups=groups, rows=rows, before=found[CALIBRATED], seed=seed
        )
    return found


def _first_phase_only(
    table: RequestTable,
    guesses: Guesses,
    counts: csr_matrix,
    groups: Ints,
    rows: Sequence[Ints],
    before: Ints,
    seed: int,
) -> Ints:
    """Give the choices of a classifier that knows phase one alone; `before` are those within phase one."""
    train, held = rows
    size = len(guesses.classes)
    logits, temperature = fit_predict(
        counts=counts, labels=guesses.labels, groups=groups, train=train, held=held, classes=size, seed=seed
    )
    scaled = logits / temperature
    belief = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    known = np.unique(guesses.labels[train])
    member = np.eye(size)[guesses.labels[train]][:, known]
    per_token = seconds_per_token(member, table.seconds[train], table.output_tokens[train])
    chosen = before.copy()
    chosen[held] = (belief[:, known] @ per_token).argmin(axis=1)
    return chosen


def _each(paid: Mapping[str, Floats], ideal: Floats, start: int, stop: int) -> dict[str, MeanOverOrders]:
    """Give the efficiency of every policy over the requests from `start` to `stop`: the oracle's seconds over its."""
    window = slice(start, stop)
    return {
        name: over_orders(ideal[:, window].sum(axis=1) / own[:, window].sum(axis=1)) for name, own in paid.items()
    }


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
    return Online(
        drafter=drafter,
        batch=batch,
        first=tuple(phases[0]),
        later=tuple(phases[1]),
        tuned_tokens=tuned,
        best_later_tokens=best,
        rows=tuple(found),
    )


def _ratio(bootstrap: ClusterBootstrap, base: Floats, own: Floats, half: str) -> Estimate:
    (ratio,) = bootstrap.estimates(lambda s: s[..., :1] / s[..., 1:], np.column_stack([base, own]), half)
    return ratio
