"""What is known of an item once some stages have run, as the columns of a predictor."""

from __future__ import annotations

import numpy as np

from analysis.cascade.stopping import Ran
from analysis.cascade.table import QualityTable
from calibration.common.arrays import Floats

MISSING = " missing"
"""Ends the name of a column that is 1 where another is missing."""


def features(table: QualityTable, ran: Ran, *, known_domain: bool) -> tuple[tuple[str, ...], Floats]:
    """Give names and values (items, features) of what is known after the stages `ran`; NaN where missing.

    Item features, then the signals of each stage that ran, named ``stage.signal``. Signals that a stage never has
    are left out; where one is missing on some items, a column ``... missing`` says so. `known_domain`: the domain is
    known before any stage runs, and enters as a column per domain.
    """
    columns: dict[str, Floats] = dict(table.item_features)
    if known_domain:
        for domain in sorted(set(table.domains)):
            columns[f"domain={domain}"] = np.array([d == domain for d in table.domains], dtype=np.float64)
    for stage in ran:
        for name, values in table.signals.items():
            columns[f"{table.stages[stage]}.{name}"] = values[:, stage]
    kept: dict[str, Floats] = {}
    for name, values in columns.items():
        absent = np.isnan(values)
        if absent.all():
            continue
        kept[name] = values
        if absent.any():
            kept[f"{name}{MISSING}"] = absent.astype(np.float64)
    if not kept:
        return (), np.empty((len(table.items), 0))
    return tuple(kept), np.stack(list(kept.values()), axis=1)
