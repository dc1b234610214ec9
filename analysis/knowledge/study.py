"""The knowledge question, start to end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.common.bootstrap import DRAWS, ClusterBootstrap, describe
from analysis.common.threads import one_thread
from analysis.knowledge.compare import Replayed, paired_rows, transfer_cells
from analysis.knowledge.findings import KnowledgeFindings
from analysis.knowledge.published import published_rows
from analysis.knowledge.roles import cast
from analysis.knowledge.router import router_value
from analysis.routing.served import Priced, cheap_prices, own_prices
from calibration.common.errors import ReplayError
from calibration.common.progress import Progress
from calibration.traces import TraceSet

ACCURACIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@one_thread
def study_knowledge(
    traces: TraceSet,
    *,
    generalist: str | None = None,
    specialists: Mapping[str, str] | None = None,
    draft_tokens: int = 4,
    lengths: Sequence[int] = (1, 2, 4),
    prices: Sequence[Priced] | None = None,
    accuracies: Sequence[float] | None = None,
    published: str | os.PathLike[str] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
    progress: Progress | None = None,
) -> KnowledgeFindings:
    """Compare one generalist with specialists of the same cost, and price routers of every accuracy between them.

    `specialists` maps drafters to their home domains; roles left out are read from the manifest (`roles.cast`).
    `draft_tokens`: of the paired comparison. `lengths`: of which each price list takes the generalist's best, for the
    simulated speed-ups. `prices`: default the recorded ones and cheap drafting (`served.cheap_prices`). `published`:
    a folder of published tables to set beside. Intervals resample prompts within domains.

    Raises `ReplayError` where the roles are not clear or drafters were not recorded on the same requests.
    """
    general, special = cast(traces, generalist, specialists)
    names = [general.name, *(student.name for student in special)]
    _must_share_requests(traces, names)
    chosen = prices if prices is not None else (own_prices(traces), cheap_prices(traces, names))
    told = progress or (lambda done, total: None)
    domains = traces.sequences["domain"].to_pylist()
    rng = np.random.default_rng(seed)
    bootstrap = ClusterBootstrap(domains, rng, draws=draws)
    replayed = Replayed(traces, names, draft_tokens)
    pooled, paired = paired_rows(replayed, general, special, bootstrap, rng)
    told(1, 1 + len(chosen))
    routers = []
    points = accuracies if accuracies is not None else sorted({1 / len(names), *ACCURACIES})
    for priced in chosen:
        routers.append(router_value(traces, general, special, priced, lengths, points, bootstrap, seed=seed))
        told(1 + len(routers), 1 + len(chosen))
    return KnowledgeFindings(
        traces=f"{traces.manifest.kind} {traces.manifest.created[:10]}",
        verifier=traces.manifest.verifier.name,
        requests={domain: domains.count(domain) for domain in bootstrap.domains},
        generalist=general,
        specialists=special,
        draft_tokens=draft_tokens,
        pooled=pooled,
        paired=paired,
        transfer=transfer_cells(replayed, general, special, bootstrap),
        routers=tuple(routers),
        published=published_rows(None if published is None else Path(published)),
        method=describe(draws),
    )


def _must_share_requests(traces: TraceSet, names: Sequence[str]) -> None:
    """Refuse drafters that were not recorded on every request: pairs would be missing."""
    from analysis.speedup.grid import requests_of

    total = traces.sequences.num_rows
    for name in names:
        recorded = len(requests_of(traces, name))
        if recorded < total:
            raise ReplayError(f"drafter '{name}': must be recorded on all {total} requests, got {recorded}")
