"""The plain rule with thresholds and lengths chosen for each batch size, on other requests than it serves."""

from __future__ import annotations

from itertools import product

import numpy as np

from calibration.common.arrays import Floats
from calibration.traces import TraceSet
from calibration.traces.manifest import CostConstants
from simulator.drafter_routing.forecast import deal
from simulator.playback.survival import text_facts
from studies.hybrid.closed import ClosedBatches, Rounds

MATCHES = (1, 2, 3, 5, 8, 16)
LOOKUPS = (3, 6, 12, 20)
MODELS = (1, 2, 3, 4, 6, 9)
FOLDS = 5
Setting = tuple[int, int, int]
"""Matched tokens from which on is copied, tokens copied, tokens of the model."""


class TunedRule:
    """Every setting of the rule, played once: rounds are the same at every price and number of copies.

    The model is drafter 0 of `closed`, the lookup drafter 1.
    """

    def __init__(self, closed: ClosedBatches, traces: TraceSet, seed: int) -> None:
        match = text_facts(traces, closed.sequences, "the tuned rule").match
        self._closed, (self._fold, self._folds) = closed, deal(traces, closed.sequences, FOLDS, seed)
        self._rounds: dict[Setting, Rounds] = {}
        for setting in product(MATCHES, LOOKUPS, MODELS):
            copied = match >= setting[0]
            tokens = np.where(copied, setting[1], setting[2])
            self._rounds[setting] = closed.play(np.where(copied, 1, 0), tokens)

    def rates(self, prices: CostConstants, batch: int) -> Floats:
        """Give tokens per second of each request under the setting that is fastest on other folds."""
        rates = np.stack([self._closed.rates(each, prices, batch) for each in self._rounds.values()])
        chosen = [int(np.argmax(rates[:, self._fold != part].mean(axis=1))) for part in range(self._folds)]
        return np.asarray(rates[np.array(chosen)[self._fold], np.arange(rates.shape[1])], dtype=np.float64)
