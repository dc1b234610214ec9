"""The routing question, start to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
from scipy.sparse import csr_matrix

from analysis.common.bootstrap import DRAWS, ClusterBootstrap, describe, number
from analysis.common.threads import one_thread
from analysis.routing.classifier import Guesses, guess, possible_folds, quality
from analysis.routing.compare import (
    MERGED,
    WITH_LOOKUP,
    alike,
    alone_seconds,
    bandits,
    batch_rows,
    policy_rows,
    regret_growth,
)
from analysis.routing.drift import drift, online, widest_phases
from analysis.routing.findings import Drift, Online, PricedRouting, RoutingFindings
from analysis.routing.served import Priced, RequestTable, Server, cheap_prices, own_prices
from calibration.common.arrays import Ints
from calibration.common.errors import ReplayError, did_you_mean
from calibration.common.progress import Progress
from calibration.traces import TraceSet
from calibration.traces.paradigms import paradigm_of

Phases = tuple[tuple[str, ...], tuple[str, ...]]
"""Domains before and after a drift."""
_GROWTH_POINTS = 12


@dataclass(frozen=True)
class RoutingSettings:
    """What `study_routing` plays.

    ``lengths``: draft lengths, of which each price list takes the one where the best single drafter is best.
    ``batches``: beside batch 1. ``orders``: random orders of a bandit's requests; ``growth_requests`` and
    ``drift_requests``: how many it serves, the latter in each phase. ``window``: of the bandit that forgets.
    ``phases``: domains before and after the drift; left out, those between which the best drafters differ most.
    ``online_batch``: batch at which draft lengths are adjusted.
    """

    lengths: tuple[int, ...] = (4, 8)
    batches: tuple[int, ...] = (8,)
    replications: int = 2
    folds: int = 5
    orders: int = 40
    growth_requests: int = 720
    drift_requests: int = 200
    window: int = 60
    phases: Phases | None = None
    online_batch: int = 4
    online_lengths: tuple[int, ...] = (1, 2, 4, 8)
    seed: int = 0
    draws: int = DRAWS

    def __post_init__(self) -> None:
        """Refuse a single order: its mean has no interval."""
        if self.orders < 2:
            raise ReplayError(f"routing study: orders must be at least 2, got {self.orders}")


@dataclass(frozen=True)
class _Prompts:
    """What a router sees of the prompts, where they were recorded."""

    guesses: Guesses | None = None
    counts: csr_matrix | None = None
    groups: Ints | None = None
    reason: str = field(default="")


@one_thread
def study_routing(
    traces: TraceSet,
    *,
    drafters: Sequence[str] | None = None,
    prices: Sequence[Priced] | None = None,
    settings: RoutingSettings | None = None,
    progress: Progress | None = None,
) -> RoutingFindings:
    """Compare routers between `drafters` (default: all of `traces`) on mixed traffic, by domain, and under drift.

    `prices`: default the recorded ones and cheap drafting. All drafters draft equally long, as a scenario has it.
    Times at batch 1 are exact for greedy traces; sampled ones play one luck, the same for all. Intervals resample
    prompts within domains, or are over random orders where bandits play. Raises `ReplayError` for fewer than two
    drafters, unknown ones, or no request recorded with all.
    """
    chosen = settings or RoutingSettings()
    names = _known(traces, drafters)
    lists = prices if prices is not None else (own_prices(traces), cheap_prices(traces, names))
    told = progress or (lambda done, total: None)
    first = Server(traces, names, lists[0], seed=chosen.seed)
    prompts = _prompts(traces, first, chosen)
    bootstrap = ClusterBootstrap(first.domains, np.random.default_rng(chosen.seed), draws=chosen.draws)
    told(1, 1 + len(lists))
    found = []
    for priced in lists:
        found.append(_priced(traces, names, priced, prompts, bootstrap, chosen))
        told(1 + len(found), 1 + len(lists))
    return RoutingFindings(
        traces=f"{traces.manifest.kind} {traces.manifest.created[:10]}",
        verifier=traces.manifest.verifier.name,
        drafters=names,
        requests={domain: first.domains.count(domain) for domain in bootstrap.domains},
        classifier=None if prompts.guesses is None else quality(prompts.guesses, bootstrap),
        without_classifier=prompts.reason,
        prices=tuple(found),
        method=describe(chosen.draws),
    )


def _known(traces: TraceSet, drafters: Sequence[str] | None) -> tuple[str, ...]:
    known = traces.manifest.drafter_names
    names = tuple(drafters) if drafters is not None else tuple(known)
    for name in names:
        if name not in known:
            raise ReplayError(f"drafters: not in the TraceSet, got '{name}'{did_you_mean(name, known)}")
    if len(set(names)) < 2:
        raise ReplayError(f"drafters: routing needs at least two, got {', '.join(names) or 'none'}")
    return names


def _prompts(traces: TraceSet, server: Server, settings: RoutingSettings) -> _Prompts:
    """Classify the prompts, or say why not."""
    from simulator.drafter_routing.prompts import equal_rows, token_counts
    from simulator.playback.replay import select_sequences

    if traces.sequences["prompt_token_ids"].null_count:
        return _Prompts(reason="prompts were recorded without their token ids")
    table = select_sequences(traces, drafter=server.drafters)
    counts = token_counts(traces, table, "the classifier")
    groups = equal_rows(counts)
    labels = np.unique(np.asarray(server.domains), return_inverse=True)[1].astype(np.int64)
    parts = possible_folds(labels, groups, settings.folds)
    if parts < 2:
        return _Prompts(reason="a classifier needs two domains with two different prompts each")
    return _Prompts(guess(counts, server.domains, groups, parts, settings.seed), counts, groups)


def _priced(
    traces: TraceSet,
    names: Sequence[str],
    priced: Priced,
    prompts: _Prompts,
    bootstrap: ClusterBootstrap,
    settings: RoutingSettings,
) -> PricedRouting:
    server = Server(traces, names, priced, seed=settings.seed)
    table = _best_table(server, settings.lengths)
    best = table.drafters[int(table.seconds.sum(axis=0).argmin())]
    merging = _merging(traces, server, table, priced, settings.seed)
    signals = _felt(traces, names)
    seconds = alone_seconds(
        table, server, prompts.guesses, merging, signals=signals, orders=settings.orders, seed=settings.seed
    )
    phases = settings.phases or widest_phases(table)
    changing = all(phases)
    batches = batch_rows(
        server=server,
        table=table,
        guesses=prompts.guesses,
        merging=merging,
        batches=settings.batches,
        bootstrap=bootstrap,
        replications=settings.replications,
    )
    return PricedRouting(
        priced.note,
        number(server.extrapolated) or 0.0,
        table.draft_tokens,
        best,
        alike(seconds, bootstrap),
        rows=policy_rows(table, seconds, bootstrap, tuple(bandits(table))),
        batches=batches,
        growth=regret_growth(table, settings.growth_requests, settings.orders, _GROWTH_POINTS, seed=settings.seed),
        drift=_drift(table, prompts, phases, settings) if changing else None,
        online=_online(traces, best, priced, phases, settings) if changing else None,
    )


def _drift(table: RequestTable, prompts: _Prompts, phases: Phases, settings: RoutingSettings) -> Drift:
    return drift(
        table,
        prompts.guesses,
        prompts.counts,
        prompts.groups,
        phases,
        requests=settings.drift_requests,
        window=settings.window,
        orders=settings.orders,
        seed=settings.seed,
    )


def _online(traces: TraceSet, drafter: str, priced: Priced, phases: Phases, settings: RoutingSettings) -> Online:
    return online(
        traces,
        drafter,
        priced,
        phases,
        settings.online_lengths,
        settings.seed,
        batch=settings.online_batch,
        draws=settings.draws,
    )


def _best_table(server: Server, lengths: Sequence[int]) -> RequestTable:
    """Give the table of the length at which the best single drafter is best."""
    tables = [server.table(k) for k in lengths]
    return min(tables, key=lambda table: float(table.seconds.sum(axis=0).min()))


def _merging(traces: TraceSet, server: Server, table: RequestTable, priced: Priced, seed: int) -> dict[str, Server]:
    """Give the groups of drafters whose drafts may be verified as one: all, and the best one beside a free lookup.

    None for sampled traces, where another rule would verify them.
    """
    if traces.manifest.decoding.mode != "greedy":
        return {}
    found = {MERGED: server}
    lookups = [
        d.name for d in traces.manifest.drafters if paradigm_of(d.paradigm).looks_up and d.name in table.drafters
    ]
    models = [name for name in table.drafters if name not in lookups]
    if lookups and models and len(table.drafters) > 2:
        total = dict(zip(table.drafters, table.seconds.sum(axis=0).tolist(), strict=True))
        pair = tuple(min(group, key=lambda name: total[name]) for group in (models, lookups))
        both = Server(traces, pair, priced, seed=seed)
        if both.ids == server.ids:
            found[WITH_LOOKUP] = both
    return found


def _felt(traces: TraceSet, names: Sequence[str]) -> bool:
    """Whether the confidence of every drafter was recorded along its drafts."""
    felt = set(traces.rollouts["drafter"].unique().to_pylist())
    for name in names:
        mine = traces.positions.filter(pc.equal(traces.positions["drafter"], name))
        if name not in felt or mine["drafter_confidence"].null_count:
            return False
    return True
