"""The token-level study of one TraceSet: what acceptance depends on, how well it is foreseen, and its hazard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.common.bootstrap import ClusterBootstrap
from analysis.common.records import Record
from analysis.common.threads import one_thread
from analysis.tokens.hazard import HazardCurve, hazard_curves
from analysis.tokens.heldout import HeldOut, hold_out
from analysis.tokens.odds import Regression, regress
from analysis.tokens.rows import token_rows
from calibration.common.errors import ReportError
from calibration.traces import TraceSet

DRAFT_TOKENS = 8


@dataclass(frozen=True)
class TokenFindings(Record):
    """What the drafted tokens of a TraceSet tell.

    ``draft_tokens`` is the draft length of the rounds, ``tokens`` the compared tokens with recorded confidence and
    entropy, ``requests`` all requests, ``domains`` their domains, ``drafters`` those with such tokens. ``decoding``
    is greedy or sampled. ``regression`` and ``held_out`` are None where no drafter recorded what it felt, or prompts
    are too few; ``notes`` then says so, and what else was left out or replaced.
    """

    draft_tokens: int
    seed: int
    decoding: str
    tokens: int
    requests: int
    domains: tuple[str, ...]
    drafters: tuple[str, ...]
    regression: Regression | None
    held_out: HeldOut | None
    hazards: tuple[HazardCurve, ...]
    notes: tuple[str, ...]
    schema_version: int = 1

    @property
    def rests_on(self) -> str:
        """What the findings stand on, in a line."""
        return f"recorded: {self.tokens} tokens of {self.requests} requests, {self.decoding}"

    def hazard(self, drafter: str) -> HazardCurve:
        """Give the hazard of `drafter`. Raises `KeyError` where it has none."""
        return {curve.drafter: curve for curve in self.hazards}[drafter]


@one_thread
def study_tokens(traces: TraceSet, *, draft_tokens: int = DRAFT_TOKENS, seed: int = 0) -> TokenFindings:
    """Study the drafted tokens of `traces` in rounds of `draft_tokens`: regression, held-out scores, hazard by depth.

    Measured: replays of recorded text, exact for greedy traces, exact in distribution for sampled ones. Equal seeds
    give equal findings. Warns `ConvergenceWarning` where a fit did not converge. Raises `ReportError` where no
    drafter can be replayed. Regression and scores need drafters with recorded confidence and entropy; without them
    the hazard is found alone.
    """
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    rows, regression, held_out = None, None, None
    try:
        rows = token_rows(traces, draft_tokens, seed=seed)
        notes += [f"no rows of {said}" for said in rows.skipped]
        regression = regress(rows, rng)
        held_out = hold_out(rows, rng, prompt_sd=regression.prompt_sd)
    except ReportError as fault:
        notes.append(str(fault))
    labels = traces.sequences["domain"].to_pylist()
    hazards = hazard_curves(traces, draft_tokens, ClusterBootstrap(labels, np.random.default_rng(seed)), rows)
    return TokenFindings(
        draft_tokens=draft_tokens,
        seed=seed,
        decoding=traces.manifest.decoding.mode,
        tokens=0 if rows is None else len(rows),
        requests=len(labels),
        domains=tuple(sorted(set(labels))),
        drafters=() if rows is None else tuple(rows.drafters[code] for code in np.unique(rows.drafter)),
        regression=regression,
        held_out=held_out,
        hazards=hazards,
        notes=(*notes, *(regression.troubles if regression else ())),
    )
