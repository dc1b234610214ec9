"""Mixed traffic from published acceptance lists: three datasets of SpecDecode-Bench as one TraceSet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.routing.served import PUBLISHED, Price, Priced
from calibration.common.errors import TraceError
from calibration.importers import import_specdecode_bench
from calibration.traces import TraceSet
from calibration.traces.traceset import subset

DRAFTERS = ("eagle", "ngram")
LENGTHS = (3, 7, 20)
"""Draft lengths worth trying there: vLLM's usual ones, and the longest n-gram draft that was recorded."""


def mixed_traffic(
    folder: str | os.PathLike[str], *, requests_per_domain: int | None = None, seed: int = 0
) -> TraceSet:
    """Give the requests of every ``combined_<dataset>.jsonl`` in `folder` that were recorded with both drafters.

    The dataset is the domain. `requests_per_domain` draws so many of each without replacement, so that the mix is
    even; a dataset with fewer keeps all. Raises `TraceError` where there is no such file.
    """
    from simulator.playback.replay import select_sequences

    files = sorted(Path(folder).glob("combined_*.jsonl"))
    if not files:
        raise TraceError(f"{folder}: must hold combined_<dataset>.jsonl files, got none")
    traces = import_specdecode_bench(files, costs=PUBLISHED)
    table = select_sequences(traces, drafter=DRAFTERS)
    labels = np.asarray(table.domains, dtype=object)
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    for domain in sorted(set(table.domains)):
        rows = np.flatnonzero(labels == domain)
        if requests_per_domain is not None and requests_per_domain < len(rows):
            rows = np.sort(rng.choice(rows, requests_per_domain, replace=False))
        kept += [table.ids[row] for row in rows.tolist()]
    return subset(traces, kept)


def published_prices(drafters: Sequence[str] = DRAFTERS) -> tuple[Priced, ...]:
    """Give two price lists: the published one, which charges an EAGLE round alike for every length, and per step.

    Per step: the published price of a round is taken to be that of three steps, and every step costs a third of it.
    An assumption: the constants' source does not say what length they were measured at.
    """
    verifier = PUBLISHED.verifier.model_dump()
    rounds = {name: PUBLISHED.drafters[name].model_dump() for name in drafters}
    steps = {
        name: {
            key: value / 3 if isinstance(value, float) else ("per_step" if key == "charged" else value)
            for key, value in cost.items()
        }
        if cost["kind"] == "linear"
        else cost
        for name, cost in rounds.items()
    }
    base = {"overhead_s": PUBLISHED.overhead_s, "verifier": verifier}
    return (
        Priced(Price("published", "stated", PUBLISHED.source), {**base, "drafters": rounds}),
        Priced(
            Price("per step", "assumed", "as published, but a third of EAGLE's round for every draft step"),
            {**base, "drafters": steps},
        ),
    )
