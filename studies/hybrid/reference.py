"""The reference figures of hybrid drafting on the public traces, read as their own simulator reads them.

Found to be: batches of copies with prefill, mean over requests of tokens per second; the two acceptance lists paired
place by place, cut to the shorter one, and read one place early (``alignment="published"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.routing.served import PUBLISHED
from calibration.importers import import_specdecode_bench
from calibration.importers.specdecode_bench import Alignment
from simulator.playback.survival import text_facts
from studies.hybrid.closed import ClosedBatches
from studies.hybrid.material import paired
from studies.public.runs import table_path

DRAFTERS = ("eagle", "ngram")


@dataclass(frozen=True)
class Reference:
    """Speed-ups over no speculation: of the best fixed draft, of the plain rule (match of 3: 20; else 7), oracle."""

    batch: int
    requests: int
    best_fixed: float
    best_drafter: str
    best_tokens: int
    plain_rule: float
    oracle: float


def reference(
    data: Path, dataset: str, batches: tuple[int, ...] = (1, 32), *, alignment: Alignment = "published"
) -> list[Reference]:
    """Give the figures of `dataset` below the folder `data` of public traces, at the published constants."""
    path = table_path(data, "specdecode-bench-simulator", "data", "llama3.1-8B", f"combined_{dataset}.jsonl")
    traces = paired(import_specdecode_bench([path], alignment=alignment), *DRAFTERS)
    closed = ClosedBatches(traces, DRAFTERS)
    copied = text_facts(traces, closed.sequences, "the plain rule").match >= 3
    rule = closed.play(np.where(copied, 1, 0), np.where(copied, 20, 7))
    plain = closed.play(-1, 0)
    fixed = {(d, k): closed.play(d, k) for d, most in ((0, 12), (1, 20)) for k in range(1, most + 1)}
    found = []
    for batch in batches:
        base = closed.rates(plain, PUBLISHED, batch).mean()
        speed = {which: float(closed.rates(each, PUBLISHED, batch).mean() / base) for which, each in fixed.items()}
        best = max(speed, key=lambda which: speed[which])
        found.append(
            Reference(
                batch=batch,
                requests=len(closed.lengths),
                best_fixed=speed[best],
                best_drafter=DRAFTERS[best[0]],
                best_tokens=best[1],
                plain_rule=float(closed.rates(rule, PUBLISHED, batch).mean() / base),
                oracle=float(closed.rates(closed.oracle(PUBLISHED, batch), PUBLISHED, batch).mean() / base),
            )
        )
    return found
