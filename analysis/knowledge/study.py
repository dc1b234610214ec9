"""The knowledge question, start to end.

Published comparisons of generic and tuned drafters, read where their files are at hand: facts of others.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.common.bootstrap import DRAWS, ClusterBootstrap, describe, number
from analysis.common.threads import one_thread
from analysis.knowledge.compare import Replayed, cast, paired_rows, router_value, transfer_cells
from analysis.knowledge.findings import KnowledgeFindings, PublishedRow
from analysis.routing.served import Priced, cheap_prices, own_prices
from calibration.common.errors import ReplayError, ReportError, did_you_mean
from calibration.common.progress import Progress
from calibration.traces import TraceSet

TUNED, ONLINE = "domain-tuned-draft/ablations.csv", "osd-token-alpha/osd_per_token_counts.csv"


def published_rows(folder: Path | None) -> tuple[PublishedRow, ...]:
    """Give what `folder` holds of the tables that are known here, in their layout; none where there is no folder.

    Of Online Speculative Decoding (Liu et al. 2023): LLaMA-160M for Vicuna-7B on spider, before and after
    distillation from the verifier; accepted over proposed, summed over vocabulary tokens. Raises `ReportError` where
    a table lacks a column, or `folder` holds none of them.
    """
    if folder is None:
        return ()
    rows = []
    if (folder / TUNED).is_file():
        rows += _tuned(folder / TUNED)
    if (folder / ONLINE).is_file():
        rows.append(_online(folder / ONLINE))
    if not rows:
        raise ReportError(f"{folder}: must hold {TUNED} or {ONLINE}, got neither")
    return tuple(rows)


def _tuned(path: Path) -> list[PublishedRow]:
    """Rows ``<domain>:generic`` and ``<domain>:tuned``, and the share of the tuning data that was used."""
    values = {
        (row["ablation"], row["setting"]): float(row["value"])
        for row in _rows(path, "ablation", "setting", "quantity", "value")
        if row["quantity"] == "acceptance_rate"
    }
    source = "domain-tuned drafter, ablations"
    found = []
    for (ablation, setting), tuned in values.items():
        domain, _, kind = setting.partition(":")
        generic = values.get((ablation, f"{domain}:generic"))
        if kind == "tuned" and generic is not None:
            found.append(PublishedRow(source, f"domain generalization, {domain}", generic, tuned, None))
    generic = values.get(("A1_dataset_size", "generic (0%)"))
    if generic is not None:
        found += [
            PublishedRow(source, f"{setting} of the tuning data", generic, tuned, None)
            for (ablation, setting), tuned in values.items()
            if ablation == "A1_dataset_size" and setting.endswith("%")
        ]
    return found


def _online(path: Path) -> PublishedRow:
    names = [f"{model}-spider:{count}" for model in ("org", "teacher-fwd") for count in ("correct", "proposed")]
    total = dict.fromkeys(names, 0)
    for row in _rows(path, *names):
        for name in names:
            total[name] += int(row[name])
    generic, tuned = (number(total[a] / total[b]) or 0.0 for a, b in (names[:2], names[2:]))
    source = "Online Speculative Decoding, LLaMA-160M for Vicuna-7B"
    return PublishedRow(source, "spider, distilled on its own text", generic, tuned, total[names[3]])


def _rows(path: Path, *columns: str) -> Iterator[Mapping[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        header = reader.fieldnames or ()
        for column in columns:
            if column not in header:
                raise ReportError(f"{path}: column '{column}': is missing{did_you_mean(column, header)}")
        yield from reader


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
        routers.append(
            router_value(
                traces=traces,
                generalist=general,
                specialists=special,
                priced=priced,
                lengths=lengths,
                accuracies=points,
                bootstrap=bootstrap,
                seed=seed,
            )
        )
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
