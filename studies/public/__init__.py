"""Predicted against measured on public measurements of speculative decoding: what others timed on real systems.

Every source is fitted to part of a table and predicts the rest. The tables are read where they lie; nothing of them
is kept here but the speed-ups that were read off a figure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from analysis.fidelity.table import Condition, Crossover, Fidelity, Source
from studies.public.draft_lengths import compare_draft_lengths
from studies.public.eagle3_rounds import compare_eagle3_rounds
from studies.public.hsd_rounds import compare_hsd_rounds
from studies.public.slow_drafter import compare_slow_drafter
from studies.public.specdecode_bench import compare_speedups

__all__ = ["public_fidelity"]


def public_fidelity(
    data_folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> Fidelity:
    """Give the comparison for every public table; takes about 45 seconds of one core.

    `data_folder` holds the tables in folders of their own (``specdecode-bench-simulator``, ``llmservingsim-h100``,
    ``eagle3-perstep-ltd``, ``hsd-eagle3-steps``, ``published-tables``, ``apertus-70b``). `progress` hears (sources
    done, sources). Raises `CalibrationError` where one is missing, `TraceError` where one cannot be read.
    """
    data, report = Path(data_folder), progress or (lambda done, total: None)
    sources: list[Source] = []
    conditions: list[Condition] = []
    crossovers: list[Crossover] = []
    for compare in _TABLES:
        report(len(sources), len(_TABLES))
        source, found, crossed = compare(data)
        sources.append(source)
        conditions += found
        crossovers += crossed
    report(len(sources), len(_TABLES))
    return Fidelity(tuple(sources), tuple(conditions), tuple(crossovers))


Compared = tuple[Source, list[Condition], list[Crossover]]


def _no_crossover(compare: Callable[[Path], tuple[Source, list[Condition]]]) -> Callable[[Path], Compared]:
    def whole(data: Path) -> Compared:
        source, conditions = compare(data)
        return source, conditions, []

    return whole


_TABLES: tuple[Callable[[Path], Compared], ...] = (
    compare_speedups,
    _no_crossover(compare_eagle3_rounds),
    _no_crossover(compare_hsd_rounds),
    _no_crossover(compare_draft_lengths),
    compare_slow_drafter,
)
