"""Oracles: they know what will be accepted. No engine can do this; they bound what can."""

from __future__ import annotations

import numpy as np

from calibration.common.arrays import Ints
from simulator.rounds.forecast import capped_seconds
from simulator.rounds.policy import OraclePolicy
from simulator.rounds.round import Round


class Oracle(OraclePolicy):
    """Drafts exactly as many tokens as will be accepted: an oracle, no engine can do it; its replay is exact.

    No draft token is wasted and every round emits as much as it can, so it bounds the accepted tokens of every
    chain policy from above. It does not bound time where drafting an accepted token costs more than verifying one.
    The drafter runs every round, as in the published simulation of this oracle (SpecDecode-Bench).
    """

    always_drafts = True

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Give the true run lengths."""
        return run_length


class OracleCost(OraclePolicy):
    """Drafts min(n_i, L) with the L that gives this round the most tokens per second: an oracle.

    n_i is the true run length of slot i, so that a draft of k <= n_i tokens emits k + 1. Where a verified token and a
    slot more in a draft step cost the same whatever the others do (linear costs), one L for all slots is as good as
    any set of lengths: the slots of one depth all pay or none does, and deeper steps never have more slots. It is
    the best choice round by round; what a choice does to later rounds it does not weigh.
    """

    def foreseen_tokens(self, round_: Round, run_length: Ints) -> Ints:
        """Give the lengths of the best depth."""
        runs = run_length
        seconds = capped_seconds(round_, runs)
        depth = np.arange(1, len(seconds))
        still = np.count_nonzero(runs[:, None] >= depth, axis=0)
        tokens = round_.active + np.concatenate(([0], np.cumsum(still)))
        return np.minimum(runs, int(np.argmax(tokens / seconds)))
